"""The simplest family that each sample of a batch allows (ALGORITHMS §3–4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from gradleak.labels.batch.judge import expected_misfit
from gradleak.labels.batch.polish import Labels, polish
from gradleak.labels.batch.roots import Equations, Roots
from gradleak.labels.batch.samples import Found, belongs, excess_of
from gradleak.labels.batch.subspace import Subspace
from gradleak.softlabels import Family

_STEPS = 12
# What a parameter must earn in ln p, in units of ln C, to be kept under noise (BIC).
_PENALTY = 1.5
# How far aᵀS⁻¹c / M of a sample with its former self may be from one.
_STILL = 0.1
# A parameter of this size, or of so many of its standard errors, is zero if the misfit stays.
_ZERO, _ERRORS, _WORSE = 1e-6, 5.0, 2.0


def simplify(whole: Subspace, found: Sequence[Found], families: Sequence[Family]) -> list[Found]:
    """Return the samples again, each in the family of fewest parameters that still fits it.

    A sample found with more freedom than it needs carries needless error. Without noise a simpler
    family fits if it is within the gradient's rounding; under noise it must also lose less than
    the Bayesian information criterion grants a parameter.
    """
    simple: list[Found] = []
    for one in found:
        rest, excess = one.roots, excess_of(whole, one.roots)
        for family in sorted(families, key=lambda f: f.parameters):
            if not len(rest.a):
                break
            if family == one.family or not _contains(one.family, family):
                continue
            trial = _within(whole, rest, family)
            fits = belongs(whole, trial) & _same(whole, trial, rest)
            if whole.noisy:
                fits &= _cheap(whole, trial, excess, one.family.parameters - family.parameters)
            if bool(fits.any()):
                simple.append(Found(trial.take(fits), family))
            rest, excess = rest.take(~fits), excess[~fits]
        if len(rest.a):
            simple.append(Found(rest, one.family))
    return simple


def prune(whole: Subspace, a: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
    """Drop the label parameters of a whole batch that are zero to within their own errors.

    For labels that were all taken to be of one family. Takes and returns coordinates (N, n) and
    labels; a batch that then misses its gradient is returned as it was.
    """
    solved = polish(whole, a, labels)
    variance = solved.misfit**2 / max(1, solved.freedom)
    errors = (variance * solved.covariance.diagonal(dim1=1, dim2=2)).clamp(min=0.0).sqrt()
    small = solved.labels.weights.abs() < _ERRORS * errors[:, whole.size :] + _ZERO
    pairs = small.clone()
    pairs[:, -1] = False
    for zero in (small, pairs):
        if not bool((zero & labels.used).any()):
            continue
        kept = labels.used & ~zero
        fewer = replace(
            solved.labels,
            used=kept,
            basis=solved.labels.basis * kept[:, None],
            weights=solved.labels.weights * kept,
        )
        again = polish(whole, solved.a, fewer)
        if again.misfit < _WORSE * max(solved.misfit, expected_misfit(whole, again)):
            return again.a, again.labels
    return solved.a, solved.labels


def _contains(larger: Family, smaller: Family) -> bool:
    return smaller.support <= larger.support and smaller.base <= larger.base


def _within(whole: Subspace, roots: Roots, family: Family) -> Roots:
    """Solve again from ``roots`` with the classes of largest weight that ``family`` has."""
    top = roots.weights.topk(family.support, 1).indices
    return Equations(whole, family.base).descend(roots.a, roots.classes.gather(1, top), _STEPS)


def _same(whole: Subspace, trial: Roots, roots: Roots) -> Tensor:
    """Return (K,) whether each trial is still the sample it started from, and not another one."""
    share = (trial.a / whole.values * roots.c).sum(1) / whole.mass
    return (share - 1.0).abs() < _STILL


def _cheap(whole: Subspace, trial: Roots, excess: Tensor, fewer: int) -> Tensor:
    """Return (M,) whether leaving out ``fewer`` parameters loses less than they cost."""
    inflation = excess.clamp(min=1.0)
    lost = whole.classes * (excess_of(whole, trial) - excess) / inflation
    return lost < 2.0 * _PENALTY * fewer * math.log(whole.classes)
