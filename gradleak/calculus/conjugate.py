"""Conjugate gradients for several right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, tolerance: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Solve N x = b for each b of ``right`` (K, …) with N symmetric and not negative.

    ``operator`` maps a batch (k, …) to N times it. A side is done when its residual has fallen to
    its ``tolerance`` (K,), relative to b, or after ``most`` steps. Returns the solutions, in the
    shape of ``right``, and which of them (K,) are done.
    """
    x = torch.zeros_like(right)
    going = torch.arange(len(right), device=right.device)
    size = _energy(right)
    goal = (size * tolerance.square()).clamp(min=torch.finfo(right.dtype).tiny)
    r, p, energy = right, right, size
    done = torch.zeros(len(right), dtype=torch.bool, device=right.device)
    for _ in range(most):
        reached = energy <= goal[going]
        if bool(reached.any()):
            done[going[reached]] = True
            going, r, p, energy = going[~reached], r[~reached], p[~reached], energy[~reached]
        if not len(going):
            break
        q = operator(p)
        bend = (p * q).flatten(1).sum(1)
        if not bool((bend > 0.0).all()):  # a direction that N maps to nothing
            ahead = bend > 0.0
            going, r, p, q = going[ahead], r[ahead], p[ahead], q[ahead]
            energy, bend = energy[ahead], bend[ahead]
        step = _like(energy / bend, p)
        x[going] += step * p
        r = r - step * q
        fresh = _energy(r)
        p, energy = r + _like(fresh / energy, p) * p, fresh
    done[going[energy <= goal[going]]] = True
    return x, done


def _energy(batch: Tensor) -> Tensor:
    return batch.flatten(1).square().sum(1)


def _like(numbers: Tensor, batch: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (batch.dim() - 1))
