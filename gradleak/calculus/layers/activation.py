"""Activations whose output tells their slope: sigmoid, tanh, leaky ReLU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradleak.activations import Activation, activation
from gradleak.calculus.layer import Estimate, Layer, Stopped, Walking, register
from gradleak.calculus.trace import Operation

# How near to its asymptote an output of a saturating activation may come.
_SATURATED = 1e-12


@register("sigmoid", "tanh", "leaky_relu")
class Invertible(Layer):
    """An activation that is one-to-one."""

    elementwise = True

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Multiply δ by the slope at the recovered output."""
        slope = self._activation(operation).slope_at_output
        if slope is None:
            raise Stopped(f"{operation.kind} with this slope is not one-to-one")
        output = walk.value(operation.output)
        return {operation.inputs[0]: delta * slope(output.value)}

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Invert the activation."""
        phi = self._activation(operation)
        out = value.value
        if operation.kind == "sigmoid":
            out = out.clamp(_SATURATED, 1.0 - _SATURATED)
            found = torch.logit(out)
        elif operation.kind == "tanh":
            out = out.clamp(_SATURATED - 1.0, 1.0 - _SATURATED)
            found = torch.atanh(out)
        elif phi.slope_at_output is not None:
            found = out / phi.slope_at_output(out)
        else:
            return None
        slope = phi.slope_at_input(found).abs().clamp(min=_SATURATED)
        return Estimate(found, value.std / slope, value.known)

    def _activation(self, operation: Operation) -> Activation:
        name = operation.kind
        if name == "leaky_relu":
            name += f":{operation.argument(1, 'negative_slope', 0.01)!r}"
        found = activation(name)
        if found is None:
            raise Stopped(f"{name} is not known")
        return found
