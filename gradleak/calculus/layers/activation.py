"""Activations whose output tells their slope: sigmoid and tanh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.calculus.layer import Estimate, Layer, Stopped, Walking, register
from gradleak.calculus.trace import Operation

# How near to its asymptote an output of a saturating activation may come.
_SATURATED = 1e-12


@register("sigmoid", "tanh")
class Invertible(Layer):
    """An activation that is one-to-one and smooth."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Multiply δ by the slope at the recovered output."""
        phi, output = activation(operation.kind), walk.value(operation.output)
        if phi is None or phi.slope_at_output is None:
            raise Stopped(f"the slope of {operation.kind} is not known")
        if output.known is not None and bool((delta[~output.known] != 0.0).any()):
            raise Stopped("its output is known in parts")
        return {operation.inputs[0]: delta * phi.slope_at_output(output.value)}

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Invert the activation."""
        phi = activation(operation.kind)
        if phi is None:
            return None
        if operation.kind == "sigmoid":
            found = torch.logit(value.value.clamp(_SATURATED, 1.0 - _SATURATED))
        else:
            found = torch.atanh(value.value.clamp(_SATURATED - 1.0, 1.0 - _SATURATED))
        slope = phi.slope_at_input(found).abs().clamp(min=_SATURATED)
        return Estimate(found, value.std / slope, value.known)
