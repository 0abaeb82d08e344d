"""The inputs of the Linear layers, peeled from the head downwards for one sample (ALGORITHMS §5).

With δ at a layer's output known, G = δ xᵀ gives the layer's input x = Gᵀδ / ‖δ‖² in one product;
the chain rule then gives the delta of the layer below: (Wᵀδ) ⊙ φ'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.errors import IncompleteError
from gradleak.labels.factorise import leading_triple
from gradleak.linalg import matvec, outer_residual, rank_one_fit, rmatvec
from gradleak.models.spec import LinearLayer

_STARTS = 8
_STEPS = 40
# A layer's output may miss the recovered input of the layer above by this much, relative.
_CONSISTENT = 1e-2


class LayerReader(Protocol):
    """Reads the tensors of Linear layers; what is not read is not paid for."""

    def gradient(self, layer: str, kind: str = "weight") -> Tensor | None:
        """Return the gradient of the layer's ``weight`` (out, in) or ``bias`` (out,), or None."""

    def parameter(self, layer: str, kind: str = "weight") -> Tensor | None:
        """Return the layer's ``weight`` or ``bias``, or None where it is not known."""


@dataclass(frozen=True)
class PeeledLayer:
    """The inputs ``features`` (N, in) float64 of one Linear layer, one of each sample.

    ``residual`` is ‖G − (1/N) Σ δ xᵀ‖ / ‖G‖ of that layer's own gradient, which needs nobody's
    answer.
    """

    name: str
    features: Tensor
    residual: float


@dataclass(frozen=True)
class Peeling:
    """Every layer reached, from the head downwards, and why the peeling ``stopped``, if early."""

    layers: tuple[PeeledLayer, ...]
    stopped: str | None


def peel_linear_layers(
    layers: Sequence[LinearLayer],
    read: LayerReader,
    feature: Tensor,
    delta: Tensor,
    progress: Callable[[str], None] | None = None,
) -> Peeling:
    """Recover the inputs of all Linear layers from the head's.

    ``layers`` in forward order end with the head; ``read`` fetches their tensors; ``feature``
    (D,) and ``delta`` (C,) are the head's input and output delta in float64. Stops, and says so, at
    an unknown activation, a missing gradient or weight, a vanished delta, or where a layer's output
    is not what the layer above was found to read.
    """
    gradient = read.gradient(layers[-1].name)
    if gradient is None:
        raise IncompleteError("the head's gradient is missing", "capture it")
    residual = outer_residual(gradient, delta, feature)
    peeled = [PeeledLayer(layers[-1].name, feature[None], residual)]
    for upper, layer in zip(layers[:0:-1], layers[-2::-1], strict=True):
        if progress is not None:
            progress(layer.name)
        found = _delta_below(upper.name, layer, read, feature, delta)
        gradient = read.gradient(layer.name)
        if isinstance(found, str) or gradient is None:
            why = found if isinstance(found, str) else "no gradient of it"
            return Peeling(tuple(peeled), f"{layer.name}: {why}")
        delta = found
        if not float(delta.square().sum()) > 0.0:
            return Peeling(tuple(peeled), f"{layer.name}: no delta passes its activation")
        below, residual = rank_one_fit(gradient, delta)
        forward = _forward_error(layer, read, below, feature)
        if not forward <= _CONSISTENT:
            why = f"its output, computed from its input, misses the layer above by {forward:.1%}"
            return Peeling(tuple(peeled), f"{layer.name}: {why}")
        feature = below
        peeled.append(PeeledLayer(layer.name, feature[None], residual))
    return Peeling(tuple(peeled), None)


def _forward_error(layer: LinearLayer, read: LayerReader, below: Tensor, output: Tensor) -> float:
    """Return ‖φ(W x + b) − output‖ / ‖output‖, 0 where weight or activation is not known.

    The way down and the way up use different equations: dropout, a wrong activation or foreign
    weights show here.
    """
    phi, weight = activation(layer.activation), read.parameter(layer.name)
    if phi is None or weight is None:
        return 0.0
    bias = read.parameter(layer.name, "bias")
    z = (weight @ below.to(weight.dtype)).double()
    z = z if bias is None else z + bias.double()
    return float((phi.apply(z) - output).norm() / output.norm().clamp(min=1e-300))


def _delta_below(
    upper: str, layer: LinearLayer, read: LayerReader, output: Tensor, delta: Tensor
) -> Tensor | str:
    """Return the delta (out,) at the layer's own output, or why it cannot be had.

    ``output`` and ``delta`` are the input of the Linear layer ``upper`` above and the delta at its
    output. A bias gradient is the delta itself, without the layers above.
    """
    given = read.gradient(layer.name, "bias")
    if given is not None:
        return given.double()
    weight = read.parameter(upper)
    if weight is None:
        return "no weight of the layer above it"
    slope = _slope(layer, read, output)
    return slope if isinstance(slope, str) else rmatvec(weight, delta) * slope


def _slope(layer: LinearLayer, read: LayerReader, output: Tensor) -> Tensor | str:
    """Return φ' at the pre-activation whose activation is ``output``, or why it is not known."""
    phi = activation(layer.activation)
    if phi is None:
        return f"the activation after it ({layer.activation or 'not recorded'}) is not known"
    if phi.slope_at_output is not None:
        return phi.slope_at_output(output)
    weight, gradient = read.parameter(layer.name), read.gradient(layer.name)
    if weight is None or gradient is None:
        return f"{layer.activation} needs the layer's weight and gradient to be inverted"
    # φ is not invertible pointwise, but the layer's input is known up to its scale (§5).
    direction = matvec(weight, leading_triple(gradient[None]).v[0])
    bias = read.parameter(layer.name, "bias")
    offset = torch.zeros_like(direction) if bias is None else bias.double()
    scale = _scale_through(phi.apply, phi.slope_at_input, direction, offset, output)
    return phi.slope_at_input(scale * direction + offset)


def _scale_through(
    phi: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    direction: Tensor,
    offset: Tensor,
    output: Tensor,
) -> Tensor:
    """Solve φ(t a + b) = x for the one scale t by least squares from a grid of both signs."""
    size = output.norm() / direction.norm()
    grid = size * torch.logspace(-2, 3, 400, dtype=torch.float64, device=output.device)
    grid = torch.cat([grid, -grid])

    def misfit(t: Tensor) -> Tensor:
        return (phi(t[:, None] * direction + offset) - output).square().sum(1)

    t = grid[misfit(grid).topk(_STARTS, largest=False).indices]
    now = misfit(t)
    damping = torch.full_like(t, 1e-3)
    for _ in range(_STEPS):
        z = t[:, None] * direction + offset
        jacobian = slope(z) * direction
        curvature = jacobian.square().sum(1).clamp(min=1e-300) * (1.0 + damping)
        trial = t - (jacobian * (phi(z) - output)).sum(1) / curvature
        value = misfit(trial)
        better = value < now
        t, now = torch.where(better, trial, t), torch.where(better, value, now)
        damping = torch.where(better, damping * 0.1, damping * 10.0).clamp(1e-12, 1e12)
    return t[now.argmin()]
