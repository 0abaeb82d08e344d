"""Solving for all samples of a batch at once: U S = (1/M) Σ δ_n a_nᵀ (ALGORITHMS §4).

Every sample's equations alone leave some of the gradient's information unused: together the samples
must reproduce the gradient itself. The residual of that is the certificate, and its curvature gives
the standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.labels.batch.subspace import Subspace

_RIDGE = 1e-18
STEPS = 12
"""Gauss–Newton steps at most."""

_ENOUGH = 1e-3


@dataclass(frozen=True)
class Labels:
    """The labels of M samples: ``start`` (M, C) + ``basis`` (M, C, q) ``weights`` (M, q).

    A label starts as the unit vector of its first class and moves towards those of the others of
    its support and, in the last column, towards the uniform label, so it always sums to one. The
    ``weights`` are those of the other classes and α; a column that is not ``used`` (M, q) is zero.
    ``classes`` (M, k) is the support.
    """

    classes: Tensor
    start: Tensor
    basis: Tensor
    weights: Tensor
    used: Tensor

    def dense(self) -> Tensor:
        """Return (M, C) the labels."""
        return self.start + (self.basis @ self.weights[..., None]).squeeze(-1)


@dataclass(frozen=True)
class Polished:
    """All samples: coordinates ``a`` (M, n), ``labels`` and ``deltas`` (M, C).

    ``misfit`` is ‖(1/M) Σ δ_n a_nᵀ − U S‖; ``freedom`` = equations − unknowns; ``covariance``
    (M, n + q, n + q) that of each sample's unknowns for entries of unit variance.
    """

    a: Tensor
    labels: Labels
    deltas: Tensor
    misfit: float
    freedom: int
    covariance: Tensor


def labels_of(classes: int, supports: list[Tensor], weights: list[Tensor], base: Tensor) -> Labels:
    """Build the labels of M samples from supports and weights (k_m,) and base flags (M,)."""
    count, most = len(supports), max(len(support) for support in supports)
    padded = supports[0].new_zeros(count, most)
    values = weights[0].new_zeros(count, most)
    used = torch.zeros_like(values, dtype=torch.bool)
    for m, (support, weight) in enumerate(zip(supports, weights, strict=True)):
        padded[m, : len(support)] = support
        values[m, : len(support) - 1] = weight[1:]
        used[m, : len(support) - 1] = True
        values[m, -1] = float(base[m]) * (1.0 - float(weight.sum()))
    used[:, -1] = base.to(used.device)
    start = values.new_zeros(count, classes).scatter(1, padded[:, :1], 1.0)
    basis = values.new_zeros(count, classes, most)
    basis.scatter_(1, padded[:, None, 1:], 1.0)
    basis[:, :, -1] = 1.0 / classes
    basis = (basis - start[:, :, None]) * used[:, None]
    return Labels(padded, start, basis, values, used)


def polish(subspace: Subspace, a: Tensor, labels: Labels, steps: int = STEPS) -> Polished:
    """Gauss–Newton on the whole batch from coordinates ``a`` (M, n) and ``labels``.

    Without ``steps`` the samples are described as they are.
    """
    n, count = subspace.size, len(a)
    unknowns = torch.cat([a, labels.weights], 1)
    idle = torch.cat([torch.zeros_like(a), (~labels.used).to(a.dtype)], 1).flatten()
    damping, best = 1e-8, _evaluate(subspace, unknowns, labels)
    normal, pull = _normal_equations(subspace, unknowns, labels.basis, best)
    for _ in range(steps):
        diagonal = normal.diagonal()
        size = diagonal.max()
        damped = normal + torch.diag(damping * diagonal + _RIDGE * size + idle * size)
        move = torch.linalg.solve_ex(damped, -pull).result.view(count, -1)
        trial = _evaluate(subspace, unknowns + move, labels)
        gain = 1.0 - trial.square / best.square if best.square > 0.0 else 0.0
        if gain > 0.0:
            unknowns, best, damping = unknowns + move, trial, damping * 0.1
            normal, pull = _normal_equations(subspace, unknowns, labels.basis, best)
        else:
            damping = max(damping, 1e-12) * 100.0
        if 0.0 <= gain < _ENOUGH or damping > 1e6:
            break
    used = int(labels.used.sum())
    return Polished(
        a=unknowns[:, :n],
        labels=replace(labels, weights=unknowns[:, n:]),
        deltas=best.deltas,
        misfit=best.square**0.5,
        freedom=_equations(subspace, count) - count * n - used,
        covariance=_blocks(normal, idle, count),
    )


@dataclass(frozen=True)
class _Fit:
    p: Tensor
    deltas: Tensor
    misfit: Tensor
    ones: Tensor
    square: float


def _evaluate(subspace: Subspace, unknowns: Tensor, labels: Labels) -> _Fit:
    a = unknowns[:, : subspace.size]
    p = subspace.probabilities(a)
    deltas = p - replace(labels, weights=unknowns[:, subspace.size :]).dense()
    misfit = deltas.T @ a / subspace.mass - subspace.left * subspace.values
    ones = a.new_zeros(len(a))
    if subspace.unit_row is not None:
        ones = (a @ subspace.unit_row - 1.0) * _one_size(subspace)
    square = misfit.square().sum() + ones.square().sum()
    return _Fit(p, deltas, misfit, ones, float(square))


def _equations(subspace: Subspace, count: int) -> int:
    """Return the number of independent equations: the columns of U S sum to zero as they are."""
    known = 0 if subspace.unit_row is None else count
    return (subspace.classes - 1) * subspace.size + known


def _one_size(subspace: Subspace) -> float:
    """Return what an error of the known coordinate weighs: as if it were in the gradient."""
    return 1.0 / subspace.mass


def _normal_equations(
    subspace: Subspace, unknowns: Tensor, basis: Tensor, fit: _Fit
) -> tuple[Tensor, Tensor]:
    """Return JᵀJ (M·m, M·m) and Jᵀ misfit (M·m,) of the m = n + q unknowns of each sample.

    A change (da, dβ) of sample s moves the gradient by (B_s dθ a_sᵀ + δ_s daᵀ) / M, with
    B_s = [∂p/∂a, −basis]: the inner products of such matrices need no matrix of that size.
    """
    n, mass = subspace.size, subspace.mass
    a, h = unknowns[:, :n], subspace.logits
    count, m = unknowns.shape
    slope = fit.p[:, :, None] * (h - (fit.p @ h)[:, None])
    b = torch.cat([slope, -basis], 2)  # (M, C, m)
    flat = b.permute(1, 0, 2).reshape(subspace.classes, count * m)
    normal = (flat.T @ flat).view(count, m, count, m) * (a @ a.T)[:, None, :, None]
    # <B_s x a_sᵀ, δ_t yᵀ> = (xᵀ B_sᵀ δ_t) (a_s · y)
    cross = torch.einsum("scm,tc->smt", b, fit.deltas)
    mixed = torch.einsum("smt,sj->smtj", cross, a)
    normal[:, :, :, :n] += mixed
    normal[:, :n] += mixed.permute(2, 3, 0, 1)
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    products = (fit.deltas @ fit.deltas.T)[:, None, :, None] * identity[None, :, None]
    normal[:, :n, :, :n] += products
    pull = torch.einsum("scm,cj,sj->sm", b, fit.misfit, a)
    pull[:, :n] += fit.deltas @ fit.misfit
    normal, pull = normal / mass**2, pull / mass
    if subspace.unit_row is not None:
        row = _one_size(subspace) * subspace.unit_row
        each = torch.arange(count, device=a.device)
        normal[each, :n, each, :n] += row[:, None] * row
        pull[:, :n] += fit.ones[:, None] * row
    return normal.reshape(count * m, count * m), pull.flatten()


def _blocks(normal: Tensor, idle: Tensor, count: int) -> Tensor:
    """Return (M, m, m) the diagonal blocks of the inverse normal matrix.

    The equations are scaled to a unit diagonal first; a direction without curvature gets a huge
    variance instead of none.
    """
    size = (normal.diagonal() + idle).clamp(min=1e-300).rsqrt()
    scaled = size[:, None] * (normal + torch.diag(idle)) * size
    ridge = 1e-15 * torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    inverse: Tensor = torch.linalg.inv_ex(scaled + ridge).inverse
    inverse = (size[:, None] * inverse * size).view(count, len(size) // count, count, -1)
    each = torch.arange(count, device=normal.device)
    return inverse[each, :, each]
