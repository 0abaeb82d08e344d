"""The levels of 8-bit pictures under noise, settled from the surest pixels."""

from __future__ import annotations

import pytest
import torch
from photographs import crops

import gradleak
from gradleak.models.build import build_model
from gradleak.normalisation import normalise
from gradleak.reconstruction.options import MatchSettings
from gradleak.softlabels import soft_label
from gradleak.stages import attack, levels, refining


def noisy(level: float) -> tuple[gradleak.Bundle, torch.Tensor]:
    """Return LeNet's gradient of a photograph with noise relative to each tensor's own size."""
    network = build_model("lenet", classes=10, size=16, seed=2)
    image = (crops(16, 1, torch.Generator().manual_seed(4)) * 255).round() / 255
    captured = gradleak.capture(network, image, torch.tensor([3]))
    dice = torch.Generator().manual_seed(1)
    changed = {}
    for name in captured.bundle.names("grad/"):
        gradient = captured.bundle.tensor(f"grad/{name}")
        size = gradient.square().mean().sqrt()
        drawn = torch.randn(gradient.shape, generator=dice)
        changed[f"grad/{name}"] = gradient + level * size * drawn
    labelled = gradleak.recover_label(captured.bundle.extended(changed))
    return gradleak.recover_feature(labelled.bundle).bundle, image


def reconstructed(bundle: gradleak.Bundle) -> torch.Tensor:
    model = build_model("lenet", classes=10, size=16, seed=2)
    return gradleak.reconstruct(bundle, model=model, settings=MatchSettings(time_limit=20.0)).images


def test_levels_that_noise_blurs_are_settled_by_those_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, image = noisy(3.5e-4)
    assert torch.equal(reconstructed(bundle), image.float())
    monkeypatch.setattr(attack, "with_levels", lambda answer, given, **_: answer)
    without = (reconstructed(bundle) * 255).round() != (image * 255).round()
    assert 0 < int(without.sum()) < 100


def test_where_no_pixel_is_sure_nothing_is_rounded() -> None:
    bundle, image = noisy(1e-3)
    found = reconstructed(bundle)
    levels = found * 255
    assert float((levels - levels.round()).abs().max()) > 0.3
    assert float((found - image).abs().max()) < 0.5


def test_the_likeliest_image_is_nearer_than_the_one_that_fits_the_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, image = noisy(3e-2)
    likeliest = (reconstructed(bundle) - image).square().mean()
    monkeypatch.setattr(refining, "noise_of", lambda answer, given: None)
    fitted = (reconstructed(bundle) - image).square().mean()
    assert likeliest < 0.5 * fitted  # 3 dB


def test_what_was_done_to_a_noisy_picture_is_said() -> None:
    bundle, _ = noisy(3.5e-4)
    model = build_model("lenet", classes=10, size=16, seed=2)
    found = gradleak.reconstruct(bundle, model=model, settings=MatchSettings(time_limit=20.0))
    assert "likeliest under the noise" in found.reason
    assert "set to levels of 8 bits" in found.reason


def test_levels_tell_factors_and_mixtures_of_pictures() -> None:
    images = (crops(24, 3, torch.Generator().manual_seed(6)) * 255).round() / 255
    normalisation = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    true = normalise(images.double(), *normalisation)
    inputs = torch.stack(
        [1.043 * true[0], 0.9921 * true[1] + 0.013 * true[2], 1.00217 * true[2] - 0.008 * true[1]]
    )
    labels = torch.eye(5)[[0, 3, 3]]
    found = levels.unmixed_by_levels(inputs, labels, normalisation)
    assert found is not None
    assert torch.equal(found, images.float())
    labels = torch.eye(5)[[0, 3, 4]]  # of different classes, which do not mix
    assert levels.unmixed_by_levels(inputs, labels, normalisation) is None


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
