"""All samples of a batch at once, from many starts: U S = (1/M) Σ δ_n a_nᵀ for given supports (§4).

For batches of few classes, whose dense normal equations cost little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.subspace import Subspace

_TINY = 1e-14


@dataclass(frozen=True)
class Hypotheses:
    """K guesses at the whole batch: coordinates ``a`` (K, N, n) and labels.

    The labels are ``start`` (K, N, C) + ``basis`` (K, N, C, q) ``weights`` (K, N, q); ``square``
    (K,) is the squared misfit of the gradient.
    """

    a: Tensor
    start: Tensor
    basis: Tensor
    weights: Tensor
    square: Tensor

    def take(self, index: Tensor) -> Hypotheses:
        """Return the guesses at ``index``."""
        return Hypotheses(**{name: value[index] for name, value in vars(self).items()})


def guesses(
    whole: Subspace, a: Tensor, supports: Tensor, weights: Tensor, base: bool
) -> Hypotheses:
    """Set up guesses from ``a`` (K, N, n), ``supports`` (K, N, k) and weights of all but the first.

    ``weights`` is (K, N, k − 1), and α starts at its share of 0.2 where there is a ``base``.
    """
    unit = torch.nn.functional.one_hot(supports, whole.classes).to(a.dtype)
    start = unit[:, :, 0]
    columns = [unit[:, :, j] - start for j in range(1, supports.shape[-1])]
    if base:
        columns.append(1.0 / whole.classes - start)
        weights = torch.cat([weights, 0.2 * torch.ones_like(a[..., :1])], -1)
    basis = torch.stack(columns, -1) if columns else start.new_zeros(*start.shape, 0)
    square = _evaluate(whole, torch.cat([a, weights], -1), start, basis)[2]
    return Hypotheses(a, start, basis, weights, square)


def implied_labels(whole: Subspace, a: Tensor) -> Tensor:
    """Return (K, N, C) the labels that make coordinates ``a`` (K, N, n) reproduce the gradient."""
    deltas: Tensor = whole.mass * (whole.left * whole.values) @ torch.linalg.pinv(a)
    return whole.probabilities(a) - deltas.mT


def descend(whole: Subspace, guess: Hypotheses, steps: int) -> Hypotheses:
    """Take Levenberg–Marquardt ``steps`` from every guess."""
    n = whole.size
    point = torch.cat([guess.a, guess.weights], -1)
    p, delta, square, misfit, one = _evaluate_all(whole, point, guess.start, guess.basis)
    damping = torch.full_like(square, 1e-2)
    for _ in range(steps):
        trial = point + _step(whole, point, guess.basis, p, delta, misfit, one, damping)
        new = _evaluate_all(whole, trial, guess.start, guess.basis)
        better = new[2] < square
        keep = better[:, None, None]
        point = torch.where(keep, trial, point)
        p, delta = torch.where(keep, new[0], p), torch.where(keep, new[1], delta)
        square = torch.where(better, new[2], square)
        misfit = torch.where(keep, new[3], misfit)
        one = torch.where(better[:, None], new[4], one)
        damping = torch.where(better, damping * 0.3, damping * 4.0).clamp(1e-12, 1e9)
    return Hypotheses(point[..., :n], guess.start, guess.basis, point[..., n:], square)


def _evaluate(
    whole: Subspace, point: Tensor, start: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    p, delta, square, _, _ = _evaluate_all(whole, point, start, basis)
    return p, delta, square


def _evaluate_all(
    whole: Subspace, point: Tensor, start: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return p and δ (K, N, C), the squared misfit (K,), the misfit (K, C, n), and that of ones."""
    n = whole.size
    a = point[..., :n]
    p = whole.probabilities(a)
    delta = p - start - (basis @ point[..., n:, None]).squeeze(-1)
    misfit = delta.mT @ a / whole.mass - whole.left * whole.values
    one = torch.zeros_like(a[..., 0])
    if whole.unit_row is not None:
        one = (a @ whole.unit_row - 1.0) / whole.mass
    return p, delta, misfit.square().sum((1, 2)) + one.square().sum(1), misfit, one


def _step(
    whole: Subspace,
    point: Tensor,
    basis: Tensor,
    p: Tensor,
    delta: Tensor,
    misfit: Tensor,
    one: Tensor,
    damping: Tensor,
) -> Tensor:
    """Return the damped Gauss–Newton step (K, N, n + q)."""
    n, mass = whole.size, whole.mass
    a, h = point[..., :n], whole.logits
    count, samples, width = point.shape
    slope = torch.cat([p[..., None] * (h - (p @ h)[..., None, :]), -basis], -1)
    jacobian = torch.einsum("kscx,ksj->kcjsx", slope, a)
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    jacobian[..., :n] += torch.einsum("ksc,jx->kcjsx", delta, identity)
    jacobian = jacobian.reshape(count, -1, samples * width) / mass
    normal = jacobian.mT @ jacobian
    pull = (jacobian.mT @ misfit.reshape(count, -1, 1)).view(point.shape)
    if whole.unit_row is not None:
        row = whole.unit_row / mass
        each = torch.arange(samples, device=a.device)
        blocks = normal.view(count, samples, width, samples, width)
        blocks[:, each, :n, each, :n] += row[:, None] * row
        pull[..., :n] += one[..., None] * row
    diagonal = normal.diagonal(dim1=1, dim2=2)
    floor = 1e-6 * diagonal.mean(1, keepdim=True) + _TINY
    damped = normal + torch.diag_embed(damping[:, None] * (diagonal + floor) + _TINY)
    solution = torch.linalg.solve_ex(damped, -pull.view(count, -1, 1)).result
    return torch.nan_to_num(solution).view(point.shape)
