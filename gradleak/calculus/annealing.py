"""An image for the maps of a walk from far away: smooth first, by quasi-Newton steps (§6f).

Between an image and the maps that a walk recovered lie kinks by the thousand. Gauss–Newton steps
from far away are short there, each good for one set of open units, and dear. Steps of L-BFGS cost
one pass forward and back, and a hundred of them go further. Total variation keeps the image smooth
as long as its large structures are not decided, and is withdrawn step by step; without noise the
maps alone have the last word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.descent import Residuals
from gradleak.calculus.prior import Bounds, slopes

# Weights of total variation a pixel, beside what is missed of the maps relative to them.
_WEIGHTS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0)
# From a smaller weight on, the large structures of an image are decided.
_DECIDED = 0.1
# A slope below this counts as flat.
_FLAT = 0.02
# Steps between two looks at the gain, and the gain below which a weight has had its turn; what is
# met without smoothness is worth more patience.
_STEPS, _GAIN, _LAST_GAIN = 20, 0.02, 0.003
_HISTORY = 20


@dataclass(frozen=True)
class Annealed:
    """Where the annealing ended: the image ``x``, the sum of ``squares`` missed, and ``steps``.

    ``smoother`` are the images before, from when their large structures were decided.
    """

    x: Tensor
    squares: float
    steps: int
    accepted: bool
    smoother: tuple[Tensor, ...]


def annealed(
    residuals: Residuals,
    start: Tensor,
    bounds: Bounds | None,
    *,
    seconds: float,
    enough: float = 0.0,
    accepted: Callable[[Tensor], bool] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Annealed:
    """Minimise the sum of squares of ``residuals`` over images like ``start`` (N, C, H, W).

    Ends when the squares are ``enough``, an image is ``accepted``, or ``seconds`` are over.
    ``bounds`` are those of the image, which it may leave a little. ``progress`` is called with the
    number of steps and the sum of squares.
    """
    ends = time.monotonic() + seconds
    x, steps, squares, taken = start.detach().contiguous().clone(), 0, math.inf, False
    smoother: list[Tensor] = []
    for weight in _WEIGHTS:
        if weight < _DECIDED and squares > enough and not taken and time.monotonic() < ends:
            smoother.append(x)
        descent = _Descent(residuals, x, bounds, weight)
        before = math.inf
        while squares > enough and not taken and time.monotonic() < ends:
            value, squares = descent.step()
            x, steps = descent.x, steps + _STEPS
            if progress is not None:
                progress(steps, squares)
            taken = accepted is not None and accepted(x)
            if not value < (1.0 - (_GAIN if weight else _LAST_GAIN)) * before:
                break
            before = value
    return Annealed(x, squares, steps, taken, tuple(smoother))


class _Descent:
    """L-BFGS on what an image misses and a ``weight`` times its roughness."""

    def __init__(
        self, residuals: Residuals, x: Tensor, bounds: Bounds | None, weight: float
    ) -> None:
        self._residuals, self._bounds, self._weight = residuals, bounds, weight
        self._x = x.clone().requires_grad_()
        self._missed = math.inf
        self._optimiser = torch.optim.LBFGS(
            [self._x],
            max_iter=_STEPS,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_change=0.0,
            tolerance_grad=0.0,
        )

    @property
    def x(self) -> Tensor:
        """The image."""
        return self._x.detach()

    def step(self) -> tuple[float, float]:
        """Go some steps; return the objective before them, and the squares missed at the last."""
        value = self._optimiser.step(self._objective)  # type: ignore[no-untyped-call]
        return float(value.detach()), self._missed

    def _objective(self) -> Tensor:
        self._optimiser.zero_grad()
        missed = torch.stack([part.square().sum() for part in self._residuals(self._x)]).sum()
        self._missed = float(missed.detach())
        whole: Tensor = missed
        if self._weight:
            whole = whole + self._weight * _roughness(self._x, self._bounds)
        whole.backward()  # type: ignore[no-untyped-call]
        return whole


def _roughness(x: Tensor, bounds: Bounds | None) -> Tensor:
    """Return the total variation a pixel, of all channels together: edges lie in one place."""
    across, along = slopes(x)
    both = across[..., :-1, :].square().sum(1) + along[..., :-1].square().sum(1)
    total = (both + _FLAT**2).sqrt().sum()
    if bounds is not None:
        total = total + bounds.exceeded(x).square().sum()
    rough: Tensor = total / x[:, 0].numel()
    return rough
