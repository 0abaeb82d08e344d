"""The paper's own label search, kept as a baseline (arXiv 2402.03124, §4).

One gradient row g_r stands for the feature, x = λ g_r / divisor, and one column for the ratios:

    y(λ) = softmax(W x + b) − G_m / x_m        m = the largest entry of g_r
    loss(λ) = 1000 · Var of all but the k largest y(λ),      k = 1 (smooth) or 2 (mixup)

L-BFGS walks λ from +1 and from −1; where both fail, a particle swarm searches windows further and
further from zero. The first loss below the tolerance is the answer. Rebuilt from the description of
the search, with classes and particles evaluated together. :mod:`gradleak.labels.paper` makes an
answer of what is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradleak.errors import UsageError
from gradleak.linalg import matvec

SUPPORTS = {"smooth": 1, "mixup": 2}
"""The families the method can be told, and how many entries its variance leaves out."""
_FACTOR = 1000.0
# Clerc & Kennedy's constriction: the usual inertia and pulls of a particle swarm.
_INERTIA, _PULL = 0.7298, 1.49618
# A step of L-BFGS that changes λ by less than this, relatively, stands on a plateau.
_STANDSTILL = 1e-3
# Particles times classes whose intermediate values stay in a core's cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class PaperOptions:
    """The settings of the search, with the published values as defaults.

    ``divisor`` divides the gradient row (the published code sets 1, 2 or 4 by hand); a loss below
    ``tolerance`` is an answer; a walk ends beyond ``limit`` or after ``steps`` calls of L-BFGS; a
    plateau is jumped by ``jump``, doubling. The swarm of ``particles`` takes ``rounds`` in each
    window: ``first`` and ``second``, then ``stride`` at a time on both sides up to ``reach``;
    ``stride`` and ``reach`` are (smooth, mixup).
    """

    divisor: float = 1.0
    tolerance: float = 1e-9
    learning_rate: float = 0.5
    steps: int = 100
    limit: float = 100.0
    jump: float = 0.5
    particles: int = 500
    rounds: int = 40
    first: tuple[float, float] = (0.7, 6.0)
    second: tuple[float, float] = (-6.3, -1.0)
    stride: tuple[float, float] = (20.0, 50.0)
    reach: tuple[float, float] = (70.0, 100.0)

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a divisor that is not a positive number."""
        if not (math.isfinite(self.divisor) and self.divisor > 0.0):
            raise UsageError(
                f"the paper's divisor is {self.divisor:g}", "give a positive number: 1, 2 or 4"
            )

    def windows(self, support: int) -> list[tuple[float, float]]:
        """Return the swarm's windows (low, high) in their order for a support of 1 or 2."""
        stride, reach = self.stride[support - 1], self.reach[support - 1]
        found = [self.first, self.second]
        outer, inner = self.first[1], self.second[0]
        while outer < reach or -inner < reach:
            if outer < reach:
                found.append((outer, min(outer + stride, reach)))
                outer = found[-1][1]
            if -inner < reach:
                found.append((max(inner - stride, -reach), inner))
                inner = found[-1][0]
        return found


