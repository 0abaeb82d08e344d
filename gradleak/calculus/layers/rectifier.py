"""ReLU: the slope is a mask."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Estimate, Layer, Walking, register
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
        mask = walk.mask(operation)
        known = mask if value.known is None else mask & value.known
        return Estimate(value.value, value.std, known)

    def compared(self, operation: Operation, walk: Walking) -> tuple[int, Tensor | None]:
        """Compare the input: closed units show that it is not positive, and no more."""
        return operation.inputs[0], walk.open(operation)
