"""Linear layers."""

from __future__ import annotations

from gradleak.calculus.layer import Affine, Walking, register
from gradleak.calculus.trace import Operation, Parameter
from gradleak.calculus.window import Window


@register("linear")
class Linear(Affine):
    """``x Wᵀ + b`` on (N, D): one window, the whole input."""

    def window(self, operation: Operation, walk: Walking) -> Window | None:
        """Return the window of a layer on (N, D)."""
        return Window.of_linear() if len(walk.shapes[operation.inputs[0]]) == 2 else None

    def weight(self, operation: Operation) -> str | None:
        """Return the weight's name."""
        weight = operation.argument(1, "weight")
        return weight.name if isinstance(weight, Parameter) else None
