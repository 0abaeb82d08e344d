"""Two-dimensional convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Affine, Walking, register
from gradleak.calculus.trace import Operation, Parameter
from gradleak.calculus.window import Window


@register("conv2d")
class Convolution(Affine):
    """A convolution over maps (N, C, H, W), not in groups."""

    def window(self, operation: Operation, walk: Walking) -> Window | None:
        """Return the windows over the input, None for a convolution in groups."""
        return self.places(operation, walk.shapes, walk.state)

    def places(
        self,
        operation: Operation,
        shapes: Mapping[int, tuple[int, ...]],
        state: Mapping[str, Tensor],
    ) -> Window | None:
        """Return the same without a walk: ``shapes`` of the tensors, ``state`` of the network."""
        shape, weight = shapes[operation.inputs[0]], self.weight(operation)
        if weight is None or len(shape) != 4 or operation.argument(6, "groups", 1) != 1:
            return None
        height, width = state[weight].shape[2:]
        stride = pair(operation.argument(3, "stride", 1))
        dilation = pair(operation.argument(5, "dilation", 1))
        padding = operation.argument(4, "padding", 0)
        if padding == "same":
            across = dilation[0] * (height - 1), dilation[1] * (width - 1)
            if across[0] % 2 or across[1] % 2:
                return None
            padding = across[0] // 2, across[1] // 2
        pads = pair(0 if padding == "valid" else padding)
        size, kernel = (shape[2], shape[3]), (height, width)
        return Window.of_convolution(size, kernel, stride, pads, dilation)

    def weight(self, operation: Operation) -> str | None:
        """Return the weight's name."""
        weight = operation.argument(1, "weight")
        return weight.name if isinstance(weight, Parameter) else None


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return an argument that is one number for both directions, or one for each, as two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
