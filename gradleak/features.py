"""The inputs of the Linear layers, peeled from the head downwards for one sample (ALGORITHMS §5).

With δ at a layer's output known, G = δ xᵀ gives the layer's input x = Gᵀδ / ‖δ‖² in one product;
the chain rule then gives the delta of the layer below: (Wᵀδ) ⊙ φ'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.errors import IncompleteError
from gradleak.labels.factorise import leading_triple
from gradleak.linalg import matvec, outer_residual, rmatvec
from gradleak.models.spec import LinearLayer

_STARTS = 8
_STEPS = 40


@dataclass(frozen=True)
class LayerTensors:
    """What a bundle holds of one Linear layer; None where it holds nothing.

    ``weight`` and ``grad_weight`` (out, in), ``bias`` and ``grad_bias`` (out,).
    """

    weight: Tensor | None
    grad_weight: Tensor | None
    bias: Tensor | None = None
    grad_bias: Tensor | None = None


@dataclass(frozen=True)
class PeeledLayer:
    """The input ``feature`` (in,) float64 of one Linear layer.

    ``residual`` is ‖G − δ xᵀ‖ / ‖G‖ of that layer's own gradient: it needs no ground truth.
    """

    name: str
    feature: Tensor
    residual: float


@dataclass(frozen=True)
class Peeling:
    """Every layer reached, from the head downwards, and why the peeling ``stopped``, if early."""

    layers: tuple[PeeledLayer, ...]
    stopped: str | None


def peel_linear_layers(
    layers: Sequence[LinearLayer],
    read: Callable[[str], LayerTensors],
    feature: Tensor,
    delta: Tensor,
    progress: Callable[[str], None] | None = None,
) -> Peeling:
    """Recover the inputs of all Linear layers from the head's.

    ``layers`` in forward order end with the head; ``read`` fetches a layer's tensors; ``feature``
    (D,) and ``delta`` (C,) are the head's input and output delta in float64. Stops, and says so, at
    an unknown activation, a missing gradient or weight, or a vanished delta.
    """
    head = read(layers[-1].name)
    if head.grad_weight is None:
        raise IncompleteError("the head's gradient is missing", "capture it")
    peeled = [
        PeeledLayer(layers[-1].name, feature, outer_residual(head.grad_weight, delta, feature))
    ]
    upper = head
    for layer in reversed(layers[:-1]):
        if progress is not None:
            progress(layer.name)
        tensors = read(layer.name)
        if tensors.grad_weight is None:
            return Peeling(tuple(peeled), f"no gradient of {layer.name}")
        if upper.weight is None:
            return Peeling(tuple(peeled), f"no weight of the layer above {layer.name}")
        slope = _slope(layer.activation, feature, tensors)
        if isinstance(slope, str):
            return Peeling(tuple(peeled), f"{layer.name}: {slope}")
        delta = rmatvec(upper.weight, delta) * slope
        if tensors.grad_bias is not None:  # the delta itself, without the layers above
            delta = tensors.grad_bias.double()
        square = delta.square().sum()
        if not float(square) > 0.0:
            return Peeling(tuple(peeled), f"{layer.name}: no delta passes its activation")
        feature = rmatvec(tensors.grad_weight, delta) / square
        residual = outer_residual(tensors.grad_weight, delta, feature)
        peeled.append(PeeledLayer(layer.name, feature, residual))
        upper = tensors
    return Peeling(tuple(peeled), None)


def _slope(name: str | None, output: Tensor, below: LayerTensors) -> Tensor | str:
    """Return φ' at the pre-activation whose activation is ``output``, or why it is not known."""
    phi = activation(name)
    if phi is None:
        return f"the activation after it ({name or 'not recorded'}) is not known"
    if phi.slope_at_output is not None:
        return phi.slope_at_output(output)
    if below.weight is None or below.grad_weight is None:
        return f"{name} needs the layer's weight to be inverted"
    # φ is not invertible pointwise, but the layer's input is known up to its scale (§5).
    direction = matvec(below.weight, leading_triple(below.grad_weight[None]).v[0])
    offset = torch.zeros_like(direction) if below.bias is None else below.bias.double()
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
