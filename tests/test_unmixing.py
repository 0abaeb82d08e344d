"""Pictures of 8 bits behind the inputs of a batch, which errors of its labels mix."""

from __future__ import annotations

import torch
from photographs import crops
from torch import Tensor

import gradleak
from gradleak.models.build import build_model
from gradleak.normalisation import normalise
from gradleak.reconstruction.options import MatchSettings
from gradleak.softlabels import soft_label
from gradleak.stages.unmixing import unmixed_by_levels

NORMALISATION = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
DIFFERENT = torch.eye(5)


def pictures(count: int) -> Tensor:
    return (crops(24, count, torch.Generator().manual_seed(6)) * 255).round() / 255


def mixed(images: Tensor, by: Tensor) -> Tensor:
    """Return the inputs of pictures, each with so much (N, N) of each, and all of its own."""
    inputs = normalise(images.double(), *NORMALISATION)
    return inputs + torch.einsum("nm,mchw->nchw", by.double(), inputs)


def test_levels_tell_factors_and_mixtures_of_samples_of_a_class() -> None:
    images = pictures(3)
    by = torch.tensor([[0.043, 0.0, 0.0], [0.0, -0.0079, 0.013], [0.0, -0.008, 0.00217]])
    found = unmixed_by_levels(mixed(images, by), DIFFERENT[[0, 3, 3]], NORMALISATION)
    assert found is not None
    assert torch.equal(found, images.float())


def test_levels_tell_how_all_samples_mix_a_little() -> None:
    images = pictures(5)
    by = 2e-3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    inputs = mixed(images, by)
    off = (inputs - normalise(images.double(), *NORMALISATION)) * torch.tensor([0.2]) * 255
    assert float(off.abs().max()) > 0.5  # more than rounding mends
    found = unmixed_by_levels(inputs, DIFFERENT, NORMALISATION)
    assert found is not None
    assert torch.equal(found, images.float())


def test_what_is_not_in_the_span_of_the_inputs_is_not_rounded_away() -> None:
    images = pictures(3)
    inputs = normalise(images.double(), *NORMALISATION)
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    spoiled = inputs + 0.01 * noise.double()
    assert unmixed_by_levels(spoiled, DIFFERENT[:3], NORMALISATION) is None


def test_three_of_one_class_come_back_with_their_labels() -> None:
    network = build_model("fcn4", classes=50, size=32, seed=1)
    images = (crops(32, 4, torch.Generator().manual_seed(9)) * 255).round() / 255
    labels = torch.stack([soft_label([(k, 1.0)], 50, 0.1) for k in (7, 7, 7, 30)])
    captured = gradleak.capture(network, images, labels)
    bundle = gradleak.recover_feature(gradleak.recover_label(captured.bundle).bundle).bundle
    found = gradleak.reconstruct(bundle, settings=MatchSettings(time_limit=20.0))
    assert (found.verdict, found.method) == ("unique", "mlp")
    assert "set to levels of 8 bits" in found.reason
    order = torch.cdist(images.flatten(1), found.images.flatten(1)).argmin(1)
    assert torch.equal(found.images[order], images.float())
    recovered = found.bundle.tensor("label/soft")
    assert float((recovered[order] - labels).abs().max()) < 1e-4
