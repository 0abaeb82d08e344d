"""Average pooling of every kind: affine, and invertible where there are as many means as places."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.calculus.layer import Affine, Estimate, Walking, register
from gradleak.calculus.trace import Operation

# Means of few places that overlap may be too alike to tell the places apart.
_INDEPENDENT = 1e-6


@register("mean", "adaptive_avg_pool2d", "avg_pool2d")
class AveragePool(Affine):
    """Means over places of a map."""

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the input where the means determine it.

        They do where each is that of one place, and where a small map is spread over a larger one,
        as adaptive pooling does.
        """
        shape = walk.shapes[operation.inputs[0]]
        if math.prod(shape) == value.value.numel() and len(shape) != 4:
            return value.reshaped(shape)
        if math.prod(shape) > value.value.numel() or len(shape) != 4:
            return None
        means = _matrix(operation, shape, value.value, walk)  # (places, means)
        if means.shape[0] == means.shape[1] and torch.equal(means, torch.eye(len(means)).to(means)):
            return value.reshaped(shape)
        if value.known is not None:
            return None
        size = torch.linalg.svdvals(means)
        if float(size[-1]) < _INDEPENDENT * float(size[0]):
            return None
        back = torch.linalg.pinv(means)
        found = value.value.flatten(2) @ back
        std = (value.std.flatten(2).square() @ back.square()).sqrt()
        return Estimate(found.view(shape), std.view(shape))


def _matrix(operation: Operation, shape: tuple[int, ...], like: Tensor, walk: Walking) -> Tensor:
    """Return the means of each place's indicator."""
    places = shape[2] * shape[3]
    eye = torch.eye(places, dtype=like.dtype, device=like.device)
    return operation.run([eye.view(places, 1, *shape[2:])], walk.state).flatten(1)
