"""A picture is called unique only where the gradient leaves no other."""

from __future__ import annotations

import pytest
import torch
from photographs import centre
from torch import Tensor, nn

import gradleak
from gradleak.bundle import IMAGE
from gradleak.models.spec import ModelSpec
from gradleak.reconstruction.options import MatchSettings
from gradleak.softlabels import soft_label

SHORT = MatchSettings(time_limit=20.0)


def captured(network: nn.Module, size: int = 16) -> gradleak.Bundle:
    """Return a gradient of the network with its label and head feature recovered."""
    image = centre("chelsea", size)
    label = soft_label([(3, 1.0)], 10, 0.2)[None]
    spec = ModelSpec(name="own", input_shape=(3, size, size))
    bundle = gradleak.capture(network.eval(), image, label, spec=spec).bundle
    return gradleak.recover_feature(gradleak.recover_label(bundle).bundle).bundle


def whole(stride: int, activation: nn.Module | None = None) -> nn.Module:
    """Return a network of one convolution that reads every pixel if ``stride`` is 1."""
    torch.manual_seed(0)
    places = (16 - 3) // stride + 1
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, stride=stride), activation or nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(48 * places**2, 10),
    )  # fmt: skip


def test_a_picture_that_is_read_whole_is_unique() -> None:
    network = whole(1)
    outcome = gradleak.reconstruct(captured(network), model=network, settings=SHORT)
    assert (outcome.verdict, outcome.method) == ("unique", "peel")


def test_pixels_that_no_window_reads_make_it_ambiguous() -> None:
    network = whole(2)  # windows of three end at the fifteenth row
    outcome = gradleak.reconstruct(captured(network), model=network, settings=SHORT)
    assert outcome.certificate.exact
    assert outcome.verdict == "ambiguous"
    assert "31 of 256 pixels are not in the gradient" in outcome.reason


def test_the_control_of_an_attack_that_finds_nothing_in_noise_is_grey() -> None:
    network = whole(1)
    bundle = captured(network)
    outcome = gradleak.reconstruct(
        bundle, model=network, settings=SHORT, method="peel", control=True
    )
    assert outcome.verdict == "unique"
    assert outcome.control is not None
    assert outcome.control.certificate.relative > 0.1


def test_a_network_that_cannot_be_traced_is_matched() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Flatten())
            self.fc = nn.Linear(6 * 196, 10)

        def forward(self, x: Tensor) -> Tensor:
            if not bool((x != 0.0).any()):
                raise ValueError("a blank picture")
            logits: Tensor = self.fc(self.body(x))
            return logits

    network = Stubborn()
    settings = MatchSettings(time_limit=2.0)
    outcome = gradleak.reconstruct(captured(network), model=network, settings=settings)
    assert outcome.method == "match"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_precisions_are_walked(dtype: torch.dtype) -> None:
    network = whole(1).to(dtype)
    outcome = gradleak.reconstruct(captured(network), model=network, settings=SHORT)
    assert outcome.maps


def test_a_picture_from_half_precision_is_one_of_many_and_is_said_to_be() -> None:
    network = whole(1)
    bundle = captured(network)
    half = {name: bundle.tensor(f"grad/{name}").half() for name in bundle.names("grad/")}
    rounded = gradleak.Bundle(
        {f"{prefix}{name}": bundle.tensor(prefix + name)
         for prefix in ("param/", "buffer/", "label/", "feature/") for name in bundle.names(prefix)}
        | {f"grad/{name}": gradient for name, gradient in half.items()},
        bundle.metadata,
    )  # fmt: skip
    outcome = gradleak.reconstruct(rounded, model=network, settings=SHORT)
    assert outcome.verdict in ("ambiguous", "approximate")
    assert outcome.warning is not None
    assert "float16" in outcome.warning
    assert gradleak.reconstruct(bundle, model=network, settings=SHORT).warning is None


def noisy(bundle: gradleak.Bundle, level: float) -> gradleak.Bundle:
    """Return the bundle with noise of a ``level`` relative to each gradient's root mean square."""
    dice = torch.Generator().manual_seed(0)
    found = {}
    for name in bundle.names("grad/"):
        gradient = bundle.tensor(f"grad/{name}")
        size = gradient.square().mean().sqrt()
        found[f"grad/{name}"] = gradient + level * size * torch.randn(
            gradient.shape, generator=dice
        )
    return bundle.extended(found)


def test_noise_that_cannot_support_exactness_is_warned_of() -> None:
    network = whole(1)
    outcome = gradleak.reconstruct(noisy(captured(network), 1e-3), model=network, settings=SHORT)
    assert outcome.verdict == "approximate"
    assert outcome.warning is not None
    assert "noise" in outcome.warning


def test_masks_are_settled_and_the_picture_refined_under_noise() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 256, 10),
    )  # fmt: skip
    outcome = gradleak.reconstruct(noisy(captured(network), 1e-2), model=network, settings=SHORT)
    assert outcome.method == "peel"
    assert "made the likeliest under the noise" in outcome.reason
    missed = outcome.bundle.tensor(IMAGE) - centre("chelsea", 16)
    assert float(missed.square().mean()) < 1e-4
