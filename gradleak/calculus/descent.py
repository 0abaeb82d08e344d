"""Levenberg–Marquardt for images: residuals by products alone, steps by conjugate gradients (§6f).

The damping is a Laplacian, so that as long as it is strong only smooth changes are made, and the
fine structure is decided last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Residuals = Callable[[Tensor], tuple[Tensor, ...]]

# Share of plain damping beside the Laplacian, which leaves the mean of an image free.
_PLAIN = 0.1
_LESS, _LITTLE_LESS, _MORE, _MUCH_MORE = 0.2, 0.5, 1.5, 10.0
_LEAST_DAMPING = 1e-14
_TRIES = 6
# A step is solved for the more exactly the smaller the residual is.
_ROUGH, _FINE, _NEAR = 1e-2, 1e-5, 1e-4
# Gains of the sum of squares: a good step, a fair one, and the end.
_GOOD, _FAIR, _NOTHING = 1.5, 1.05, 1.002
_IDLE = 3


@dataclass(frozen=True)
class DescentOptions:
    """How to descend: at most ``steps`` of ``inner`` products each, within ``seconds``.

    ``damping`` is that of the first step, relative to the mean curvature; the descent ends when
    the sum of squares is below ``enough``.
    """

    steps: int = 60
    inner: int = 30
    seconds: float = math.inf
    damping: float = 1e-2
    enough: float = 0.0


@dataclass(frozen=True)
class Descended:
    """Where a descent ended after so many ``steps``: the image ``x``, and the sum of ``squares``.

    It is ``done`` where that is small enough, or the image was ``accepted``.
    """

    x: Tensor
    squares: float
    steps: int
    done: bool
    accepted: bool = False


def descend(
    residuals: Residuals,
    start: Tensor,
    options: DescentOptions,
    *,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None = None,
    accepted: Callable[[Tensor], bool] | None = None,
) -> Descended:
    """Minimise the sum of squares of ``residuals`` from ``start`` (N, C, H, W).

    ``progress`` is called after each step with its number and the sum of squares; the descent ends
    early at an image that is ``accepted``.
    """
    ends = time.monotonic() + options.seconds
    here = Point(residuals, start)
    damping, idle, step, taken = options.damping, 0, 0, False
    curvature = here.curvature(generator)
    while step < options.steps and here.squares > options.enough and time.monotonic() < ends:
        down = -here.pull(here.left)
        tolerance = _ROUGH if here.squares > _NEAR else _FINE
        for _ in range(_TRIES):
            if time.monotonic() > ends:
                return Descended(here.x, here.squares, step, False)
            product = here.product(damping * curvature)
            move = conjugate_gradients(product, down, options.inner, tolerance, ends)
            there = Point(residuals, here.x + move)
            if there.squares < here.squares:
                break
            damping *= _MUCH_MORE
        else:
            break
        gain = here.squares / max(there.squares, 1e-300)
        here = there
        factor = _LESS if gain > _GOOD else _LITTLE_LESS if gain > _FAIR else _MORE
        damping = max(damping * factor, _LEAST_DAMPING)
        idle = idle + 1 if gain < _NOTHING else 0
        step += 1
        if progress is not None:
            progress(step, here.squares)
        taken = accepted is not None and accepted(here.x)
        if taken or idle == _IDLE:
            break
    return Descended(here.x, here.squares, step, taken or here.squares <= options.enough, taken)


class Point:
    """The residuals ``left`` at an image, and the products with their Jacobian there.

    The product Jv is the derivative of Jᵀu by u: twice backwards, with the image passed forward
    once for all products.
    """

    def __init__(self, residuals: Residuals, x: Tensor) -> None:
        with torch.enable_grad():
            self._x = x.detach().clone().requires_grad_()
            self._out = residuals(self._x)
            self._weights = [torch.zeros_like(part).requires_grad_() for part in self._out]
            (self._back,) = torch.autograd.grad(
                self._out, self._x, self._weights, create_graph=True
            )
        self.left = tuple(part.detach() for part in self._out)
        self.squares = _size(self.left)

    @property
    def x(self) -> Tensor:
        """The image."""
        return self._x.detach()

    def push(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return Jv."""
        # What the image does not move, such as the gradient of a last bias, has no slope.
        return torch.autograd.grad(
            self._back, self._weights, v, retain_graph=True, materialize_grads=True
        )

    def pull(self, parts: Sequence[Tensor]) -> Tensor:
        """Return Jᵀ of ``parts``."""
        return torch.autograd.grad(self._out, self._x, parts, retain_graph=True)[0]

    def product(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return the product with JᵀJ + damping · (Laplacian and a little identity)."""

        def product(v: Tensor) -> Tensor:
            return self.pull(self.push(v)) + damping * (_PLAIN * v + _laplacian(v))

        return product

    def curvature(self, generator: torch.Generator) -> float:
        """Return the mean of the eigenvalues of JᵀJ, as one random direction shows it."""
        like = self._x
        v = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return _size(self.push(v)) / float(v.square().sum())


def _laplacian(v: Tensor) -> Tensor:
    across, along = v[..., 1:] - v[..., :-1], v[..., 1:, :] - v[..., :-1, :]
    return (
        F.pad(across, (1, 0))
        - F.pad(across, (0, 1))
        + F.pad(along, (0, 0, 1, 0))
        - F.pad(along, (0, 0, 0, 1))
    )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, steps: int, tolerance: float, ends: float
) -> Tensor:
    """Solve by conjugate gradients to a relative ``tolerance``, for ``steps`` or until ``ends``."""
    x, left = torch.zeros_like(right), right.clone()
    direction, size = left, left.square().sum()
    goal = tolerance**2 * size
    for _ in range(steps):
        turned = product(direction)
        along = (direction * turned).sum()
        if not float(along) > 0.0:
            break
        length = size / along
        x, left = x + length * direction, left - length * turned
        before, size = size, left.square().sum()
        if size <= goal:
            break
        if time.monotonic() > ends:
            break
        direction = left + size / before * direction
    return x


def _size(parts: Sequence[Tensor]) -> float:
    """Return the sum of squares."""
    return float(torch.stack([part.square().sum() for part in parts]).sum())
