"""Batches too large for their classes to be solved sample by sample (ALGORITHMS §4).

One sample's equations are C − n for n + q unknowns; together the N samples have (C − 1) N equations
for N (N + q), so there are batches that only the joint solve can answer. Given which classes the
labels rest on, Levenberg–Marquardt finds all features at once from almost any start; so the classes
are what is searched for, the most plausible assignments first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Labels
from gradleak.labels.batch.samples import rounding_of
from gradleak.labels.batch.subspace import Subspace
from gradleak.softlabels import Family

# Equations (C·n) of a problem small enough for dense normal equations of many starts.
_LARGEST = 400
_HYPOTHESES, _AT_ONCE, _STARTS = 4096, 64, 2
_STEPS, _PATIENCE, _GAIN = 60, 6, 0.5
_SIGMAS = 8.0
_TINY = 1e-14


def solve_jointly(
    whole: Subspace,
    families: Sequence[Family],
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Labels] | None:
    """Find coordinates (N, n) and labels that reproduce the gradient, or None.

    Assignments of one class to each sample are tried, most plausible first, for hard labels and for
    smoothed ones; there must be more equations than unknowns. ``progress`` is told how many
    assignments are done, and of how many.
    """
    alone = [f for f in families if f.support == 1 and spare_equations(whole, f) > 0]
    if not alone or whole.size != whole.samples or whole.classes * whole.size > _LARGEST:
        return None
    total = math.comb(whole.classes + whole.samples - 1, whole.samples)
    if total > 1 << 20:
        return None
    ranked = _assignments(whole)[:_HYPOTHESES]
    for start in range(0, len(ranked), _AT_ONCE):
        for family in alone:
            found = _try(whole, ranked[start : start + _AT_ONCE], family, generator)
            if found is not None:
                return found
        if progress is not None:
            progress(start + _AT_ONCE, len(ranked))
    return None


def spare_equations(whole: Subspace, family: Family) -> int:
    """Return the equations of the whole batch less its unknowns, all labels of ``family``."""
    known = 0 if whole.unit_row is None else whole.samples
    unknowns = whole.samples * (whole.size + family.parameters)
    return (whole.classes - 1) * whole.size + known - unknowns


def _assignments(whole: Subspace) -> Tensor:
    """Return (K, N) the multisets of N classes, the most plausible first.

    With features near their mean x̄ the row of class k along x̄ is (Σ_n p_nk − count_k) ‖x̄‖² / N,
    so what a multiset has of each class, less the average, should be parallel to it.
    """
    every = itertools.combinations_with_replacement(range(whole.classes), whole.samples)
    sets = torch.tensor(list(every), device=whole.left.device)
    counts = torch.zeros(len(sets), whole.classes, dtype=whole.left.dtype, device=sets.device)
    counts.scatter_add_(1, sets, torch.ones_like(sets, dtype=counts.dtype))
    counts = counts - counts.mean(1, keepdim=True)
    along = -whole.left[:, 0] * whole.right[:, 0].sum().sign()
    match = (counts @ along) / counts.norm(dim=1)
    return sets[match.argsort(descending=True)]


def _try(
    whole: Subspace, sets: Tensor, family: Family, generator: torch.Generator
) -> tuple[Tensor, Labels] | None:
    """Solve every assignment (K, N) from a few starts; return the first that fits."""
    sets = sets.repeat_interleave(_STARTS, 0)
    classes, n = whole.classes, whole.size
    start = torch.nn.functional.one_hot(sets, classes).to(whole.left.dtype)
    basis = start.new_zeros(*start.shape, 1)
    if family.base:
        basis = (1.0 / classes - start)[..., None]
    weights = 0.2 * basis.new_ones(*sets.shape, 1) * float(family.base)
    shape = (*sets.shape, 1)
    scale = torch.rand(shape, generator=generator, dtype=start.dtype, device=start.device)
    wobble = torch.randn((*sets.shape, n), generator=generator, dtype=start.dtype).to(start.device)
    shared = start.sum(1).gather(1, sets)[..., None]
    rows = -whole.mass * (whole.left * whole.values)[sets] / shared
    a = rows * (1.5 * scale - 0.3).exp() + 0.3 * wobble * rows.norm(dim=-1, keepdim=True) / n**0.5
    for index, a_found, found in _descend(whole, a, start, basis, weights):
        labels = Labels(
            classes=sets[index, :, None],
            start=start[index],
            basis=basis[index],
            weights=found,
            used=torch.full_like(found, family.base, dtype=torch.bool),
        )
        inside = not family.base or bool(((found > -1e-3) & (found < 1.0)).all())
        if inside and _fits(whole, a_found, labels):
            return a_found, labels
    return None


def _fits(whole: Subspace, a: Tensor, labels: Labels) -> bool:
    """Return whether samples reproduce the gradient to its own precision."""
    delta = whole.probabilities(a) - labels.dense()
    misfit = (delta.T @ a / whole.mass - whole.left * whole.values).norm()
    noise = whole.noise**2 * whole.classes * whole.size
    rounding = rounding_of(whole, a).square() * (delta.square() + labels.dense().square()).sum(1)
    expected = noise + float((rounding * a.square().sum(1)).sum()) / whole.mass**2
    return float(misfit) < _SIGMAS * math.sqrt(expected)


def _descend(
    whole: Subspace, a: Tensor, start: Tensor, basis: Tensor, weights: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Levenberg–Marquardt on all M starts; yields index, a and weights of the best ends first.

    ``a`` is (M, N, n), ``start`` (M, N, C), ``basis`` (M, N, C, q), ``weights`` (M, N, q).
    """
    problem = _Problem(whole, start, basis)
    point = torch.cat([a, weights], -1)
    residual, square = problem.residual(point)
    damping = torch.full_like(square, 1e-2)
    index = torch.arange(len(a), device=a.device)
    before = square
    ends: list[tuple[float, int, Tensor]] = []
    for step in range(1, _STEPS + 1):
        trial = point + problem.step(point, residual, damping)
        new_residual, new_square = problem.residual(trial)
        better = new_square < square
        point = torch.where(better[:, None, None], trial, point)
        residual = torch.where(better[:, None, None], new_residual, residual)
        square = torch.where(better, new_square, square)
        damping = torch.where(better, damping * 0.3, damping * 4.0).clamp(1e-12, 1e9)
        if step % _PATIENCE and step < _STEPS:
            continue
        done = (square > _GAIN * before) | torch.tensor(step == _STEPS, device=square.device)
        ends += zip(square[done].tolist(), index[done].tolist(), point[done], strict=True)
        left = ~done
        if not bool(left.any()):
            break
        point, residual, square, damping, index = (
            t[left] for t in (point, residual, square, damping, index)
        )
        problem, before = problem.part(left), square
    n = whole.size
    for _, where, end in sorted(ends, key=lambda e: e[0])[:_STARTS]:
        yield where, end[:, :n], end[:, n:]


