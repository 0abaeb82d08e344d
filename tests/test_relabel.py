"""What a batch's finished images make of labels, and their certificate along the chain."""

import pytest
import torch
from photographs import crops

from gradleak.bundle import FEATURE, GRAD, LABEL
from gradleak.models.build import build_model
from gradleak.normalisation import normalise
from gradleak.reconstruction.mlp import check_mlp
from gradleak.reconstruction.options import MatchSettings
from gradleak.reconstruction.relabel import labels_of_images
from gradleak.reconstruction.resimulate import check_reconstruction
from gradleak.softlabels import soft_label
from gradleak.stages.capture import Capture, capture
from gradleak.stages.feature import BundleLayers
from gradleak.stages.network import normalisation_of
from gradleak.stages.reconstruct import reconstruct

SAMPLES = 3


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return build_model("fcn4", size=16)


@pytest.fixture(scope="module")
def captured(network: torch.nn.Module) -> Capture:
    labels = torch.stack([soft_label([(k, 1.0)], 17, 0.1) for k in (3, 3, 5)])
    images = crops(16, SAMPLES, torch.Generator().manual_seed(0)).mul(255.0).round() / 255.0
    return capture(network, images, labels, device="cpu")


def off(labels: torch.Tensor) -> torch.Tensor:
    """Return labels that are wrong by half of 1e-4 at most."""
    error = 1e-4 * torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).double()
    return labels + error - error.mean(1, keepdim=True)


def test_images_and_all_gradients_give_labels_better_than_they_were(
    captured: Capture,
) -> None:
    truth, layers = captured.truth, captured.bundle.model.layers
    inputs = normalise(truth.images.double(), *normalisation_of(captured.bundle.model)).flatten(1)
    read = BundleLayers(captured.bundle, torch.device("cpu"))
    found = labels_of_images(layers, read, inputs, off(truth.labels.double()))
    assert float((found - truth.labels).abs().max()) < 2e-6


def test_the_certificate_of_a_batch_is_that_of_the_whole_network(
    captured: Capture, network: torch.nn.Module
) -> None:
    truth, bundle = captured.truth, captured.bundle
    mean, std = normalisation_of(bundle.model)
    read = BundleLayers(bundle, torch.device("cpu"))
    for images in (truth.images, truth.images.flip(0), (truth.images + 1e-4).clamp(0.0, 1.0)):
        labels = truth.labels.double()
        chain = check_mlp(bundle.model.layers, read, images, labels, mean, std)
        whole = check_reconstruction(network, bundle.tensors(GRAD), images, labels, mean, std)
        assert chain.exact == whole.exact
        if not whole.exact:
            assert chain.relative == pytest.approx(whole.relative, rel=0.5)


def test_pictures_of_8_bits_are_rid_of_the_error_of_their_labels(
    captured: Capture, network: torch.nn.Module
) -> None:
    truth, bundle = captured.truth, captured.bundle
    mean, std = normalisation_of(bundle.model)
    inputs = normalise(truth.images.double(), mean, std).flatten(1)
    first = bundle.model.layers[0].name
    wrong = {
        LABEL: off(truth.labels.double()),
        FEATURE + first: inputs + 1e-4 * inputs.roll(1, 0),
    }
    found = reconstruct(bundle.extended(wrong), model=network, device="cpu")
    assert (found.verdict, found.method) == ("unique", "mlp")
    assert "labels refined by up to 5e-05" in found.reason
    assert torch.equal(found.images, truth.images)
    assert float((found.bundle.tensor(LABEL) - truth.labels).abs().max()) < 2e-6


def on_the_kink(network: torch.nn.Module, inputs: torch.Tensor, units: int) -> int:
    """Put units of the first layer on their kink; return how many fall otherwise in float64."""
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Linear))
    assert first.bias is None
    weight, x = first.weight.detach().double(), inputs.double()
    for unit in range(units):
        sample = x[unit % len(x)]
        weight[unit] -= (weight[unit] @ sample) / sample.square().sum() * sample
    with torch.no_grad():
        first.weight.copy_(weight)
    single = inputs.float() @ first.weight.T > 0
    double = x @ first.weight.double().T > 0
    return int((single != double).sum())


def test_a_unit_at_its_kink_does_not_spoil_the_labels() -> None:
    network = build_model("fcn4", size=16, seed=3)
    labels = torch.stack([soft_label([(k, 1.0)], 17, 0.1) for k in (3, 3, 5)])
    images = crops(16, SAMPLES, torch.Generator().manual_seed(0)).mul(255.0).round() / 255.0
    spec = capture(network, images, labels, device="cpu").bundle.model
    inputs = normalise(images, *normalisation_of(spec)).flatten(1)
    assert on_the_kink(network, inputs, 24) > 0
    bundle = capture(network, images, labels, device="cpu").bundle
    read = BundleLayers(bundle, torch.device("cpu"))
    found = labels_of_images(spec.layers, read, inputs.double(), off(labels.double()))
    assert float((found - labels).abs().max()) < 2e-6


@pytest.mark.parametrize(("noise", "kept"), [(2e-4, True), (2e-2, False)])
def test_pictures_on_levels_are_kept_where_their_gradient_is_close(
    captured: Capture, network: torch.nn.Module, noise: float, kept: bool
) -> None:
    truth, bundle = captured.truth, captured.bundle
    dice = torch.Generator().manual_seed(2)
    spoilt = {
        GRAD + name: gradient
        + noise * gradient.square().mean().sqrt() * torch.randn(gradient.shape, generator=dice)
        for name, gradient in bundle.tensors(GRAD).items()
    }
    inputs = normalise(truth.images.double(), *normalisation_of(bundle.model)).flatten(1)
    first = bundle.model.layers[0].name
    known = {LABEL: truth.labels.double(), FEATURE + first: inputs + 1e-4 * inputs.roll(1, 0)}
    settings = MatchSettings(time_limit=1.0)
    found = reconstruct(
        bundle.extended(spoilt | known), model=network, device="cpu", settings=settings
    )
    assert found.verdict == "approximate"
    assert (found.method == "mlp" and torch.equal(found.images, truth.images)) == kept
