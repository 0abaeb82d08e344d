"""One sample whose loss carries an unknown factor: G = γ (p − y) xᵀ (ALGORITHMS §2–3).

With a bias gradient x is right whatever γ is, and y = p − δ/γ is a line: hard, smoothed and mixed
labels fix γ, an arbitrary label leaves it open. Without one, (s, γ) are two unknowns: the shape of
δ outside the support is that of p(s), so both follow where the logits differ enough. A search over
a grid of loss scales starts the climb to the maximum of the likelihood, in which γ is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.labels.answer import Solved
from gradleak.labels.decide import Decision
from gradleak.labels.gaussian import Observation
from gradleak.labels.maxima import find_maxima
from gradleak.labels.noisy import laid_out
from gradleak.labels.problem import FamilyTable
from gradleak.labels.profile import with_intervals
from gradleak.labels.starts import Factors, factorise_noisy
from gradleak.labels.verdict import SampleLabel
from gradleak.labels.weigh import weigh
from gradleak.softlabels import ARBITRARY, Family

# The grid of loss scales: decades below and above 1, and points in each.
_BELOW, _ABOVE, _POINTS = 4, 6, 6
# Roundings of a probability: a few, and as many as the logits are large.
_ROUNDINGS = 4.0
# Range of the logits beyond which a softmax is saturated.
_SATURATED = 200.0


def solve_unknown_scale(
    seen: Observation, unit: Tensor, exact: Sequence[bool], families: Sequence[Family]
) -> Solved:
    """Answer for B gradients of one sample each whose loss scale γ is unknown.

    ``unit`` (B,) is the roundoff of their precision, the noise of those that are ``exact``.
    """
    table = FamilyTable.of(families, unit.device)
    decisions, features = [], []
    for b in range(len(unit)):
        rows = torch.tensor([b], device=unit.device)
        one, _ = seen.rows(rows, None)
        decision, feature = _solve_one(one, unit[rows], exact[b], families, table)
        decisions.append(decision)
        features.append(feature)
    return laid_out(seen, decisions, torch.stack(features))


def _solve_one(
    seen: Observation, unit: Tensor, exact: bool, families: Sequence[Family], table: FamilyTable
) -> tuple[Decision, Tensor]:
    if exact:
        seen = seen.with_noise(_rounding(seen, unit, seen.squares.sqrt(), 1.0))
    factors = factorise_noisy(seen, unit)
    grid = _grid(factors)
    found = find_maxima(seen, factors, table, loss_scales=grid)
    best = int(found.chi2.nan_to_num(math.inf).argmin())
    if exact:  # the rounding that the answer's own logits and feature explain
        size = (found.loss_scale * found.scale.abs())[:, best]
        logits = seen.weight[0] @ found.model.feature[0, best] + seen.bias[0]
        seen = seen.with_noise(_rounding(seen, unit, size, float(logits.abs().amax())))
    # Once more with every family at the loss scale that one of them found.
    grid = torch.cat([grid, found.loss_scale[0, best, None]])
    found = find_maxima(seen, factors, table, loss_scales=grid)
    chosen = weigh(found, families, seen.classes, loss_scale_free=True)
    (choice,) = with_intervals(chosen, seen, found, loss_scale_free=True)
    if choice is not None:
        return choice.decision, found.model.feature[0, choice.index]
    return _of_no_family(seen, factors)


def _grid(factors: Factors) -> Tensor:
    """Return (K,) loss scales at which the smallest feature does not yet saturate the softmax."""
    a = factors.problem.a
    exponents = torch.arange(-_BELOW * _POINTS, _ABOVE * _POINTS + 1, device=a.device)
    grid = torch.pow(10.0, exponents.double() / _POINTS)
    logits = factors.problem.smallest_scale() * (a.amax(1) - a.amin(1)) / grid
    kept = grid[logits < _SATURATED]
    return kept if len(kept) else grid[-1:]


def _rounding(seen: Observation, unit: Tensor, size: Tensor, logit: float) -> Tensor:
    """Return (1,) the rounding of an entry of γ p xᵀ, ``size`` (1,) being γ‖x‖.

    It is that of p, a few units and as many as the largest ``logit``.
    """
    return (_ROUNDINGS + logit) * unit * size / math.sqrt(seen.gradient.shape[2])


def _of_no_family(seen: Observation, factors: Factors) -> tuple[Decision, Tensor]:
    """No family fits: with a bias gradient the feature is right all the same."""
    direction = factors.direction[0]
    if factors.known is None:
        return Decision(
            "unidentifiable",
            "no label family fits with any loss scale: without a bias gradient neither the "
            "feature's scale nor that of the loss is determined",
        ), torch.zeros_like(direction)
    feature = factors.known[0] * direction
    p = torch.softmax(seen.weight[0] @ feature + seen.bias[0], -1)
    delta = factors.problem.sigma[0] / factors.known[0] * factors.problem.u[0]
    least = float((delta / p.clamp(min=1e-300)).amax())
    label = (p - delta / least).clamp(min=0.0)
    label = label / label.sum()
    order = label.argsort(descending=True)
    answer = SampleLabel(
        family=ARBITRARY,
        classes=tuple(order.tolist()),
        weights=tuple(label[order].tolist()),
        base=0.0,
        scale=float(torch.linalg.vector_norm(feature)),
        weight_errors=tuple((p - label).abs()[order].tolist()),
        base_error=0.0,
        scale_error=0.0,
        loss_scale=least,
        loss_scale_error=math.inf,
    )
    reason = (
        "no label family fits: the bias gradient gives the feature, but every loss scale from "
        f"{least:.4g} upwards gives a valid label"
    )
    return Decision("unidentifiable", reason, answer), feature
