"""A batch whose samples hardly move the softmax, read off the rows of its gradient (§2, §4).

Where the head's weight is zero, as some networks begin, or its features hardly differ, all samples
have nearly the same p. Their own equations, which live on how p differs, have little to go by.
The rows of the gradient tell more. With the bias gradient as one more column, row k is

    G_k = (1/M) Σ_n (p_nk − y_nk) [x_n, 1].

Take (1/M) Σ p_nk [x_n, 1] off, and a class that no label rests on is left with the labels' base
alone, the same row u for all of them; a class k of one sample falls short of u by
w_nk [x_n, 1] / M, w the label's weight there above its base. So the last entry is the weight, the
rest the feature.
Divided by its last entry a row is the feature of its one sample, or lies between those of the
samples that share the class: the features are the corners of what the rows span. The p that was
taken off follows from the features, so the two are found in turn, from one p for all; the less p
depends on the sample, the faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Labels, labels_of
from gradleak.labels.batch.sharing import share_out
from gradleak.labels.batch.subspace import Subspace

_ROUNDS = 60
# A round that changes the features by less than this, relative, is the last.
_SETTLED = 1e-13
# After so many rounds, each must change them by less than this part of the one before.
_PATIENCE, _SHRINKS = 4, 0.8
# Classes that no label rests on, at least; and how far a row falls short of theirs, in units of
# their own spread and of the largest, to be one of a label's.
_FREE, _CLEAR, _LEAST = 0.4, 12.0, 1e-6
# A row this near a corner, in the distance of the nearest two, is of the corner's sample alone, and
# a share of a class below this is none.
_PURE, _SHARE = 0.1, 1e-3
# What a label may lack of one and be whole, and what it may exceed.
_LACK, _FULL = 0.02, 1.4


def read_rows(whole: Subspace, *, counted: bool) -> Iterator[tuple[Tensor, Labels]]:
    """Yield coordinates (N, n) and labels of all samples, for each way to tell rows apart.

    They are starts for the joint polish, whose residual says what they are worth. Needs a bias
    gradient, a known loss scale, and for every sample a class that no other rests on: samples of
    one class merge into one row. Yields nothing where that does not hold. Only where N is known,
    ``counted``, may a hard label share its class with a mixed one: two hard labels there and one
    sample more would leave the same rows.
    """
    unit = whole.unit_row
    if unit is None or not whole.mass_known or whole.size != whole.samples:
        return
    for rule in (_nearest, _corners):
        found = _settled(whole, unit, rule, counted)
        if found is not None:
            yield found


Rule = Callable[[Tensor, Tensor, int], Tensor]
"""From points (L, n) and weights (L,) to the corner that each point is, -1 if none (L,)."""


def _settled(
    whole: Subspace, unit: Tensor, rule: Rule, counted: bool
) -> tuple[Tensor, Labels] | None:
    """Find features and p in turn until they agree, or None."""
    rows = whole.left * whole.values
    own = _of_the_mean(whole, unit, rows)
    a: Tensor | None = None
    moved = math.inf
    for round_ in range(_ROUNDS):
        short, free = _shortfall(rows - own / whole.mass, unit)
        labelled = _labelled(short @ unit)
        if not _suffice(whole, labelled):
            return None
        short = short[labelled]
        height = short @ unit
        corner = rule(short / height[:, None] / whole.values, height, whole.samples)
        pure = corner == torch.arange(whole.samples, device=corner.device)[:, None]
        if not bool(pure.any(1).all()):
            return None
        total = pure.to(short.dtype) @ short
        before, a = a, total / (total @ unit)[:, None]
        # The rows that are no corner's alone: (1/M) Σ w_nk a_n, solved for the weights.
        shared = torch.linalg.solve_ex(a.T, short.T).result.clamp(min=0.0) * (corner < 0)
        weights = whole.mass * (pure * height + shared)
        base = -whole.mass * whole.classes * torch.linalg.solve_ex(a.T, free).result
        own = whole.probabilities(a).T @ a
        if before is None:
            continue
        last, moved = moved, float((a - before).norm() / a.norm())
        if moved <= _SETTLED:
            break
        if round_ > _PATIENCE and moved > _SHRINKS * last:
            break  # rounding, or a p that the samples do move
    assert a is not None
    if counted:
        a, weights = _unshared(a, weights, base)
    if not bool(torch.isfinite(weights).all()) or float(weights.sum(1).max()) > _FULL:
        return None
    supports, values = [], []
    for row in weights:
        taken = (row > _SHARE).nonzero()[:, 0]
        taken = taken[row[taken].argsort(descending=True)]
        if not len(taken):
            return None
        supports.append(labelled[taken])
        values.append(row[taken])
    smoothed = torch.ones(whole.samples, dtype=torch.bool)
    return a, labels_of(whole.classes, supports, values, smoothed)


def read_shared_rows(whole: Subspace) -> Iterator[tuple[Tensor, Labels]]:
    """Yield coordinates (N, n) and labels for each way in which samples may share classes.

    For a batch of which N is known, with a bias gradient and a known loss scale, whose samples
    hardly move the softmax: it is taken to be that of their mean.
    """
    unit = whole.unit_row
    if unit is None or not whole.mass_known or whole.size != whole.samples:
        return
    rows = whole.left * whole.values
    short, _ = _shortfall(rows - _of_the_mean(whole, unit, rows) / whole.mass, unit)
    labelled = _labelled(short @ unit)
    labelled = labelled[whole.mass * (short[labelled] @ unit) > _SHARE]
    if not _suffice(whole, labelled):
        return
    height = short[labelled] @ unit
    sample = _nearest(short[labelled] / height[:, None] / whole.values, height, whole.samples)
    yield from share_out(whole, whole.mass * short[labelled], labelled, sample)


def _of_the_mean(whole: Subspace, unit: Tensor, rows: Tensor) -> Tensor:
    """Return Σ p_n a_nᵀ (C, n) of samples that are all as their mean is."""
    heights = rows @ unit
    mean = rows.T @ heights / heights.square().sum()  # its last entry is one
    return whole.samples * whole.probabilities(mean)[:, None] * mean


def _suffice(whole: Subspace, labelled: Tensor) -> bool:
    """Return whether there are classes with a label for all samples, and enough without one."""
    return whole.samples <= len(labelled) <= whole.classes * (1.0 - _FREE)


def _unshared(a: Tensor, weights: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Mend corners (N, n) whose only class another sample has a share of; their weights (N, L) too.

    A hard label and one with w on the same class give the corner the weight 1 + w. It entered the
    sum of p_nk a_n as it stood, so the ``base`` (N,) that is left is −w for its label, and w more
    than it should for the other one, which is taken to be mixed without a base.
    """
    a, weights = a.clone(), weights.clone()
    over = base < -_LACK
    for corner in over.nonzero()[:, 0].tolist():
        goal = torch.where(over, torch.inf, (base + base[corner]).abs())
        other = int(goal.argmin())
        row = int(weights[corner].argmax())
        share, total = base[other], weights[corner, row]
        if float(goal[other]) > _LACK or not _LACK < float(share) < float(total) - _LACK:
            continue
        a[corner] = (total * a[corner] - share * a[other]) / (total - share)
        weights[corner, row] -= share
        weights[other, row] += share
    return a, weights


