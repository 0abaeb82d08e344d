"""Which classes the labels of a batch rest on together, in closed form (ALGORITHMS §4).

Where the softmax hardly bends over the samples, as in a network before training, p is linear in the
feature, p_n = p + P(a_n − c) with the slope P at a mean c. A class j that no label rests on has the
row M (U S)_j = Σ p_nj a_n − Σ α_n a_n / C, which is then linear in the second moment Q = Σ a_n a_nᵀ
and in two sums over the samples. All such rows together determine Q. Put into the row of a class k
with labels, it leaves R_k = Σ_n ŷ_nk a_n, the labels ŷ without their base. As Q^{-1/2} makes the
samples orthonormal, R Q^{-1} Rᵀ = ŶᵀŶ: the Gram matrix of the labels' columns. Two classes share a
sample where its entry is not zero, and the diagonal tells how many rest on a class, and by how
much. Nothing is searched for, and that two samples of a class have nearly one softmax is no matter.

All in the coordinates a / S, in which the rounding of U S is even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.subspace import Subspace

# Rounds in which rows and samples are told again, what a labelled class exceeds the others by,
# in their median and in the largest, and how far those may be from linear.
_ROUNDS, _TIMES, _PART, _BENT = 6, 12.0, 1e-3, 0.05
# Classes that start as unlabelled, at least, and columns of labels that are of one sample.
_FREE, _ALIKE = 0.5, 0.5
_FEEBLE, _TINY = 1e-9, 1e-12


@dataclass(frozen=True)
class Moments:
    """What the rows tell: ``labelled`` (K,) classes, the ``second`` moment Q (n, n), both of a / S.

    ``root`` (n, n) is Q^{1/2}, and ``rows`` (K, n) R Q^{-1/2} = Ŷᵀ O, with the orthonormal samples
    in the rows of O: a_n / S = (O root)_n.
    """

    labelled: Tensor
    root: Tensor
    rows: Tensor

    @property
    def gram(self) -> Tensor:
        """Return (K, K) ŶᵀŶ."""
        return self.rows @ self.rows.T


def moments_of(whole: Subspace) -> Moments | None:
    """Return the moments of a batch, or None where its rows are not linear in the samples."""
    try:
        found = _solved(whole, None)
        # What the softmax bends is small; the rows found tell it well enough.
        return None if found is None else _solved(whole, _stand_ins(found)) or found
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None  # p does not move at all, and tells nothing of Q


def _stand_ins(found: Moments) -> Tensor:
    """Return (m, n) for each sample, or each few that share a class, one that stands for them."""
    gram = found.gram
    sizes = gram.diagonal().clamp(min=_TINY).sqrt()
    chosen: list[int] = []
    for k in sizes.argsort(descending=True).tolist():
        if not chosen or bool((gram[k, chosen].abs() < _ALIKE * sizes[k] * sizes[chosen]).all()):
            chosen.append(k)
    return (found.rows[chosen] / sizes[chosen, None]) @ found.root


def _solved(whole: Subspace, samples: Tensor | None) -> Moments | None:
    """Solve for the moments; ``samples`` (m, n), if any, tell what the softmax bends."""
    n, classes = whole.size, whole.classes
    rows, logits = whole.mass * whole.left, whole.logits * whole.values
    mean = _mean(whole) if samples is None else samples.mean(0)
    p = torch.softmax(logits @ mean + whole.bias, 0)
    slope = p[:, None] * (logits - p @ logits)
    if samples is not None:
        bent = torch.softmax(samples @ logits.T + whole.bias, 1) - p - (samples - mean) @ slope.T
        rows = rows - bent.T @ samples
    least = max(int(_FREE * classes), (n + 1) // 2 + 4)
    plain = rows * whole.values
    free = (plain - plain.median(0).values).norm(dim=1).argsort()[:least]
    for _ in range(_ROUNDS):
        second, total, base = _regressed(whole, rows[free], p[free], slope[free], mean)
        short = p[:, None] * total - base / classes - rows
        short = short + slope @ (second - torch.outer(mean, total))
        size = short.norm(dim=1)
        clear = max(_TIMES * float(size[free].median()), _PART * float(size.max()))
        before, free = free.sort().values, (size < clear).nonzero()[:, 0]
        if torch.equal(before, free):
            break
    labelled = (size >= clear).nonzero()[:, 0]
    squares, turn = torch.linalg.eigh(second)
    straight = float(size[free].median()) < _BENT * float(size.max())
    if not straight or not len(labelled) or not float(squares[0]) > 0.0:
        return None
    scale = squares.sqrt()
    return Moments(labelled, scale[:, None] * turn.T, short[labelled] @ turn / scale)


def _mean(whole: Subspace) -> Tensor:
    """Return (n,) a feature to start from: with a bias gradient their weighted mean, else zero."""
    if whole.unit_row is None:
        return torch.zeros_like(whole.values)
    rows = whole.left * whole.values
    heights = rows @ whole.unit_row
    mean: Tensor = rows.T @ heights / heights.square().sum() / whole.values
    return mean


def _regressed(
    whole: Subspace, rows: Tensor, p: Tensor, slope: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (n, n), Σ a_n and Σ α_n a_n (n,) from rows (J, n) of classes without a label.

    Least squares of p_j Σa − Σαa / C + P_j (Q − c Σaᵀ) = row_j over the entries of the symmetric Q.
    A head with a bias knows one coordinate of every sample, so Q r = Σa and r · Σa = N.
    """
    n = rows.shape[1]
    first, second = torch.triu_indices(n, n, device=rows.device)
    entry = torch.arange(len(first), device=rows.device)
    off = first != second
    count = len(entry)
    each = torch.arange(n, device=rows.device)
    system = rows.new_zeros(len(rows), n, count + 2 * n)
    system[:, second, entry] = slope[:, first]
    system[:, first[off], entry[off]] = slope[:, second[off]]
    system[:, each, count + each] = (p - slope @ mean)[:, None]
    system[:, each, count + n + each] = -1.0 / whole.classes
    matrix, goal = system.flatten(0, 1), rows.flatten()
    held = _held(whole, first, second)
    weight = matrix.abs().max()
    ends = rows.new_zeros(len(held))
    if whole.unit_row is not None:
        ends[-1] = weight * whole.samples
    matrix, goal = torch.cat([matrix, weight * held]), torch.cat([goal, ends])
    found: Tensor = torch.linalg.lstsq(matrix, goal[:, None], driver="gels").solution[:, 0]
    q = rows.new_zeros(n, n)
    q[first, second] = found[:count]
    q[second, first] = found[:count]
    return q, found[count : count + n], found[count + n :]


def _held(whole: Subspace, first: Tensor, second: Tensor) -> Tensor:
    """Return equations of the entries ``first``, ``second`` of Q and the two sums, of weight one.

    Where all classes are as likely only Σa − Σαa is determined: Σαa is held at zero, feebly. With a
    bias gradient, Q r − Σa = 0 and, in the last one, r · Σa.
    """
    n, count = whole.size, len(first)
    each = torch.arange(n, device=first.device)
    feeble = whole.values.new_zeros(n, count + 2 * n)
    feeble[each, count + n + each] = _FEEBLE
    if whole.unit_row is None:
        return feeble
    unit, entry, off = (
        whole.unit_row * whole.values,
        torch.arange(count, device=each.device),
        first != second,
    )
    known = whole.values.new_zeros(n + 1, count + 2 * n)
    known[second, entry] = unit[first]
    known[first[off], entry[off]] = unit[second[off]]
    known[each, count + each] = -1.0
    known[n, count : count + n] = unit
    return torch.cat([feeble, known])
