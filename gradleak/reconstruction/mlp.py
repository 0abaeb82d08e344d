"""MLPs: the image is the first Linear layer's input, and the certificate follows from the chain.

Every layer's gradient is a matrix Σ δ xᵀ, of as many terms as there are samples, so re-simulating
the gradient of finished images takes one forward pass, one backward pass of deltas, and a look at
each gradient; no gradient is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.errors import IncompleteError
from gradleak.features import LayerReader
from gradleak.linalg import matmul, outer_residual, precision, rmatmul, rmatvec
from gradleak.models.spec import LinearLayer
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.resimulate import GradientResidual, judge_residual

# Of one weight: δ (N, out) at its layer's outputs, and the layer's inputs (N, in).
_Outer = tuple[Tensor, Tensor]


def images_of_features(
    features: Tensor, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Turn the first layer's inputs (N, D) back into images (N, 3, H, W) in [0, 1], float64."""
    return denormalise(features.reshape(-1, *shape), mean, std).clamp(0.0, 1.0)


def check_mlp(
    layers: Sequence[LinearLayer],
    read: LayerReader,
    images: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> GradientResidual:
    """Re-simulate every weight gradient from the finished ``images`` (N, 3, H, W) and compare.

    ``layers`` are all Linear layers in forward order, the first reading the normalised images;
    ``labels`` are (N, C). The same certificate as ``check_reconstruction``, which this equals for
    an MLP, without building the network or forming a gradient. Raises :class:`IncompleteError`
    where the chain has an unknown activation or a missing tensor.
    """
    first = _present(read.gradient(layers[0].name), f"gradient of {layers[0].name}")
    exact = _simulate(layers, read, images.double(), labels, mean, std)
    rounded = _simulate(layers, read, images.to(first.dtype), labels, mean, std)
    sizes = {name: _size(outer) for name, outer in exact.items()}
    rounding = {name: _outer_difference(exact[name], rounded[name]) for name in exact}
    size = math.hypot(*sizes.values())
    if size == 0.0:
        raise IncompleteError(
            "the gradient of the finished image is exactly zero", "recover the features again"
        )
    unit = precision(first.dtype)
    own = math.hypot(*rounding.values()) / size + unit
    each = {name: rounding[name] / sizes[name] + unit for name in sizes if sizes[name] > 0}
    judged = []
    # Ties at a kink fall as they fell at capture only in the same arithmetic: the nearer counts.
    for simulated in (exact, rounded):
        left = _compare(layers, read, simulated)
        relative = math.hypot(*(left[name] * sizes[name] for name in sizes)) / size
        judged.append(judge_residual(relative, left, own, first.dtype, each=each))
        if judged[-1].exact:
            break
    return min(judged, key=lambda found: (not found.exact, found.relative))


def _compare(
    layers: Sequence[LinearLayer], read: LayerReader, simulated: Mapping[str, _Outer]
) -> dict[str, float]:
    """Return ‖G − Σ δ xᵀ‖ / ‖G‖ of every weight."""
    left = {}
    for layer in layers:
        gradient = _present(read.gradient(layer.name), f"gradient of {layer.name}")
        delta, x = simulated[f"{layer.name}.weight"]
        one = len(x) == 1
        left[f"{layer.name}.weight"] = outer_residual(
            gradient, delta[0] if one else delta.mT, x[0] if one else x
        )
    return left


def _simulate(
    layers: Sequence[LinearLayer],
    read: LayerReader,
    images: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, _Outer]:
    """Return (δ, x) of every weight, computed in the dtype of ``images``, as float64."""
    x = normalise(images, mean, std).flatten(1)
    inputs, pre = [], []
    for layer in layers:
        weight = _present(read.parameter(layer.name), f"weight of {layer.name}")
        bias = read.parameter(layer.name, "bias")
        inputs.append(x)
        z = _times(weight, x)
        z = z if bias is None else z + bias.to(z.dtype)
        pre.append(z)
        if layer is layers[-1]:
            break
        phi = activation(layer.activation)
        if phi is None:
            raise IncompleteError(
                f"the activation after {layer.name} is not known", "record it in the metadata"
            )
        x = phi.apply(z)
    delta = (torch.softmax(pre[-1], 1) - labels.to(pre[-1].dtype)) / len(labels)
    found = {f"{layers[-1].name}.weight": (delta.double(), inputs[-1].double())}
    for upper, layer, z, x in zip(
        layers[:0:-1], layers[-2::-1], pre[-2::-1], inputs[-2::-1], strict=True
    ):
        weight = _present(read.parameter(upper.name), f"weight of {upper.name}")
        phi = activation(layer.activation)
        assert phi is not None  # the forward pass has been through it
        delta = _transposed_times(weight, delta) * phi.slope_at_input(z)
        found[f"{layer.name}.weight"] = (delta.double(), x.double())
    return found


def _present(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise IncompleteError(f"the bundle holds no {what}", "capture it, or give --weights FILE")
    return tensor


def _times(weight: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return matmul(weight, x.mT).mT
    weight = weight.to(x.dtype)
    return (weight @ x[0])[None] if len(x) == 1 else x @ weight.mT


def _transposed_times(weight: Tensor, delta: Tensor) -> Tensor:
    if delta.dtype != torch.float64:
        return delta @ weight.to(delta.dtype)
    return rmatvec(weight, delta[0])[None] if len(delta) == 1 else rmatmul(weight, delta)


def _size(outer: _Outer) -> float:
    """Return ‖Σ δ xᵀ‖ without forming it."""
    delta, x = outer
    return math.sqrt(max(float(((delta @ delta.mT) * (x @ x.mT)).sum()), 0.0))


def _outer_difference(one: _Outer, other: _Outer) -> float:
    """Return ‖Σ δ xᵀ − Σ δ' x'ᵀ‖ without forming either, and without cancellation."""
    (d, x), (e, y) = one, other
    dd, xx = d - e, x - y
    # δ xᵀ − δ' x'ᵀ = (δ − δ') xᵀ + δ' (x − x')ᵀ
    square = (dd @ dd.mT) * (x @ x.mT) + (e @ e.mT) * (xx @ xx.mT) + 2.0 * (dd @ e.mT) * (x @ xx.mT)
    return math.sqrt(max(float(square.sum()), 0.0))
