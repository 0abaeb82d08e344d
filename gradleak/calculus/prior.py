"""An image that a gradient leaves many choices of: the smoothest within its bounds.

Where a gradient has fewer equations than the image has values, or the masks of its units are not
known, a fit ends at any of many images. Two things lead it on. Pictures are smooth between edges:
total variation, made a sum of squares with weights of its own slopes (iteratively reweighted least
squares), chooses among them. And kinks are rounded at first, so that a descent sees units open and
close. Both are withdrawn step by step, and the equations have the last word (graduated
non-convexity: Blake and Zisserman, Visual Reconstruction, 1987).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.calculus.descent import DescentOptions, descend
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.progress import Progress, Step

# Roundness of the kinks, relative to the spread of what meets them, round by round: the image is
# decided early, the equations are met late.
_EARLY = tuple(0.5 * 0.8**number for number in range(15))
_LATE = tuple(0.01 * 0.4**number for number in range(10))
# Slopes below this share of the roundness count as flat, those below the second in any case.
_FLAT, _FLATTEST = 0.3, 0.01
# Weight of what leaves the bounds, beside the slopes.
_OUTSIDE = 3.0
_DAMPING, _LATE_DAMPING = 1e-3, 1e-5
_OPTIONS = DescentOptions(steps=15, inner=60)


@dataclass(frozen=True)
class Bounds:
    """The least and the most that an input may be: (1, C, 1, 1) each."""

    low: Tensor
    high: Tensor

    def exceeded(self, x: Tensor) -> Tensor:
        """Return by how much (N, C, H, W) ``x`` lies outside."""
        return (x - self.high).clamp(min=0.0) + (self.low - x).clamp(min=0.0)


def smoothest_image(
    network: RemainingNetwork,
    start: Tensor,
    bounds: Bounds,
    *,
    seconds: float,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Fit an image (N, C, H, W) to the equations of ``network``, the smoother the fewer they are.

    ``start`` need not be near; ``seconds`` bounds the time, and ``progress`` is called with every
    roundness.
    """
    ends = time.monotonic() + seconds
    image = start.double()
    share = 1.0 / math.sqrt(image.numel())
    rounds = (*_EARLY, *_LATE)
    for number, softness in enumerate(rounds):
        left = ends - time.monotonic()
        if left <= 0.0:
            break
        roots = [
            softness * share * _root_weight(slope, max(_FLAT * softness, _FLATTEST))
            for slope in slopes(image)
        ]
        outside = _OUTSIDE * softness * share

        def residuals(
            x: Tensor,
            soft: float = softness,
            roots: Sequence[Tensor] = tuple(roots),
            outside: float = outside,
        ) -> tuple[Tensor, ...]:
            smooth = (root * slope for root, slope in zip(roots, slopes(x), strict=True))
            return (*network.missed(x, soft), *smooth, outside * bounds.exceeded(x))

        damping = _DAMPING if softness in _EARLY else _LATE_DAMPING
        options = replace(_OPTIONS, damping=damping, seconds=left)
        found = descend(residuals, image, options, generator=generator)
        image = found.x
        if progress is not None:
            progress(Step("fit: smoothest image", number + 1, len(rounds), found.squares))
    return image


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbouring entries of images (N, C, H, W), along rows first."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _root_weight(slope: Tensor, flat: float) -> Tensor:
    """Return the root of 1/|slope|, of all channels together: edges lie in one place."""
    return (slope.square().sum(1, keepdim=True) + flat**2).pow(-0.25)
