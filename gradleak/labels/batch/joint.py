"""Batches too large for their classes to be solved sample by sample (ALGORITHMS §4).

One sample's equations are C − n for n + q unknowns; together the N samples have (C − 1) N equations
for N (N + q), so there are batches that only the joint solve can answer. Given which classes the
labels rest on, Levenberg–Marquardt finds all features at once from almost any start; so the classes
are what is searched for. One class a sample: all assignments, the most plausible first. Two: from
random starts, the two that each sample's implied label is largest at, again and again on the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradleak.labels.batch.descent import Hypotheses, descend, guesses, implied_labels
from gradleak.labels.batch.polish import Labels, labels_of
from gradleak.labels.batch.samples import rounding_of
from gradleak.labels.batch.subspace import Subspace
from gradleak.softlabels import Family

# Equations (C·n) and assignments of a problem small enough to be searched like this.
_LARGEST, _MOST_SETS, _CLASSES_EACH = 400, 1 << 20, 4
_ASSIGNMENTS, _AT_ONCE, _STARTS = 1024, 64, 2
# Rounds of random starts for pairs, the revisions of the supports in each, and steps between them.
_PAIR_ROUNDS, _PAIR_STARTS, _REVISIONS, _BETWEEN = 20, 100, 12, 6
_PATIENCE, _GAIN, _STEPS = 6, 0.5, 60
_FINALISTS = 4
_SIGMAS = 8.0


def solve_jointly(
    whole: Subspace,
    families: Sequence[Family],
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Labels] | None:
    """Find coordinates (N, n) and labels that reproduce the gradient, or None.

    All labels are taken to be of one of the ``families``, which must leave more equations than
    unknowns. ``progress`` is told how many rounds of the search are done, and of how many.
    """
    # With many more classes than samples the search sample by sample has had its chance.
    few = whole.classes <= _CLASSES_EACH * whole.samples
    if whole.size != whole.samples or not few or whole.classes * whole.size > _LARGEST:
        return None
    able = [family for family in families if spare_equations(whole, family) > 0]
    alone = [family for family in able if family.support == 1]
    pairs = [family for family in able if family.support == 2]
    sets = _assignments(whole)[:_ASSIGNMENTS] if alone else whole.left.new_zeros(0)
    parts = torch.split(sets, _AT_ONCE) if len(sets) else ()
    rounds = len(parts) + _PAIR_ROUNDS * bool(pairs)
    for done in range(rounds):
        if progress is not None:
            progress(done, rounds)
        assigned = alone and done < len(parts)
        for family in alone if assigned else pairs:
            ends = (
                _assigned(whole, parts[done], family, generator)
                if assigned
                else _paired(whole, family, generator)
            )
            found = _first_fit(whole, ends, family)
            if found is not None:
                return found
    return None


def spare_equations(whole: Subspace, family: Family) -> int:
    """Return the equations of the whole batch less its unknowns, all labels of ``family``."""
    known = 0 if whole.unit_row is None else whole.samples
    unknowns = whole.samples * (whole.size + family.parameters)
    return (whole.classes - 1) * whole.size + known - unknowns


def _evidence(whole: Subspace) -> Tensor:
    """Return (C,) −G x̄ for the mean feature x̄, large at the classes of the labels.

    With features near their mean the row of class k along it is (Σ_n p_nk − count_k) ‖x̄‖² / M.
    """
    evidence: Tensor = -whole.left[:, 0] * whole.right[:, 0].sum().sign()
    return evidence


def _assignments(whole: Subspace) -> Tensor:
    """Return (K, N) the multisets of N classes, most parallel to the evidence first."""
    if math.comb(whole.classes + whole.samples - 1, whole.samples) > _MOST_SETS:
        return torch.zeros(0, whole.samples, dtype=torch.long, device=whole.left.device)
    every = itertools.combinations_with_replacement(range(whole.classes), whole.samples)
    sets = torch.tensor(list(every), device=whole.left.device)
    counts = torch.zeros(len(sets), whole.classes, dtype=whole.left.dtype, device=sets.device)
    counts.scatter_add_(1, sets, torch.ones_like(sets, dtype=counts.dtype))
    counts = counts - counts.mean(1, keepdim=True)
    match: Tensor = (counts @ _evidence(whole)) / counts.norm(dim=1)
    return sets[match.argsort(descending=True)]


def _assigned(
    whole: Subspace, sets: Tensor, family: Family, generator: torch.Generator
) -> Hypotheses:
    """Descend with one class (K, N) for each sample, and give up where it leads nowhere."""
    sets = sets.repeat_interleave(_STARTS, 0)
    a = _starts(whole, sets, generator)
    now = guesses(whole, a, sets[..., None], a[..., :0], family.base)
    ends: list[Hypotheses] = []
    for _ in range(_STEPS // _PATIENCE):
        before = now.square
        now = descend(whole, now, _PATIENCE)
        moving = now.square < _GAIN * before
        ends.append(now.take(~moving))
        now = now.take(moving)
        if not len(now.a):
            break
    ends.append(now)
    return Hypotheses(**{k: torch.cat([getattr(e, k) for e in ends]) for k in vars(now)})


def _paired(whole: Subspace, family: Family, generator: torch.Generator) -> Hypotheses:
    """Descend from random starts, with the two classes that suit each sample best on the way."""
    chances = _evidence(whole).clamp(min=0.0) + 1e-9
    chances = chances.expand(_PAIR_STARTS, -1)
    first = torch.multinomial(chances, whole.samples, replacement=True, generator=generator)
    a = _starts(whole, first, generator)
    now = None
    for _ in range(_REVISIONS):
        labels = implied_labels(whole, a).nan_to_num(0.0)
        best = labels.topk(2, -1)
        share = best.values[..., 1:].clamp(0.02, 0.98)
        now = descend(whole, guesses(whole, a, best.indices, share, family.base), _BETWEEN)
        a = now.a
    assert now is not None
    finalists = now.take(now.square.topk(_FINALISTS, largest=False).indices)
    return descend(whole, finalists, _STEPS)


def _starts(whole: Subspace, sets: Tensor, generator: torch.Generator) -> Tensor:
    """Return coordinates (K, N, n) near the rows of the classes (K, N), of random sizes."""
    dtype, device = whole.left.dtype, whole.left.device
    counts = torch.nn.functional.one_hot(sets, whole.classes).sum(1).gather(1, sets)
    rows: Tensor = -whole.mass * (whole.left * whole.values)[sets] / counts[..., None]
    draw = torch.rand((*sets.shape, 1), generator=generator, dtype=dtype, device=device)
    wobble = torch.randn(rows.shape, generator=generator, dtype=dtype, device=device)
    spread: Tensor = 0.3 * rows.norm(dim=-1, keepdim=True) / whole.size**0.5
    starts: Tensor = rows * (1.5 * draw - 0.3).exp() + spread * wobble
    return starts


def _first_fit(whole: Subspace, ends: Hypotheses, family: Family) -> tuple[Tensor, Labels] | None:
    """Return the best of the ends if it reproduces the gradient to its own precision."""
    if not len(ends.a):
        return None
    best = ends.take(ends.square.argmin()[None])
    a, weights = best.a[0], best.weights[0]
    labels = _labels(whole, best, family)
    dense = labels.dense()
    delta = whole.probabilities(a) - dense
    noise = whole.noise**2 * whole.classes * whole.size
    size = (delta.square() + dense.square()).sum(1) * a.square().sum(1)
    rounding = float((rounding_of(whole, a).square() * size).sum()) / whole.mass**2
    fits = float(best.square[0]) < _SIGMAS**2 * (noise + rounding)
    inside = bool(((weights > -1e-3) & (weights < 1.0 + 1e-3)).all())
    return (a, labels) if fits and inside else None


def _labels(whole: Subspace, best: Hypotheses, family: Family) -> Labels:
    """Describe the labels of the only guess, the class of the largest weight first."""
    start, basis, weights = best.start[0], best.basis[0], best.weights[0]
    classes = [start.argmax(1)] + [basis[..., j].argmax(1) for j in range(family.support - 1)]
    support = torch.stack(classes, 1)
    others = weights[:, : family.support - 1]
    alpha = weights[:, -1:] if family.base else weights.new_zeros(len(weights), 1)
    values = torch.cat([1.0 - others.sum(1, keepdim=True) - alpha, others], 1)
    order = values.argsort(1, descending=True)
    base = torch.full((len(support),), family.base)
    return labels_of(
        whole.classes, list(support.gather(1, order)), list(values.gather(1, order)), base
    )
