"""The input of a layer from its gradient: least squares, with the errors of every unknown (§6a)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.window import Window
from gradleak.linalg import outer_rest, rmatmul

# A condition number beyond this leaves no digit of float64's normal equations.
_SINGULAR = 1e7
# Rounding of the solution itself, relative to its largest entry.
_FLOOR = 1e-14
# Equations that the rounding of the gradients counts as, beside those to spare.
_PRIOR = 4.0


@dataclass(frozen=True)
class LayerEquations:
    """The gradient G (O, C, T) of one layer and the ``delta`` (N, O, P) at its output.

    Linear equations for the layer's input (N, C, places): O·T of them for the N·places unknowns of
    each channel. The gradient of a Linear layer has any dtype, that of others float64.
    """

    window: Window
    delta: Tensor
    gradient: Tensor

    @property
    def linear(self) -> bool:
        """Whether the layer is Linear: one window, the whole input."""
        return self.window.index.numel() == 1 == self.window.places

    def only(self, channels: Tensor) -> LayerEquations:
        """Return the equations of the output channels of a mask (O,), or of numbers."""
        return LayerEquations(self.window, self.delta[:, channels], self.gradient[channels])

    def without(self, channels: Tensor) -> LayerEquations:
        """Return the equations of all output channels but those of the mask ``channels`` (O,)."""
        return self.only(~channels)

    def matrix(self) -> Tensor:
        """Return A (O·T, N·places)."""
        return self.window.matrix(self.delta)

    def target(self) -> Tensor:
        """Return the right-hand side (O·T, C)."""
        return self.gradient.double().transpose(1, 2).flatten(0, 1)

    def residuals(self, x: Tensor) -> Tensor:
        """Return (O, C, T) what the input ``x`` (N, C, places) leaves of the gradient."""
        return self.gradient.double() - self.window.gradient(self.delta, x)

    def misfits(self, x: Tensor) -> Tensor:
        """Return (O,) the norms of what the input ``x`` leaves of each output channel."""
        if not self.linear:
            norms: Tensor = torch.linalg.vector_norm(self.residuals(x).flatten(1), dim=1)
            return norms
        rows, _ = outer_rest(self.gradient[..., 0], self.delta[..., 0].mT, x[..., 0])
        return rows.sqrt()

    def sizes(self) -> Tensor:
        """Return (O,) the norms of the gradient of each output channel, float64."""
        norms: Tensor = torch.linalg.vector_norm(self.gradient.flatten(1), dim=1)
        return norms.double()


@dataclass(frozen=True)
class Solution:
    """An input ``x`` (N, C, places) and the standard deviation ``std`` of each entry.

    ``residual`` is what is left of all right-hand sides, relative; ``condition`` the condition
    number of the equations, infinite where they do not determine the input.
    """

    x: Tensor
    std: Tensor
    residual: float
    condition: float

    @property
    def determined(self) -> bool:
        """Whether the equations determine the input."""
        return math.isfinite(self.condition)


def solve_input(equations: Sequence[LayerEquations], precision: float) -> Solution:
    """Solve the equations of all layers that read one input, weighted by their gradients' sizes.

    ``precision`` is the relative rounding of the gradients, which counts beside what the solution
    leaves where few equations are to spare.
    """
    if all(part.linear for part in equations):
        return _solve_linear(equations, precision)
    first = equations[0]
    samples, channels = first.delta.shape[0], first.gradient.shape[1]
    sizes = [float(torch.linalg.vector_norm(e.gradient)) for e in equations]
    weights = [sizes[0] / size if size > 0.0 else 0.0 for size in sizes]
    matrix = torch.cat([w * e.matrix() for w, e in zip(weights, equations, strict=True)])
    target = torch.cat([w * e.target() for w, e in zip(weights, equations, strict=True)])
    read = _read(equations)
    if read is not None:
        matrix = matrix[:, read]
    unknowns = matrix.shape[1]
    if len(matrix) < unknowns or not sizes[0] > 0.0:
        return _undetermined(samples, channels, first.window.places, matrix)
    normal = matrix.mT @ matrix
    values, vectors = torch.linalg.eigh(normal)
    condition = float((values[-1] / values[0].clamp(min=1e-300)).sqrt())
    if not (float(values[-1]) > 0.0 and condition < _SINGULAR):  # all units closed: no equation
        return _undetermined(samples, channels, first.window.places, matrix)

    def inverse(right: Tensor) -> Tensor:
        found: Tensor = vectors @ ((vectors.mT @ (matrix.mT @ right)) / values[:, None])
        return found

    x = inverse(target)
    x = x + inverse(target - matrix @ x)
    left = target - matrix @ x
    rounding = (precision * target).square().mean(0)
    known = len(matrix) - unknowns + _PRIOR
    noise = ((left.square().sum(0) + _PRIOR * rounding) / known).sqrt()
    spread = (vectors.square() / values).sum(1).sqrt()
    std = spread[:, None] * noise + _FLOOR * x.abs().amax()
    residual = float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(target))
    if read is not None:
        x = x.new_zeros(len(read), channels).masked_scatter(read[:, None], x)
        std = torch.full_like(x, math.inf).masked_scatter(read[:, None], std)
    shape = (samples, first.window.places, channels)
    return Solution(x.view(shape).mT, std.view(shape).mT, residual, condition)


def _solve_linear(equations: Sequence[LayerEquations], precision: float) -> Solution:
    """Solve for the input of Linear layers, whose gradients are looked at twice, block by block.

    The equations of N samples are few numbers, so that they are inverted as they are instead of by
    normal equations, and there is nothing to refine.
    """
    first = equations[0]
    samples, channels = len(first.delta), first.gradient.shape[1]
    weights = [1.0]
    if len(equations) > 1:
        sizes = [float(torch.linalg.vector_norm(e.gradient.double())) for e in equations]
        weights = [sizes[0] / size if size > 0.0 else 0.0 for size in sizes]
    parts = [w * e.delta[..., 0].mT for w, e in zip(weights, equations, strict=True)]
    matrix = torch.cat(parts)  # (O, N)
    if len(matrix) < samples:
        return _undetermined(samples, channels, 1, matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    condition = float(values[0] / values[-1].clamp(min=1e-300))
    if not condition < _SINGULAR:
        return _undetermined(samples, channels, 1, matrix)
    inverse = (right.mT / values) @ left.mT  # (N, O)
    x = matrix.new_zeros(samples, channels)
    column, taken = matrix.new_zeros(channels), 0
    for weight, part in zip(weights, equations, strict=True):
        own = inverse[:, taken : taken + part.delta.shape[1]]
        x += rmatmul(part.gradient[..., 0], weight * own)
        taken += part.delta.shape[1]
    for weight, part in zip(weights, equations, strict=True):
        _, left_over = outer_rest(part.gradient[..., 0], part.delta[..., 0].mT, x)
        column += weight**2 * left_over
    # What the solution explains and what it leaves are at right angles.
    target = ((values[:, None] * right) @ x).square().sum(0) + column
    if not float(target.sum()) > 0.0:
        return _undetermined(samples, channels, 1, matrix)
    known = len(matrix) - samples + _PRIOR
    noise = ((column + _PRIOR * precision**2 * target / len(matrix)) / known).sqrt()
    spread = (right / values[:, None]).square().sum(0).sqrt()
    std = spread[:, None] * noise + _FLOOR * x.abs().amax()
    residual = float((column.sum() / target.sum()).sqrt())
    return Solution(x[..., None], std[..., None], residual, condition)


def _read(equations: Sequence[LayerEquations]) -> Tensor | None:
    """Return which places (N·places,) any window reads, None for all."""
    first = equations[0]
    seen = torch.zeros(first.window.places + 1, dtype=torch.bool)
    for part in equations:
        seen[part.window.index.flatten()] = True
    if bool(seen[:-1].all()):
        return None
    return seen[:-1].repeat(len(first.delta)).to(first.delta.device)


def _undetermined(samples: int, channels: int, places: int, like: Tensor) -> Solution:
    nothing = like.new_zeros(samples, channels, places)
    return Solution(nothing, torch.full_like(nothing, math.inf), 1.0, math.inf)


def least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the shortest x that minimises ‖matrix x − right‖, of any rank and on any device.

    On a GPU torch.linalg.lstsq takes the rank for full.
    """
    shortest: Tensor
    if matrix.device.type == "cpu":
        shortest = torch.linalg.lstsq(matrix, right).solution
    else:
        shortest = torch.linalg.pinv(matrix) @ right
    return shortest
