"""Of all images that meet the equations, the one of least total variation within its bounds.

Where a gradient has fewer equations than the image has values, a fit ends at any of many images.
Pictures are smooth between edges: total variation, made a sum of squares with weights of its own
slopes (iteratively reweighted least squares), chooses among them. The equations keep their say, by
a weight that leaves what the prior gains of them far below what it changes in the picture.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.calculus.descent import DescentOptions, descend
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.progress import Progress, Step

_ROUNDS = 10
# Weight of the equations beside the prior's mean square, and of what leaves the bounds.
_EQUATIONS, _OUTSIDE = 1e3, 3.0
# Slopes below this count as flat: at first, its factor from round to round, and the least.
_FLAT, _SHARPER, _FLATTEST = 0.3, 0.6, 0.01
_OPTIONS = DescentOptions(steps=6, inner=150, damping=1e-4)


@dataclass(frozen=True)
class Bounds:
    """The least and the most that an input may be: (1, C, 1, 1) each."""

    low: Tensor
    high: Tensor

    def exceeded(self, x: Tensor) -> Tensor:
        """Return by how much (N, C, H, W) ``x`` lies outside."""
        return (x - self.high).clamp(min=0.0) + (self.low - x).clamp(min=0.0)


def least_variation(
    network: RemainingNetwork,
    image: Tensor,
    bounds: Bounds,
    *,
    seconds: float,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Move an ``image`` (N, C, H, W) that fits to one that fits as well and varies less."""
    ends = time.monotonic() + seconds
    share = 1.0 / math.sqrt(image.numel())
    for number in range(_ROUNDS):
        left = ends - time.monotonic()
        if left <= 0.0:
            break
        flat = max(_FLAT * _SHARPER**number, _FLATTEST)
        weights = [_root_weight(slope, flat) for slope in _slopes(image)]

        def residuals(x: Tensor, weights: list[Tensor] = weights) -> tuple[Tensor, ...]:
            return (
                *(_EQUATIONS * part for part in network.missed(x)),
                *(share * w * slope for w, slope in zip(weights, _slopes(x), strict=True)),
                _OUTSIDE * share * bounds.exceeded(x),
            )

        options = replace(_OPTIONS, seconds=left)
        found = descend(residuals, image, options, generator=generator)
        image = found.x
        if progress is not None:
            progress(Step("fit: least variation", number + 1, _ROUNDS, found.squares))
    return image


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _root_weight(slope: Tensor, flat: float) -> Tensor:
    """Return the root of 1/|slope|, of all channels together: edges lie in one place."""
    return (slope.square().sum(1, keepdim=True) + flat**2).pow(-0.25)
