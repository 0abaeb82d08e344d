"""ReLU and leaky ReLU: the slope is one of two, by a mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gradleak.calculus.layer import Estimate, Layer, Stopped, Walking, register
from gradleak.calculus.trace import Operation


@register("relu")
class Rectifier(Layer):
    """``max(x, 0)``."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Pass δ where the unit was open, as settled by the layers around it."""
        return {operation.inputs[0]: delta * walk.mask(operation)}

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the input where the unit was open; elsewhere it is only known not to be."""
        mask = walk.mask(operation) & walk.open(operation)
        known = mask if value.known is None else mask & value.known
        return Estimate(value.value, value.std, known)

    def compared(self, operation: Operation, walk: Walking) -> tuple[int, Tensor | None]:
        """Compare the input: closed units show that it is not positive, and no more."""
        return operation.inputs[0], walk.open(operation)

    def softened(self, operation: Operation, value: Tensor, width: float) -> Tensor:
        """Return the softplus of a ``value``, which is within ``width`` of what it replaces."""
        return width * softplus(value / width)

    def closed_slope(self, operation: Operation) -> float | None:
        """Return 0: a closed unit passes nothing."""
        return 0.0


@register("leaky_relu")
class LeakyRectifier(Layer):
    """``x`` above zero, ``slope · x`` below."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Multiply δ by the slope of each unit, as settled by the layers around it."""
        slope = self.closed_slope(operation)
        return {operation.inputs[0]: delta * (slope + (1.0 - slope) * walk.mask(operation))}

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Divide what is not above zero by the slope; None for a slope of zero."""
        slope = self.closed_slope(operation)
        if slope == 0.0:
            return None
        back = torch.where(value.value > 0.0, 1.0, 1.0 / slope)
        return Estimate(value.value * back, value.std * back, value.known)

    def softened(self, operation: Operation, value: Tensor, width: float) -> Tensor | None:
        """Return the same mixture of a line and a softplus."""
        slope = self.closed_slope(operation)
        return slope * value + (1.0 - slope) * width * softplus(value / width)

    def closed_slope(self, operation: Operation) -> float:
        """Return the slope below zero; raises :class:`Stopped` where the output hides the sign."""
        slope = float(operation.argument(1, "negative_slope", 0.01))
        if slope < 0.0:
            raise Stopped("leaky_relu with this slope is not one-to-one")
        return slope
