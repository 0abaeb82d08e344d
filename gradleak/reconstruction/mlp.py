"""MLPs: the image is the first Linear layer's input, and the certificate follows from the chain.

Every layer's gradient of one sample is a rank-one matrix δ xᵀ, so re-simulating the gradient of a
finished image takes one forward pass, one backward pass of deltas, and a look at each gradient;
no gradient is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.errors import IncompleteError
from gradleak.features import LayerReader
from gradleak.linalg import matvec, outer_residual, precision, rmatvec
from gradleak.models.spec import LinearLayer
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.resimulate import GradientResidual, judge_residual


def image_of_feature(
    feature: Tensor, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Turn the first layer's input (D,) back into an image (1, 3, H, W) in [0, 1], float32."""
    pixels = denormalise(feature.reshape(1, *shape), mean, std)
    return pixels.clamp(0.0, 1.0).float()


def check_mlp(
    layers: Sequence[LinearLayer],
    read: LayerReader,
    image: Tensor,
    label: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> GradientResidual:
    """Re-simulate every weight gradient from the finished ``image`` (1, 3, H, W) and compare.

    ``layers`` are all Linear layers in forward order, the first reading the normalised image;
    ``label`` is (C,). The same certificate as ``check_reconstruction``, which this equals for an
    MLP of one sample, without building the network or forming a gradient. Raises
    :class:`IncompleteError` where the chain has an unknown activation or a missing tensor.
    """
    first = _present(read.gradient(layers[0].name), f"gradient of {layers[0].name}")
    exact = _simulate(layers, read, image.double(), label, mean, std)
    rounded = _simulate(layers, read, image.to(first.dtype), label, mean, std)
    per_tensor, norms, rounding = {}, {}, {}
    for layer in layers:
        gradient = _present(read.gradient(layer.name), f"gradient of {layer.name}")
        name = f"{layer.name}.weight"
        delta, x = exact[layer.name]
        per_tensor[name] = outer_residual(gradient, delta, x)
        norms[name] = float(delta.norm() * x.norm())
        rounding[name] = _outer_difference(exact[layer.name], rounded[layer.name])
    size = _root_sum_square(norms)
    if size == 0.0:
        raise IncompleteError(
            "the gradient of the finished image is exactly zero", "recover the features again"
        )
    relative = _root_sum_square({n: per_tensor[n] * norms[n] for n in norms}) / size
    own = _root_sum_square(rounding) / size + precision(first.dtype)
    each = {n: rounding[n] / norms[n] + precision(first.dtype) for n in norms if norms[n] > 0}
    return judge_residual(relative, per_tensor, own, first.dtype, each=each)


def _simulate(
    layers: Sequence[LinearLayer],
    read: LayerReader,
    image: Tensor,
    label: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (δ, x) of every layer, computed in the dtype of ``image``, as float64."""
    x = normalise(image, mean, std).reshape(-1)
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
    delta = torch.softmax(pre[-1], 0) - label.to(pre[-1].dtype)
    found = {layers[-1].name: (delta.double(), inputs[-1].double())}
    for upper, layer, z, x in zip(
        layers[:0:-1], layers[-2::-1], pre[-2::-1], inputs[-2::-1], strict=True
    ):
        weight = _present(read.parameter(upper.name), f"weight of {upper.name}")
        phi = activation(layer.activation)
        assert phi is not None  # the forward pass has been through it
        delta = _transposed_times(weight, delta) * phi.slope_at_input(z)
        found[layer.name] = (delta.double(), x.double())
    return found


def _present(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise IncompleteError(f"the bundle holds no {what}", "capture it, or give --weights FILE")
    return tensor


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return matvec(weight, x) if x.dtype == torch.float64 else weight.to(x.dtype) @ x


def _transposed_times(weight: Tensor, delta: Tensor) -> Tensor:
    if delta.dtype == torch.float64:
        return rmatvec(weight, delta)
    return delta @ weight.to(delta.dtype)


def _outer_difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return ‖δ xᵀ − δ' x'ᵀ‖ without forming either, and without cancellation."""
    (d, x), (e, y) = one, other
    dd, xx = d - e, x - y
    # δ xᵀ − δ' x'ᵀ = (δ − δ') xᵀ + δ' (x − x')ᵀ
    square = dd @ dd * (x @ x) + e @ e * (xx @ xx) + 2.0 * (dd @ e) * (x @ xx)
    return math.sqrt(max(float(square), 0.0))


def _root_sum_square(values: Mapping[str, float]) -> float:
    return math.hypot(*values.values())