def _shortfall(rows: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much each row (C, n) falls short of that of the classes without a label (n,)."""
    heights = rows @ unit
    free = heights.topk(max(1, int(_FREE * len(rows)))).indices
    below = heights[free].median() - heights
    clear = _CLEAR * below[free].abs().median()
    free = (below < torch.maximum(clear, _LEAST * below.max())).nonzero()[:, 0]
    mean = rows[free].mean(0)
    return mean - rows, mean


def _labelled(heights: Tensor) -> Tensor:
    """Return the classes (L,) whose rows fall short by more than those without a label vary."""
    order = heights.abs().sort().values
    typical = order[: max(1, int(_FREE * len(order)))].median()
    return (heights > torch.maximum(_CLEAR * typical, _LEAST * heights.max())).nonzero()[:, 0]


def _nearest(points: Tensor, weights: Tensor, samples: int) -> Tensor:
    """Merge the nearest points until there are no more groups than samples: no class is shared."""
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(points.cpu().numpy(), "complete")
    return torch.as_tensor(fcluster(tree, samples, "maxclust"), device=points.device) - 1


def _corners(points: Tensor, weights: Tensor, samples: int) -> Tensor:
    """Take the points that stand out furthest for the corners, the rest for between them.

    Successive projections (arXiv 1208.1237): the furthest from the mean, then again and again the
    one furthest from the affine span of those taken.
    """
    mean = (weights @ points) / weights.sum()
    chosen = [int(((points - mean).norm(dim=1)).argmax())]
    rest = points - points[chosen[0]]
    while len(chosen) < samples:
        chosen.append(int(rest.norm(dim=1).argmax()))
        along = rest[chosen[-1]] / rest[chosen[-1]].norm().clamp(min=torch.finfo(rest.dtype).tiny)
        rest = rest - (rest @ along)[:, None] * along
    apart = torch.cdist(points, points[chosen])
    between = torch.cdist(points[chosen], points[chosen])
    gap = between.masked_fill(between == 0.0, torch.inf).min()
    nearest = apart.min(1)
    return torch.where(nearest.values < _PURE * gap, nearest.indices, -1)
