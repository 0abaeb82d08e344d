"""The image fitted to the maps nearest to it that a walk recovered, rough first (§6f)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.descent import DescentOptions, Residuals, descend
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.calculus.walk import Walk
from gradleak.progress import Progress, Step

# Images of at most this side are fitted at once; larger ones first on grids of half the side.
_WHOLE, _COARSEST = 48, 14
# Share of the time left that a coarser grid may take, and the sum of squares that it is done at.
_SHARE, _COARSE_ENOUGH = 0.2, 1e-4
_MAPS = DescentOptions(steps=100, inner=30)
# Then the gradients of the weights below join in, and at last the arithmetic is that of float64.
_GRADIENTS = DescentOptions(steps=100, inner=40, damping=1e-4)
_LAST = DescentOptions(steps=8, inner=80, damping=1e-7)
# Sums of squares are done within this factor of what the errors of the maps explain.
_DONE = 16.0
# Roundings of the network's own arithmetic.
_ROUNDINGS = 16.0


@dataclass(frozen=True)
class Fitted:
    """An ``image`` (N, C, H, W), and how far it misses the maps, relative to them: ``residual``.

    ``expected`` is what the errors of the maps alone would leave, ``cuts`` name the maps, and
    ``equations`` counts the numbers that the image had to meet.
    """

    image: Tensor
    residual: float
    expected: float
    cuts: tuple[str, ...]
    equations: int
    steps: int


def fit_image(
    walk: Walk,
    start: Tensor,
    *,
    seconds: float,
    generator: torch.Generator,
    near: bool = False,
    accepted: Callable[[Tensor], bool] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit the input of the network behind a finished ``walk``, from ``start`` (N, C, H, W).

    A start that is ``near`` has its large structures right. ``seconds`` bounds the time, and an
    image that is ``accepted`` ends it. ``progress`` is called with every step. Raises
    :class:`IncompleteError` where no map below the logits was recovered.
    """
    fit = _Fit(time.monotonic() + seconds, generator, progress)
    rough = RemainingNetwork(walk, dtype=torch.float32)
    size = (start.shape[-2], start.shape[-1])
    x = start.float()
    for grid in [] if near else _grids(size):
        x = _resized(x, grid)
        options = replace(_MAPS, seconds=_SHARE * fit.left(), enough=_COARSE_ENOUGH)
        x = fit.descend(
            f"grid of {grid[0]}×{grid[1]}",
            lambda u: rough.missed_maps(_resized(u, size)),
            x,
            options,
        )
    x = _resized(x, size)
    enough = _enough(rough, torch.float32)
    x = fit.descend("maps", rough.missed_maps, x, replace(_MAPS, enough=enough), accepted)
    if not fit.done or (rough.map_equations() < x.numel() and not fit.accepted):
        # Maps with fewer values than the image has are met by many images.
        x = fit.descend("gradients", rough.missed, x, replace(_GRADIENTS, enough=enough), accepted)
    fine = RemainingNetwork(walk)
    x = x.double()
    if not fit.done:
        enough = _enough(fine, torch.float64)
        x = fit.descend("float64", fine.missed, x, replace(_LAST, enough=enough), accepted)
    left = [float(part.square().sum()) for part in fine.missed_maps(x)]
    return Fitted(
        image=x,
        residual=math.sqrt(sum(left)),
        expected=math.sqrt(fine.noise()),
        cuts=tuple(cut.name for cut in fine.cuts),
        equations=fine.equations(),
        steps=fit.steps,
    )


class _Fit:
    """One fit: its clock, its dice, and where the last descent ended."""

    def __init__(self, ends: float, generator: torch.Generator, progress: Progress | None) -> None:
        self._ends, self._generator, self._progress = ends, generator, progress
        self.done, self.accepted, self.steps = False, False, 0

    def left(self) -> float:
        """Return the seconds left."""
        return max(self._ends - time.monotonic(), 0.0)

    def descend(
        self,
        phase: str,
        residuals: Residuals,
        x: Tensor,
        options: DescentOptions,
        accepted: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        """Descend from ``x`` as long as there is time, and return where that ended."""

        def note(step: int, squares: float) -> None:
            if self._progress is not None:
                self._progress(Step(f"fit: {phase}", step, options.steps, squares))

        options = replace(options, seconds=min(options.seconds, self.left()))
        found = descend(
            residuals, x, options, generator=self._generator, progress=note, accepted=accepted
        )
        self.done, self.accepted = found.done, found.accepted
        self.steps += found.steps
        return found.x


def _grids(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the grids before the whole one, coarsest first; none for small images."""
    grids: list[tuple[int, int]] = []
    rows, columns = size
    while max(rows, columns) > _WHOLE or (grids and min(rows, columns) > _COARSEST):
        rows, columns = -(-rows // 2), -(-columns // 2)
        grids.insert(0, (rows, columns))
    return grids


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def _enough(network: RemainingNetwork, dtype: torch.dtype) -> float:
    """Return the sum of squares that errors and rounding explain."""
    rounding = (_ROUNDINGS * torch.finfo(dtype).eps) ** 2 * len(network.cuts)
    return _DONE * network.noise() + rounding
