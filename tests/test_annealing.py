"""An image found from far away: smooth first, smoothness withdrawn step by step."""

from __future__ import annotations

import pytest
import torch
from photographs import crops
from torch import Tensor, nn

from gradleak.calculus.annealing import annealed
from gradleak.calculus.prior import slopes
from gradleak.normalisation import normalise
from gradleak.reconstruction.matching import match_gradients
from gradleak.reconstruction.options import MatchOptions
from gradleak.reconstruction.resimulate import gradients_of

SIDE = 24


class Maps:
    """What an image misses of the maps that a true one makes in a network of ReLUs."""

    def __init__(self, noise: float = 0.0) -> None:
        torch.manual_seed(3)
        widths = ((3, 32, 1), (32, 32, 1), (32, 64, 2))
        layers = [(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in widths]
        self.network = nn.Sequential(*(part for layer in layers for part in layer)).eval()
        image = crops(SIDE, 1, torch.Generator().manual_seed(8))
        self.true = normalise(image, [0.5] * 3, [0.25] * 3)
        with torch.no_grad():
            maps = self.network(self.true)
            self.size = maps.norm()
            self.target = maps + noise * maps.std() * torch.randn(maps.shape)

    def missed(self, x: Tensor) -> tuple[Tensor, ...]:
        return ((self.network(x) - self.target) / self.size,)

    def error(self, x: Tensor) -> float:
        return float((x - self.true).square().mean().sqrt())


def test_an_image_is_found_from_far_away() -> None:
    maps = Maps()
    told: list[tuple[int, float]] = []
    found = annealed(
        maps.missed,
        torch.zeros_like(maps.true),
        None,
        seconds=60.0,
        enough=1e-10,
        progress=lambda *step: told.append(step),
    )
    assert found.squares <= 1e-10
    assert maps.error(found.x) < 1e-3
    assert told[-1] == (found.steps, found.squares)
    left = [sum(float(s.abs().sum()) for s in slopes(x)) for x in found.smoother]
    assert len(left) > 2
    assert left == sorted(left)


def test_of_noisy_maps_a_smoother_image_is_nearer() -> None:
    maps = Maps(noise=0.3)
    found = annealed(maps.missed, torch.zeros_like(maps.true), None, seconds=60.0)
    assert min(maps.error(x) for x in found.smoother) < 0.9 * maps.error(found.x)


def test_an_image_that_is_accepted_and_the_clock_end_it() -> None:
    maps = Maps()
    start = torch.zeros_like(maps.true)
    found = annealed(maps.missed, start, None, seconds=60.0, accepted=lambda x: maps.error(x) < 0.5)
    assert found.accepted
    assert 1e-2 < maps.error(found.x) < 0.5
    halted = annealed(maps.missed, start, None, seconds=0.0)
    assert (halted.steps, halted.smoother) == (0, ())
    assert torch.equal(halted.x, start)


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_matching_goes_on_from_an_image_that_is_near(optimiser: str) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 10 * 10, 5)
    ).eval()
    image = crops(12, 1, torch.Generator().manual_seed(2))
    label = torch.eye(5)[[2]]
    inputs = normalise(image, [0.5] * 3, [0.25] * 3)
    names = [name for name, _ in model.named_parameters()]
    options = MatchOptions(
        optimiser=optimiser,  # type: ignore[arg-type]
        distance="l2",
        tv=0.0,
        feature_weight=0.0,
        steps=8,
    )

    def error(start: Tensor | None) -> float:
        found = match_gradients(
            model,
            gradients_of(model, inputs, label, names),
            label,
            shape=(3, 12, 12),
            mean=[0.5] * 3,
            std=[0.25] * 3,
            options=options,
            start=start,
            generator=torch.Generator().manual_seed(0),
        )
        return float((found.images - image).square().mean().sqrt())

    near = (image + 0.03 * torch.randn(image.shape)).clamp(0.0, 1.0)
    assert error(near) < 0.5 * error(None)
