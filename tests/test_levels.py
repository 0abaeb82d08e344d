"""The levels of 8-bit pictures under noise, settled from the surest pixels."""

from __future__ import annotations

import pytest
import torch
from photographs import crops

import gradleak
from gradleak.models.build import build_model
from gradleak.reconstruction.options import MatchSettings
from gradleak.stages import attack, refining


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
