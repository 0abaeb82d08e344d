"""Views, arithmetic between maps and with constants, dropout in eval mode."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Affine, Estimate, Stopped, Walking, register, unscaled
from gradleak.calculus.trace import Operation, Place

_PRODUCTS = ("mul", "div")


@register("view")
class View(Affine):
    """Another shape for the same entries in the same order, as ``flatten`` gives it."""

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the entries in the shape that they had."""
        return value.reshaped(walk.shapes[operation.inputs[0]])


@register("add", "sub", "rsub", "neg", "mul", "div")
class Arithmetic(Affine):
    """Sums and differences of maps, and of a map and a constant; products with a constant."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Apply the transposed map, unless maps are multiplied or divided by."""
        if operation.kind in _PRODUCTS and not _by_constant(operation):
            raise Stopped(f"no delta passes a {operation.kind} by what depends on the image")
        return super().delta_below(operation, delta, walk)

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Undo what a constant does to a map."""
        if len(operation.inputs) > 1 or not _by_constant(operation):
            return None
        return unscaled(operation, value, walk)


def _by_constant(operation: Operation) -> bool:
    """Return whether one map alone takes part, and is not what is divided by."""
    given = (*operation.arguments, *operation.keywords.values())
    maps = sum(isinstance(value, Place) for value in given)
    return maps == 1 and (
        operation.kind != "div" or isinstance(operation.argument(0, "input"), Place)
    )


@register("dropout", "identity")
class Identity(Affine):
    """Nothing: dropout in eval mode."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Pass δ on, unless entries were dropped at random."""
        if operation.argument(2, "training", False):
            raise Stopped("it drops entries at random")
        return {operation.inputs[0]: delta}

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the value itself."""
        return value
