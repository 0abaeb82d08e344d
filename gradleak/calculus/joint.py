"""The input of a layer from its gradient and from its output together (ALGORITHMS §6b).

Where a layer's output is known, entry by entry, it joins in: W x + b = z. Each equation has the
weight of its own error, which after a saturating activation differs by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.calculus.solve import LayerEquations, Solution

# Unknowns up to which the normal equations are made as a matrix.
DENSE = 4600
# A pivot below this, of normal equations with a unit diagonal, is rounding.
_SINGULAR = 1e-15
_REFINEMENTS, _POWER = 3, 30
_CHUNK = 512


@dataclass(frozen=True)
class ForwardEquations:
    """A layer's ``output`` (N, …), where ``known``, with errors ``std``; ``apply`` is the layer."""

    apply: Callable[[Tensor], Tensor]
    output: Tensor
    std: Tensor
    known: Tensor

    def count(self) -> int:
        """Return how many equations these are."""
        return int(self.known.sum())


class _Part(Protocol):
    """Weighted equations M x = t: MᵀM, and what an input (N, C, places) leaves of them."""

    count: int
    size: float

    def normal(self) -> Tensor:
        """Return MᵀM (n, n), n = N·C·places."""

    def left(self, x: Tensor) -> Tensor:
        """Return t − M x."""

    def back(self, left: Tensor) -> Tensor:
        """Return Mᵀ ``left``, in the shape of x."""


class _Forward:
    """The equations of a known output."""

    def __init__(
        self, equations: ForwardEquations, shape: tuple[int, ...], precision: float
    ) -> None:
        output = equations.output
        floor = precision * float(output[equations.known].abs().amax())
        self._root = (equations.known / equations.std.clamp(min=floor)).flatten(1)
        self._shape = shape
        start = output.new_zeros(1, *shape[1:])
        offset = equations.apply(start)
        eye = torch.eye(start.numel(), dtype=output.dtype, device=output.device)
        eye = eye.view(-1, *shape[1:])
        parts = [eye[first : first + _CHUNK] for first in range(0, len(eye), _CHUNK)]
        columns = torch.cat([equations.apply(part) for part in parts]) - offset
        self._map = columns.flatten(1)  # (C·places, outputs)
        self._target = (output - offset).flatten(1)
        self.count = equations.count()
        self.size = float((self._root * self._target).square().sum())

    def normal(self) -> Tensor:
        blocks = [(self._map * root.square()) @ self._map.mT for root in self._root]
        n = len(blocks[0])
        whole: Tensor = blocks[0].new_zeros(len(blocks) * n, len(blocks) * n)
        for k, block in enumerate(blocks):
            whole[k * n : (k + 1) * n, k * n : (k + 1) * n] = block
        return whole

    def left(self, x: Tensor) -> Tensor:
        rest: Tensor = self._root * (self._target - x.flatten(1) @ self._map)
        return rest

    def back(self, left: Tensor) -> Tensor:
        found: Tensor = (self._root * left) @ self._map.mT
        return found.view(len(left), self._shape[1], -1)


class _Gradient:
    """The equations of a layer's gradient."""

    def __init__(self, equations: LayerEquations, precision: float) -> None:
        size = float(equations.gradient.square().mean().sqrt())
        weight = 1.0 / max(precision * size, 1e-300)
        self._matrix, self._target = weight * equations.matrix(), weight * equations.target()
        self._samples = len(equations.delta)
        self.count = self._target.numel()
        self.size = float(self._target.square().sum())

    def normal(self) -> Tensor:
        own, n = self._matrix.mT @ self._matrix, self._samples
        places, channels = len(own) // n, self._target.shape[1]
        whole = own.new_zeros(n, channels, places, n, channels, places)
        blocks = own.view(n, places, n, places)
        for c in range(channels):
            whole[:, c, :, :, c] = blocks
        return whole.view(n * channels * places, -1)

    def left(self, x: Tensor) -> Tensor:
        return self._target - self._matrix @ x.transpose(1, 2).flatten(0, 1)

    def back(self, left: Tensor) -> Tensor:
        found = self._matrix.mT @ left
        return found.view(self._samples, -1, found.shape[1]).transpose(1, 2)


def solve_jointly(
    gradient: Sequence[LayerEquations],
    forward: Sequence[ForwardEquations],
    shape: tuple[int, ...],
    precision: float,
) -> Solution:
    """Solve for an input of ``shape`` (N, C, …) by weighted least squares.

    ``precision`` is the relative rounding of the gradients.
    """
    parts: list[_Part] = [_Forward(part, shape, precision) for part in forward]
    parts += [_Gradient(part, precision) for part in gradient]
    normal = parts[0].normal()
    for part in parts[1:]:
        normal += part.normal()
    scale = normal.diagonal().clamp(min=1e-300).rsqrt()
    normal *= scale[:, None]
    normal *= scale
    factor, info = torch.linalg.cholesky_ex(normal)
    x = normal.new_zeros(*shape[:2], math.prod(shape[2:]))
    if int(info) or float(factor.diagonal().square().amin()) < _SINGULAR:
        return Solution(x, torch.full_like(x, math.inf), 1.0, math.inf)
    for _ in range(_REFINEMENTS):
        pull = torch.stack([part.back(part.left(x)) for part in parts]).sum(0).flatten()
        x = x + (scale * torch.cholesky_solve((scale * pull)[:, None], factor)[:, 0]).view_as(x)
    left = sum(float(part.left(x).square().sum()) for part in parts)
    spare = max(sum(part.count for part in parts) - x.numel(), 1)
    variance = torch.cholesky_inverse(factor).diagonal() * (left / spare)
    return Solution(
        x=x,
        std=(variance.sqrt() * scale).view_as(x),
        residual=math.sqrt(left / max(sum(part.size for part in parts), 1e-300)),
        condition=_condition(normal, factor),
    )


def _condition(normal: Tensor, factor: Tensor) -> float:
    """Estimate the condition number of the equations behind a ``normal`` matrix."""
    dice = torch.Generator(device=normal.device).manual_seed(0)
    v = torch.randn(len(normal), 1, generator=dice, dtype=normal.dtype, device=normal.device)
    w, most, least = v, 1.0, 1.0
    for _ in range(_POWER):
        v, w = normal @ v, torch.cholesky_solve(w, factor)
        most, least = float(v.norm()), float(w.norm())
        v, w = v / most, w / least
    return math.sqrt(most * least)
