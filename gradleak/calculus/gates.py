"""What a recovered map tells of the units of the rectifier that put it out (§6d).

A map comes with errors, and units near zero may have been open or closed. How likely either is
follows from the map itself: closed units show its errors, and how many open ones lie near zero is
seen a little further up. The answer is the logarithm of the odds; the layer below decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.solve import LayerEquations
from gradleak.calculus.window import Window

# The largest of the errors of closed units is that many standard deviations.
_LARGEST = 4.0
# Between these two, in standard deviations, there are open units and no closed ones.
_FROM, _TO = 5.0, 20.0
# The density at zero of a normal distribution.
_AT_ZERO = 1.0 / math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class Gate:
    """What is known of the units of a rectifier: ``odds`` (N, O, P), ln of open against closed."""

    odds: Tensor

    @property
    def mask(self) -> Tensor:
        """Which units (N, O, P) are likelier to have been open."""
        return self.odds > 0.0


def read_gate(value: Tensor, std: Tensor) -> Gate:
    """Read the gate off the recovered output (N, O, P) of a ReLU, with its errors ``std``.

    What the map has of negative entries is error, and says how much larger that is than ``std``.
    """
    ratio = value / std
    ratio = ratio / max(1.0, float((-ratio).amax()) / _LARGEST)
    # Of closed units' errors half are negative, and some have none: zero comes out as just that.
    closed = max(int((ratio <= 0.0).sum()) + int((ratio < 0.0).sum()), 1)
    near = float(((ratio > _FROM) & (ratio < _TO)).sum()) / (_TO - _FROM)
    opened = ratio[ratio > 0.0]
    spread = float(opened.square().mean().sqrt()) if len(opened) else 1.0
    density = max(near, _AT_ZERO * len(opened) / max(spread, 1.0), 1.0 / value.numel())
    return Gate(
        torch.special.log_ndtr(ratio)
        + 0.5 * ratio.square()
        + math.log(density / (_AT_ZERO * closed))
    )


def read_sign(value: Tensor, std: Tensor) -> Gate:
    """Read the gate off an output (N, O, P) that is below zero where the unit was closed."""
    ratio = value / std
    return Gate(torch.special.log_ndtr(ratio) - torch.special.log_ndtr(-ratio))


@dataclass(frozen=True)
class GatedLayer:
    """A layer under a gate: its delta is ``coefficient`` (N, O, P) where the gate is open.

    Where it is closed, its delta is ``closed`` times that: 0 under a ReLU.
    """

    window: Window
    coefficient: Tensor
    gradient: Tensor
    closed: float = 0.0

    def equations(self, mask: Tensor) -> LayerEquations:
        """Return the layer's equations for one ``mask`` (N, O, P)."""
        slope = self.closed + (1.0 - self.closed) * mask
        return LayerEquations(self.window, self.coefficient * slope, self.gradient)

    @property
    def step(self) -> Tensor:
        """What opening a unit adds to its delta (N, O, P)."""
        return (1.0 - self.closed) * self.coefficient