@dataclass(frozen=True)
class RowProblem:
    """The paper's view of a head gradient: one row for the feature, one column for the ratios.

    ``row`` (D,) is g_r / divisor, ``slope`` (C,) W·row, ``bias`` (C,), ``ratio`` (C,) the column
    G_m over row_m, all float64: y(λ) = softmax(λ slope + bias) − ratio / λ.
    """

    row: Tensor
    slope: Tensor
    bias: Tensor
    ratio: Tensor

    @classmethod
    def of(
        cls, grad_weight: Tensor, weight: Tensor, bias: Tensor | None, divisor: float
    ) -> RowProblem:
        """Take the row of the largest absolute sum, and the column of its largest entry."""
        sums = matvec(grad_weight, torch.ones_like(grad_weight[0], dtype=torch.float64))
        row = grad_weight[sums.abs().argmax()].double() / divisor
        column = row.abs().argmax()
        slope = matvec(weight, row)
        return cls(
            row=row,
            slope=slope,
            bias=torch.zeros_like(slope) if bias is None else bias.double(),
            ratio=grad_weight[:, column].double() / row[column],
        )

    def labels(self, scale: Tensor) -> Tensor:
        """Return y (M, C) at the scales λ (M,)."""
        p = torch.softmax(torch.addcmul(self.bias, scale[:, None], self.slope), -1)
        return p - self.ratio / scale[:, None]

    def loss(self, scale: Tensor, support: int) -> Tensor:
        """Return the paper's loss (M,) at the scales λ (M,)."""
        chunks: tuple[Tensor, ...] = torch.split(scale, max(1, _CHUNK // len(self.slope)))
        return torch.cat([_FACTOR * _variance(self.labels(part), support) for part in chunks])

    def loss_and_slope(self, scale: Tensor, support: int) -> tuple[Tensor, Tensor]:
        """Return the loss and its derivative by λ, both (), at one λ (1,)."""
        p = torch.softmax(self.bias + scale * self.slope, -1)
        ratio = self.ratio / scale
        derivative = torch.addcmul(ratio / scale, p, self.slope - p @ self.slope)
        y = p - ratio
        count = len(y) - support
        top = y.topk(support).indices
        deviation = (y - y.scatter(0, top, 0.0).sum() / count).scatter(0, top, 0.0)
        factor = _FACTOR / (count - 1)
        return factor * (deviation @ deviation), 2.0 * factor * (deviation @ derivative)


def _variance(y: Tensor, support: int) -> Tensor:
    """Return the variance (M,) of all but the ``support`` largest entries of y (M, C).

    From sums and squares: what cancels is far below the tolerance, and the swarm is all cost.
    """
    count = y.shape[-1] - support
    top = y.topk(support, -1).values if support > 1 else y.amax(-1, keepdim=True)
    total = y.sum(-1) - top.sum(-1)
    square = torch.linalg.vecdot(y, y) - torch.linalg.vecdot(top, top)
    variance: Tensor = (square - total.square() / count) / (count - 1)
    return variance.clamp(min=0.0)


@dataclass
class Search:
    """How the search went: the lowest loss seen, and where each of the two walks ended.

    ``stage`` names what found the answer (``walk`` or ``swarm``), None without one; ``escaped``
    counts walks that left |λ| ≤ limit, where the softmax saturates and the loss vanishes.
    """

    scale: float = math.nan
    loss: float = math.inf
    stage: str | None = None
    escaped: int = 0
    windows: int = 0
    evaluations: int = field(default=0, compare=False)

    def offer(self, scale: float, loss: float) -> None:
        """Keep the scale of the lower loss."""
        if loss < self.loss:
            self.scale, self.loss = scale, loss


def search(
    problem: RowProblem, support: int, options: PaperOptions, generator: torch.Generator
) -> Search:
    """Run the two walks, then the swarm over the windows, until a loss is below the tolerance."""
    found = Search()
    for start in (1.0, -1.0):
        if _walk(problem, support, options, start, found):
            found.stage = "walk"
            return found
    for window in options.windows(support):
        found.windows += 1
        if _swarm(problem, support, options, window, generator, found):
            found.stage = "swarm"
            return found
    return found


def _walk(
    problem: RowProblem, support: int, options: PaperOptions, start: float, found: Search
) -> bool:
    """Walk λ from ``start`` by L-BFGS; a plateau is jumped away from zero, twice as far each time.

    Returns whether the loss fell below the tolerance.
    """
    scale = torch.tensor([start], dtype=torch.float64, device=problem.row.device)
    optimiser = torch.optim.LBFGS([scale], lr=options.learning_rate)
    jump = math.copysign(options.jump, start)

    def closure() -> Tensor:
        loss, slope = problem.loss_and_slope(scale, support)
        scale.grad = slope[None]
        found.evaluations += 1
        return loss

    for _ in range(options.steps):
        before = float(scale)
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        now = float(scale)
        if not math.isfinite(now) or abs(now) > options.limit or now == 0.0:
            found.escaped += 1
            return False
        loss = float(problem.loss(scale, support))
        found.offer(now, loss)
        if loss < options.tolerance:
            return True
        if abs(now - before) <= _STANDSTILL * abs(before):
            scale += jump
            jump *= 2.0
            # The curvature remembered from before the jump belongs to another place.
            optimiser = torch.optim.LBFGS([scale], lr=options.learning_rate)
    return False


def _swarm(
    problem: RowProblem,
    support: int,
    options: PaperOptions,
    window: tuple[float, float],
    generator: torch.Generator,
    found: Search,
) -> bool:
    """Let a particle swarm look for the smallest loss in one window, all particles in one call."""
    low, high = window
    for place in _rounds(problem, support, options, low, high, generator):
        found.offer(*place)
        found.evaluations += options.particles
        if found.loss < options.tolerance:
            return True
    return False


def _rounds(
    problem: RowProblem,
    support: int,
    options: PaperOptions,
    low: float,
    high: float,
    generator: torch.Generator,
) -> Iterator[tuple[float, float]]:
    """Yield the swarm's best place and its loss after each round."""
    device = problem.row.device

    def dice() -> Tensor:
        drawn = torch.rand(
            options.particles, generator=generator, dtype=torch.float64, device=generator.device
        )
        return drawn.to(device)

    place = low + (high - low) * dice()
    speed = torch.zeros_like(place)
    own, lowest = place, problem.loss(place, support)
    for _ in range(options.rounds):
        best = int(lowest.argmin())
        yield float(own[best]), float(lowest[best])
        speed = (
            _INERTIA * speed + _PULL * dice() * (own - place) + _PULL * dice() * (own[best] - place)
        )
        place = (place + speed).clamp(low, high)
        loss = problem.loss(place, support)
        own = torch.where(loss < lowest, place, own)
        lowest = torch.minimum(loss, lowest)
    best = int(lowest.argmin())
    yield float(own[best]), float(lowest[best])
