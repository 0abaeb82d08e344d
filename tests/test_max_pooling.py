"""Convolutions under a max-pool: the input from the pooled map and the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from photographs import centre
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.calculus.maxpool import equations as maxpool_equations
from gradleak.calculus.maxpool.candidates import find_candidates
from gradleak.calculus.maxpool.decide import decide
from gradleak.calculus.maxpool.equations import Equations
from gradleak.calculus.maxpool.precondition import BlockFactors, Diagonal
from gradleak.calculus.maxpool.stem import PooledConvolution
from gradleak.calculus.walk import Walk, walk_down
from gradleak.calculus.window import Window

PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "china")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(order: str, width: int = 32, **pool: int) -> nn.Sequential:
    """Build layers in an ``order`` like "conv norm relu pool", and a classifier of their output."""
    kinds = {
        "conv": lambda: nn.Conv2d(3, width, 5, stride=2, padding=2),
        "norm": lambda: nn.BatchNorm2d(width),
        "relu": nn.ReLU,
        "pool": lambda: nn.MaxPool2d(**({"kernel_size": 3, "stride": 2, "padding": 1} | pool)),
        "sigmoid": nn.Sigmoid,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [kinds[kind]() for kind in order.split()]
        for layer in layers:
            if isinstance(layer, nn.BatchNorm2d):  # as after some training
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.2, 0.2)
                layer.running_mean.uniform_(-0.2, 0.2)
        body = nn.Sequential(*layers, nn.Flatten()).eval()
        features = body(torch.zeros(1, 3, 16, 16)).shape[1]
        return nn.Sequential(body, nn.Linear(features, 10)).eval()


def images(samples: int) -> Tensor:
    return torch.cat([centre(name, 16) for name in PHOTOGRAPHS[:samples]]).sub(0.5).div(0.25)


def walk(model: nn.Module, pictures: Tensor, noise: float = 0.0) -> Walk:
    """Walk down from the gradient of ``pictures``, with relative Gaussian ``noise`` on it."""
    labels = F.one_hot(torch.arange(len(pictures)), 10).double()
    feature = model[0](pictures)
    loss = F.cross_entropy(model[1](feature), labels.float())
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    dice = torch.Generator().manual_seed(1)
    noisy = [
        g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=dice) for g in found
    ]
    gradients = dict(zip(named, noisy, strict=True))
    example = torch.zeros_like(pictures)
    return walk_down(model, example, gradients, labels, feature.detach())


@pytest.mark.parametrize(
    "order",
    ["conv norm relu pool", "conv relu pool", "conv pool relu", "conv norm pool relu", "conv pool"],
)
def test_every_order_of_layers_gives_the_image(order: str) -> None:
    pictures = images(1)
    found = walk(network(order), pictures)
    assert not found.barriers
    assert found.image is not None
    assert float((found.image - pictures).abs().amax()) < 1e-3  # a step of 8 bits is 0.016


def test_a_batch_gives_its_images() -> None:
    pictures = images(2)
    found = walk(network("conv norm relu pool"), pictures)
    assert found.image is not None
    assert float((found.image - pictures).abs().amax()) < 1e-3


def test_the_error_of_the_image_is_what_is_said() -> None:
    pictures = images(1)
    found = walk(network("conv relu pool"), pictures).maps[-1].estimate
    ratio = (found.value - pictures).abs() / found.std
    assert 0.05 < float(ratio.median()) < 5.0


def test_delta_below_the_pool_is_that_of_autograd() -> None:
    model, pictures = network("conv relu pool"), images(1)
    found = walk(model, pictures)
    output = model[0][0](pictures)
    loss = F.cross_entropy(model[1](model[0][3](model[0][2](F.relu(output)))), torch.tensor([0]))
    (truth,) = torch.autograd.grad(loss, output)
    delta = found.delta(found.trace.operations[0].output)
    assert delta is not None
    assert torch.allclose(delta, truth.double(), atol=1e-6)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 3e-3])
def test_under_noise_the_gradient_is_met_to_the_noise(noise: float) -> None:
    pictures = images(1)
    found = walk(network("conv norm relu pool"), pictures, noise)
    assert found.image is not None
    assert found.maps[-1].residual < 2.0 * noise
    assert float((found.image - pictures).square().mean().sqrt()) < 10.0 * noise


def test_noise_is_not_taken_for_an_answer() -> None:
    found = walk(network("conv norm relu pool"), images(1), noise=0.3)
    assert found.image is None
    assert any("were not settled" in str(barrier) for barrier in found.barriers)


@pytest.mark.parametrize(
    ("order", "options", "why"),
    [
        ("conv sigmoid pool", {}, "sigmoid 1 lies between it and the convolution"),
        ("pool", {}, "there is no convolution below it"),
        ("conv relu pool", {"ceil_mode": True, "padding": 0}, "reach beyond the map"),
        ("conv relu pool", {"width": 4}, "equations for 768 unknowns below it"),
    ],
)
def test_a_pool_that_is_not_passed_says_why(order: str, options: dict[str, int], why: str) -> None:
    found = walk(network(order, **options), images(1))
    assert found.image is None
    assert why in str(found.barriers[0])


def pooled(samples: int) -> tuple[PooledConvolution, Tensor]:
    """Return a convolution under a pool with its true maxima, and what the pool reads (N, O, P)."""
    conv = network("conv relu pool")[0][0].double()
    pictures = images(samples).double()
    with torch.no_grad():
        output = conv(pictures)
        value = F.max_pool2d(F.relu(output), 3, 2, 1).flatten(2)
    stem = PooledConvolution(
        convolution=Window.of_convolution((16, 16), (5, 5), (2, 2), (2, 2), (1, 1)),
        pool=Window.of_convolution((8, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
        size=(16, 16),
        weight=conv.weight.detach().flatten(1),
        shift=conv.bias.detach(),
        gradient=conv.weight.detach().flatten(1),
        value=value,
        std=torch.full_like(value, 1e-12),
        delta=value,
        rectified=True,
    )
    return stem, output.flatten(2)


@pytest.mark.parametrize("samples", [1, 3])
def test_what_a_pool_took_is_a_candidate(samples: int) -> None:
    stem, output = pooled(samples)
    candidates = find_candidates(stem)
    seen = candidates.gather(stem.joined(output))
    largest = torch.where(candidates.allowed, seen, -torch.inf).amax(2)
    assert torch.allclose(largest[candidates.sure], candidates.value[candidates.sure])
    inside = candidates.place < output.numel() // len(output[0])
    assert candidates.allowed[candidates.sure].sum() < 0.6 * inside.sum() * len(output[0])


def test_blocks_of_the_normal_matrix_are_its_own() -> None:
    stem, output = pooled(2)
    dice = torch.Generator().manual_seed(0)
    joined = stem.joined(output)
    weight = torch.rand(joined.shape, generator=dice, dtype=torch.float64)
    rows = torch.rand(stem.outputs, 1, generator=dice, dtype=torch.float64)
    equations = Equations(stem, weight, joined, joined, rows)
    before = equations.preconditioner()
    assert isinstance(before, BlockFactors)
    factors = before.factors
    x = torch.rand(stem.zeros().shape, generator=dice, dtype=torch.float64)
    x[:, 256:] = 0.0
    first = factors[0, 0] @ (factors[0, 0].mT @ x[:, :256].flatten())
    assert torch.allclose(first, equations.normal(x)[:, :256].flatten(), rtol=1e-9)


def test_the_diagonal_stands_in_for_blocks_that_are_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stem, output = pooled(2)
    joined = stem.joined(output)
    ones = 1e8 * torch.ones_like(joined)
    equations = Equations(stem, ones, joined, joined, ones[:, :1])
    monkeypatch.setattr(maxpool_equations, "DENSE", 0)
    monkeypatch.setattr(maxpool_equations, "LARGEST_BLOCK", 0)
    before = equations.preconditioner()
    assert isinstance(before, Diagonal)
    nothing = stem.zeros()
    for place in ((0, 3), (2, 300)):
        one = nothing.clone()
        one[place] = 1.0
        assert before.diagonal[place].item() == pytest.approx(equations.normal(one)[place].item())
    found = equations.solved(nothing, before, math.inf)
    left = equations.right() - equations.normal(found)
    assert float(left.norm()) < 1e-2 * float(equations.right().norm())
    assert bool((before.spread(found) > 0.0).all())
    assert before.condition() >= 1.0


def test_a_decision_is_given_up_when_its_time_is_over() -> None:
    stem, _ = pooled(1)
    assert decide(stem, find_candidates(stem), stem.zeros(), 1e-7, ends=0.0) is None
