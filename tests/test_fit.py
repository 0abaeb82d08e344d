"""The image fitted to the maps that the walk recovered."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from calculus_cases import Case
from torch import Tensor, nn

from gradleak.calculus.descent import DescentOptions, descend
from gradleak.calculus.fit import fit_image
from gradleak.calculus.prior import Bounds, smoothest_image
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.errors import IncompleteError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Wave(nn.Module):
    """An activation that no kind of layer is known for."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x to x + sin(x) / 2."""
        return x + 0.5 * torch.sin(x)


@pytest.fixture(scope="module")
def case() -> Case:
    """A network in which the walk gets down to the second convolution's input."""
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        Wave(),
        nn.ReLU(),
        nn.Conv2d(12, 96, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96 * 8 * 8, 20),
    ]
    return Case(nn.Sequential(*layers), 16)


def _psnr(found: Tensor, true: Tensor) -> float:
    return -10.0 * math.log10(float((0.25 * (found - true)).square().mean()))


def test_an_image_out_of_reach_of_the_walk_is_fitted_to_the_maps_above(case: Case) -> None:
    walk = case.walk()
    assert walk.image is None
    dice = torch.Generator().manual_seed(0)
    start = 0.3 * torch.randn(case.images.shape, generator=dice)
    found = fit_image(walk, start, seconds=60.0, generator=dice)
    assert found.cuts == ("relu 5",)
    assert found.residual < 1e-5
    assert _psnr(found.image, case.images.double()) > 80.0


def test_closed_units_are_bounds_and_not_values(case: Case) -> None:
    network = RemainingNetwork(case.walk())
    true = case.images.double()
    (cut,) = network.cuts
    assert cut.open is not None
    assert not bool(cut.open.all())
    at_truth = network.missed_maps(true)[0]
    assert float(at_truth.norm()) < 1e-5
    below, above = cut.target - 1.0, cut.target + 1.0
    assert float(cut.missed(below)[~cut.open].abs().max()) == 0.0
    assert float(cut.missed(above)[~cut.open].min()) > 0.0


def test_the_gradients_of_the_weights_below_join_in(case: Case) -> None:
    network = RemainingNetwork(case.walk())
    true = case.images.double()
    maps, everything = network.missed_maps(true), network.missed(true)
    assert len(everything) == len(maps) + 4  # of the convolution and of the BatchNorm
    assert all(float(part.norm()) < 1e-5 for part in everything)
    moved = network.missed(true + 0.01)
    assert all(float(part.norm()) > 1e-4 for part in moved)


def test_without_any_recovered_map_there_is_nothing_to_fit(case: Case) -> None:
    walk = case.walk()
    walk._values.clear()
    with pytest.raises(IncompleteError, match="no map between the image and the logits"):
        RemainingNetwork(walk)


def test_the_descent_solves_a_linear_problem_and_stops_when_it_is_done() -> None:
    dice = torch.Generator().manual_seed(1)
    matrix = torch.randn(60, 48, generator=dice, dtype=torch.float64)
    true = torch.randn(1, 3, 4, 4, generator=dice, dtype=torch.float64)
    target = matrix @ true.flatten()

    def left(x: Tensor) -> tuple[Tensor, ...]:
        return (matrix @ x.flatten() - target,)

    options = DescentOptions(steps=100, inner=60, enough=1e-16)
    found = descend(left, torch.zeros_like(true), options, generator=dice)
    assert found.squares <= 1e-16
    assert found.steps < 20
    assert float((found.x - true).abs().max()) < 1e-7
    halted = descend(left, torch.zeros_like(true), DescentOptions(seconds=0.0), generator=dice)
    assert halted.steps == 0


@pytest.fixture(scope="module")
def open_case() -> Case:
    """Return a network whose first mask and input stay out of reach of the walk."""
    torch.manual_seed(5)
    layers = [
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 10),
    ]
    return Case(nn.Sequential(*layers), 24)


def test_of_many_images_that_fit_the_smoothest_is_nearer_than_any(open_case: Case) -> None:
    case, walk = open_case, open_case.walk()
    assert walk.image is None
    network = RemainingNetwork(walk)
    dice = torch.Generator().manual_seed(0)
    start = 0.3 * torch.randn(case.images.shape, generator=dice)
    any_image = fit_image(walk, start, seconds=20.0, generator=dice).image
    ends = torch.tensor([-2.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    bounds = Bounds(ends[:1], ends[1:])
    dice = torch.Generator().manual_seed(0)  # of its own: what the fit draws is not its matter
    found = smoothest_image(network, start, bounds, seconds=120.0, generator=dice)
    true = case.images.double()
    assert _psnr(found, true) > _psnr(any_image, true) + 5.0
    assert float(bounds.exceeded(found).max()) < 0.05
    assert all(float(part.norm()) < 0.02 for part in network.missed(found))


def test_kinks_are_rounded_over_the_softness_asked_for(open_case: Case) -> None:
    network = RemainingNetwork(open_case.walk())
    true = open_case.images.double()
    sharp = torch.cat([part.flatten() for part in network.missed(true + 0.1)])
    errors = [
        float((torch.cat([p.flatten() for p in network.missed(true + 0.1, soft)]) - sharp).norm())
        for soft in (0.3, 0.03, 0.003)
    ]
    assert errors[0] > 2.0 * errors[1] > 4.0 * errors[2] > 0.0
