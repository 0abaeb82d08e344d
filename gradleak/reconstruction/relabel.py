"""The labels of a batch from its finished images, by the gradients of all Linear layers.

The head's gradient alone tells samples apart that the whole network hardly tells apart at its end
only as well as its condition allows. Once the images are known, all inputs of all layers are, and
every weight's gradient Σ δ xᵀ is linear in δ = (p − y)/N at the logits: the lower layers, whose
inputs still differ, say the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.activations import activation
from gradleak.errors import IncompleteError
from gradleak.features import LayerReader
from gradleak.linalg import matmul
from gradleak.models.spec import LinearLayer

_STEPS = 500
# Conjugate gradients have arrived where the right-hand side is left to this part.
_LEFT = 1e-6


def labels_of_images(
    layers: Sequence[LinearLayer], read: LayerReader, inputs: Tensor, labels: Tensor
) -> Tensor:
    """Return the labels (N, C) with which ``inputs`` (N, D) explain the gradients best.

    ``layers`` are all Linear layers in forward order, the first reading ``inputs``, float64;
    ``labels`` (N, C) are where to start. Least squares over all weights, each relative to the size
    of its gradient, by conjugate gradients. Raises :class:`IncompleteError` where an activation or
    a tensor is missing.
    """
    chain = _Chain(layers, read, inputs)
    delta = (chain.probabilities - labels) / len(labels)
    left = chain.pull(delta)
    found = torch.zeros_like(delta)
    way, size = left, float(left.square().sum())
    goal = _LEFT**2 * size
    for _ in range(_STEPS):
        if not size > goal:
            break
        pushed = chain.normal(way)
        step = size / float((way * pushed).sum())
        found = found + step * way
        left = left - step * pushed
        last, size = size, float(left.square().sum())
        way = left + size / last * way
    return labels - len(labels) * found


class _Chain:
    """What the inputs make of the layers: all x and slopes, and the gradients seen by the x."""

    def __init__(self, layers: Sequence[LinearLayer], read: LayerReader, inputs: Tensor) -> None:
        self._weights: list[Tensor] = []  # of all layers but the first, float64
        self._slopes: list[Tensor] = []  # after all layers but the last
        self._grams: list[Tensor] = []  # X Xᵀ (N, N) of each layer's inputs, over ‖G‖²
        self._seen: list[Tensor] = []  # X Gᵀ (N, out), over ‖G‖²
        x = inputs
        # A unit at its kink falls as it fell at capture only in the arithmetic of the capture.
        y: Tensor | None = None
        for number, layer in enumerate(layers):
            weight, gradient = read.parameter(layer.name), read.gradient(layer.name)
            phi = activation(layer.activation)
            last = number + 1 == len(layers)
            if weight is None or gradient is None or (phi is None and not last):
                raise IncompleteError(f"{layer.name} is not known whole", "capture it")
            scale = 1.0 / float(torch.linalg.vector_norm(gradient)) ** 2
            self._grams.append(scale * (x @ x.mT))
            self._seen.append(scale * matmul(gradient, x.mT).mT)
            if number:
                self._weights.append(weight.double())
            bias = read.parameter(layer.name, "bias")
            z = matmul(weight, x.mT).mT if number == 0 else x @ self._weights[-1].mT
            z = z if bias is None else z + bias.double()
            y = (inputs.to(weight.dtype) if y is None else y) @ weight.mT
            y = y if bias is None else y + bias
            if phi is not None and not last:
                self._slopes.append(phi.slope_at_input(y).double())
                x, y = phi.apply(z), phi.apply(y)
        self.probabilities = torch.softmax(z, 1)

    def normal(self, delta: Tensor) -> Tensor:
        """Return MᵀM δ for δ (N, C) at the logits, where M δ are the gradients of the weights."""
        deltas = self._down(delta)
        return self._up([g @ d for g, d in zip(self._grams, deltas, strict=True)])

    def pull(self, delta: Tensor) -> Tensor:
        """Return Mᵀ of what δ (N, C) leaves of the gradients."""
        deltas = self._down(delta)
        every = zip(self._seen, self._grams, deltas, strict=True)
        return self._up([seen - gram @ d for seen, gram, d in every])

    def _down(self, delta: Tensor) -> list[Tensor]:
        """Return δ at the outputs of all layers, in forward order."""
        deltas = [delta]
        for weight, slope in zip(self._weights[::-1], self._slopes[::-1], strict=True):
            deltas.append((deltas[-1] @ weight) * slope)
        return deltas[::-1]

    def _up(self, parts: Sequence[Tensor]) -> Tensor:
        """Apply the transpose of :meth:`_down` to ``parts`` (N, out), in forward order."""
        found = parts[0]
        for part, weight, slope in zip(parts[1:], self._weights, self._slopes, strict=True):
            found = part + (found * slope) @ weight.mT
        return found
