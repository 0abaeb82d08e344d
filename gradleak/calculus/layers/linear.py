"""Linear layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Affine, Walking, register
from gradleak.calculus.trace import Operation, Parameter
from gradleak.calculus.window import Window


@register("linear")
class Linear(Affine):
    """``x Wᵀ + b`` on (N, D): one window, the whole input."""

    def window(self, operation: Operation, walk: Walking) -> Window | None:
        """Return the window of a layer on (N, D)."""
        return Window.of_linear() if len(walk.shapes[operation.inputs[0]]) == 2 else None

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Multiply δ by the weight, without the layer's output that autograd would compute."""
        if operation.inputs[0] == 0:
            return {}  # nobody asks for that of the image
        name = self.weight(operation)
        if name is None:
            return super().delta_below(operation, delta, walk)
        return {operation.inputs[0]: delta @ walk.state[name]}

    def weight(self, operation: Operation) -> str | None:
        """Return the weight's name."""
        weight = operation.argument(1, "weight")
        return weight.name if isinstance(weight, Parameter) else None
