"""BatchNorm with running statistics: an affine map of each channel."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradleak.calculus.layer import Affine, Estimate, Stopped, Walking, register, unscaled
from gradleak.calculus.trace import Operation


@register("batch_norm")
class BatchNorm(Affine):
    """BatchNorm in eval mode."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Scale δ channel by channel; statistics of the batch itself would mix the samples."""
        if operation.argument(5, "training", False):
            raise Stopped(
                "it normalises by the statistics of the batch itself, which the gradient of a step "
                "does not hold"
            )
        return super().delta_below(operation, delta, walk)

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Undo the scale and shift; with statistics of the batch itself they are not known."""
        if operation.argument(5, "training", False):
            return None
        return unscaled(operation, value, walk)
