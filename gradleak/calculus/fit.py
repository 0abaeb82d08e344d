"""The image fitted to the maps nearest to it that a walk recovered, smooth first (§6f)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.calculus.annealing import annealed
from gradleak.calculus.descent import DescentOptions, Residuals, descend
from gradleak.calculus.prior import Bounds
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.calculus.walk import Walk
from gradleak.progress import Progress, Step

# Share of the time that an image may be kept smooth, from a start that is far away.
_SHARE = 0.7
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
    ``equations`` counts the numbers that the image had to meet. ``smoother`` are images that miss
    the maps by more, and may be nearer where the maps are noisy or few. The maps are ``met`` where
    their errors explain what the image misses, and they have as many values as it has.
    """

    image: Tensor
    residual: float
    expected: float
    cuts: tuple[str, ...]
    equations: int
    steps: int
    met: bool = False
    smoother: tuple[Tensor, ...] = ()


def fit_image(
    walk: Walk,
    start: Tensor,
    *,
    seconds: float,
    generator: torch.Generator,
    bounds: Bounds | None = None,
    near: bool = False,
    accepted: Callable[[Tensor], bool] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit the input of the network behind a finished ``walk``, from ``start`` (N, C, H, W).

    A start that is ``near`` has its large structures right; ``bounds`` are those of the image.
    ``seconds`` bounds the time, and an image that is ``accepted`` ends it. ``progress`` is called
    with every step. Raises :class:`IncompleteError` where no map below the logits was recovered.
    """
    fit = _Fit(time.monotonic() + seconds, generator, progress)
    rough = RemainingNetwork(walk, dtype=torch.float32)
    x, enough = start.float(), _enough(rough, torch.float32)
    if not near:
        x = fit.anneal(rough, x, bounds, enough, accepted)
    if not fit.done:
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
        met=fit.done and fine.map_equations() >= x.numel(),
        smoother=() if fit.done else tuple(image.double() for image in fit.smoother),
    )


class _Fit:
    """One fit: its clock, its dice, and where the last descent ended."""

    def __init__(self, ends: float, generator: torch.Generator, progress: Progress | None) -> None:
        self._ends, self._generator, self._progress = ends, generator, progress
        self.done, self.accepted, self.steps = False, False, 0
        self.smoother: tuple[Tensor, ...] = ()

    def left(self) -> float:
        """Return the seconds left."""
        return max(self._ends - time.monotonic(), 0.0)

    def anneal(
        self,
        network: RemainingNetwork,
        x: Tensor,
        bounds: Bounds | None,
        enough: float,
        accepted: Callable[[Tensor], bool] | None,
    ) -> Tensor:
        """Go from ``x``, far away, to where smooth images lead, in a share of the time left.

        Smoothness is withdrawn whole, also from an image that misses no more than ``enough``.
        """

        def note(step: int, squares: float) -> None:
            if self._progress is not None:
                self._progress(Step("fit: smooth first", step, None, squares))

        found = annealed(
            network.missed_maps,
            x,
            bounds,
            seconds=_SHARE * self.left(),
            enough=min(enough, network.noise()),
            accepted=accepted,
            progress=note,
        )
        self.done = found.accepted or found.squares <= enough
        self.accepted, self.smoother = found.accepted, found.smoother
        self.steps += found.steps
        return found.x

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


def _enough(network: RemainingNetwork, dtype: torch.dtype) -> float:
    """Return the sum of squares that errors and rounding explain."""
    rounding = (_ROUNDINGS * torch.finfo(dtype).eps) ** 2 * len(network.cuts)
    return _DONE * network.noise() + rounding
