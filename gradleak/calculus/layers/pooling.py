"""Average pooling of every kind: affine, and not invertible but for single places."""

from __future__ import annotations

import math

from gradleak.calculus.layer import Affine, Estimate, Walking, register
from gradleak.calculus.trace import Operation


@register("mean", "adaptive_avg_pool2d", "avg_pool2d")
class AveragePool(Affine):
    """Means over places of a map."""

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the input where each mean is that of one place."""
        shape = walk.shapes[operation.inputs[0]]
        return value.reshaped(shape) if math.prod(shape) == value.value.numel() else None