class _Problem:
    """U S = (1/M) Σ δ_n a_nᵀ for M assignments at once, with dense Jacobians."""

    def __init__(self, whole: Subspace, start: Tensor, basis: Tensor) -> None:
        self.whole, self.start, self.basis = whole, start, basis

    def part(self, which: Tensor) -> _Problem:
        """Return the problem of some of the assignments."""
        return _Problem(self.whole, self.start[which], self.basis[which])

    def deltas(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and δ (M, N, C)."""
        n = self.whole.size
        p = self.whole.probabilities(point[..., :n])
        moved = (self.basis @ point[..., n:, None]).squeeze(-1)
        return p, p - self.start - moved

    def residual(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the misfit (M, C, n) and its square (M,)."""
        _, delta = self.deltas(point)
        target = self.whole.left * self.whole.values
        misfit = delta.mT @ point[..., : self.whole.size] / self.whole.mass - target
        if self.whole.unit_row is not None:
            one = point[..., : self.whole.size] @ self.whole.unit_row - 1.0
            square = misfit.square().sum((1, 2)) + (one / self.whole.mass).square().sum(1)
            return misfit, square
        return misfit, misfit.square().sum((1, 2))

    def step(self, point: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
        """Return the damped Gauss–Newton step (M, N, n + q)."""
        n, samples, mass = self.whole.size, self.whole.samples, self.whole.mass
        p, delta = self.deltas(point)
        a, h = point[..., :n], self.whole.logits
        slope = torch.cat([p[..., None] * (h - (p @ h)[..., None, :]), -self.basis], -1)
        jacobian = torch.einsum("mscx,msj->mcjsx", slope, a)
        identity = torch.eye(n, dtype=a.dtype, device=a.device)
        jacobian[..., :n] += torch.einsum("msc,jx->mcjsx", delta, identity)
        count, unknowns = len(point), point[0].numel()
        jacobian = jacobian.reshape(count, -1, unknowns) / mass
        normal = jacobian.mT @ jacobian
        pull = jacobian.mT @ residual.reshape(count, -1, 1)
        row = self.whole.unit_row
        if row is not None:
            width = point.shape[-1]
            blocks = normal.view(count, samples, width, samples, width)
            each = torch.arange(samples, device=a.device)
            blocks[:, each, :n, each, :n] += row[:, None] * row / mass**2
            pull = pull.view(count, samples, width)
            pull[..., :n] += (a @ row - 1.0)[..., None] * row / mass**2
            pull = pull.reshape(count, unknowns, 1)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        floor = 1e-6 * diagonal.mean(1, keepdim=True) + _TINY
        damped = normal + torch.diag_embed(damping[:, None] * (diagonal + floor) + _TINY)
        solution = torch.linalg.solve_ex(damped, -pull).result
        return torch.nan_to_num(solution).view(point.shape)
