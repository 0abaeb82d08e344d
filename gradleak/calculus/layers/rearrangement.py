"""What moves or keeps entries as they are: views, residual addition, dropout in eval mode."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Affine, Estimate, Stopped, Walking, register
from gradleak.calculus.trace import Operation


@register("view")
class View(Affine):
    """Another shape for the same entries in the same order, as ``flatten`` gives it."""

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the entries in the shape that they had."""
        return value.reshaped(walk.shapes[operation.inputs[0]])


@register("add")
class Addition(Affine):
    """A sum of two maps, or of a map and a constant."""

    elementwise = True


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
