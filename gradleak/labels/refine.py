"""Refining candidate scales and weighing the families against each other (§3).

Given the scale, a family's base and weights follow in closed form, so each candidate is a
one-dimensional least-squares problem in log|s|: first with equal weights (the scale-free ρ), then
with the inverse variances of rounding and noise. The families are compared by the Laplace
approximation of their evidence: a parameter that the gradient determines sharply must pay for its
freedom, one that it does not determine costs nothing and proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.problem import FamilyTable, Point, ScaleProblem, largest_first, rest_mask
from gradleak.labels.search import Candidates

_UNIFORM_STEPS, _WEIGHTED_STEPS = 5, 6
# Candidates of a family that survive the first descent.
_SURVIVORS = 2
_LARGEST_STEP = 0.3
_CONVERGED = 1e-13
# Prior width of log|s| in the evidence: the features of real networks span about five decades.
_LOG_SCALE_PRIOR = math.log(1e5)
# A label parameter smaller than this many roundings of a probability is zero.
_NEGLIGIBLE = 16.0
_TINY = 1e-300


@dataclass(frozen=True)
class Fits:
    """Refined candidates, all tensors (B, M) unless stated.

    ``family`` (M,) is the table index, ``top`` (B, M, K) the classes of the largest label entries,
    ``weights`` (B, M, K) their values, ``base`` the value elsewhere; ``chi2`` the weighted sum of
    squares over ``freedom`` = equations − unknowns; ``scale_error`` the standard error of log|s|,
    ``weight_error`` and ``base_error`` those of the label with the scale's own included;
    ``*_sharpness`` the same with the scale held fixed; ``feasible`` whether the label lies in the
    simplex and uses all its parameters.
    """

    scale: Tensor
    family: Tensor
    top: Tensor
    weights: Tensor
    base: Tensor
    chi2: Tensor
    freedom: Tensor
    scale_error: Tensor
    weight_error: Tensor
    base_error: Tensor
    weight_sharpness: Tensor
    base_sharpness: Tensor
    feasible: Tensor


@dataclass(frozen=True)
class _Residual:
    """Least-squares terms of M candidates at one scale each: (B, M, C) or (B, M)."""

    point: Point
    top: Tensor
    weight: Tensor
    base: Tensor
    slope_base: Tensor
    residual: Tensor
    jacobian: Tensor
    objective: Tensor

    def step(self, damping: Tensor) -> Tensor:
        """Return the damped Gauss–Newton step in log|s|."""
        curvature = (self.weight * self.jacobian.square()).sum(-1)
        gradient = (self.weight * self.residual * self.jacobian).sum(-1)
        move = -gradient / (curvature * (1.0 + damping)).clamp(min=_TINY)
        return move.clamp(-_LARGEST_STEP, _LARGEST_STEP)


def refine(problem: ScaleProblem, candidates: Candidates, table: FamilyTable) -> Fits:
    """Bring every candidate to the nearest least-squares scale of its family and describe it."""
    scale, family = candidates.scale, candidates.family
    scale, rho = _descend(problem, scale, table, family, weighted=False, steps=_UNIFORM_STEPS)
    scale, family = _survivors(scale, rho, family, len(table.support))
    scale, _ = _descend(problem, scale, table, family, weighted=True, steps=_WEIGHTED_STEPS)
    return describe(problem, scale, family, table, scale_known=False)


def _survivors(
    scale: Tensor, rho: Tensor, family: Tensor, families: int
) -> tuple[Tensor, Tensor]:
    """Keep the best distinct candidates (B, M) of every family."""
    kept, kinds = [], []
    for f in range(families):
        mine = scale[:, family == f]
        value, order = rho[:, family == f].sort(-1)
        mine = mine.gather(-1, order)
        # Two candidates that met at the same scale are one.
        same = (mine[:, 1:] / mine[:, :-1] - 1.0).abs() < 1e-6
        value = torch.cat([value[:, :1], torch.where(same, math.inf, value[:, 1:])], -1)
        best = value.topk(min(_SURVIVORS, value.shape[-1]), -1, largest=False).indices
        kept.append(mine.gather(-1, best))
        kinds.append(torch.full((best.shape[-1],), f, device=scale.device))
    return torch.cat(kept, -1), torch.cat(kinds)


def describe(
    problem: ScaleProblem, scale: Tensor, family: Tensor, table: FamilyTable, *, scale_known: bool
) -> Fits:
    """Fit the label parameters of each family at scales ``(B, M)`` and state their errors.

    ``scale_known`` holds the scale fixed (a bias gradient gives it) instead of counting it as an
    unknown of the fit.
    """
    support, free = table.support[family], table.base[family]
    now = _residual(problem, scale, support, free, weighted=True)
    point, top = now.point, now.top
    information = (now.weight * now.jacobian.square()).sum(-1)
    log_error = torch.zeros_like(scale) if scale_known else information.clamp(min=_TINY).rsqrt()
    variance = problem.variance(point)
    weights = point.y.gather(-1, top)
    sharpness = variance.gather(-1, top).sqrt()
    slope = point.slope.gather(-1, top)
    base_sharpness = now.weight.sum(-1).clamp(min=_TINY).rsqrt()
    inside = torch.arange(top.shape[-1], device=top.device) < support[:, None]
    one = support == 1
    # With one class the label sums to one by itself: its weight is known from the base.
    alone = 1.0 - (problem.classes - 1) * now.base
    weights = torch.where(one[:, None] & inside, alone[..., None], weights)
    slope = torch.where(
        one[:, None] & inside, -(problem.classes - 1) * now.slope_base[..., None], slope
    )
    sharpness = torch.where(
        one[:, None] & inside,
        ((problem.classes - 1) * base_sharpness * free)[..., None],
        sharpness,
    )
    base_sharpness = torch.where(free, base_sharpness, 0.0)
    weight_error = (sharpness.square() + (slope * log_error[..., None]).square()).sqrt()
    base_error = (base_sharpness.square() + (now.slope_base * log_error).square()).sqrt()
    base_error = torch.where(free, base_error, 0.0)
    equations = (now.weight > 0).logical_and(point.informative()).sum(-1)
    fits = Fits(
        scale=scale,
        family=family,
        top=top,
        weights=weights,
        base=now.base,
        chi2=now.objective,
        freedom=equations - free.long() - int(not scale_known),
        scale_error=log_error,
        weight_error=torch.where(inside, weight_error, 0.0),
        base_error=base_error,
        weight_sharpness=torch.where(inside, sharpness, 0.0),
        base_sharpness=base_sharpness,
        feasible=torch.ones_like(scale, dtype=torch.bool),
    )
    return _with_feasibility(problem, fits, point, inside, free)


def log_evidence(problem: ScaleProblem, fits: Fits, table: FamilyTable, inflation: Tensor) -> Tensor:
    """Return (B, M) the Laplace log evidence of each fit under uniform priors.

    Priors: log|s| over five decades, each mixture weight over (0, 1), the base over (0, 1/C).
    ``inflation`` (B,) scales the variances where even the best fit exceeds the noise model. A
    parameter that is worse determined than its prior contributes nothing.
    """
    spread = (2.0 * math.pi * inflation).sqrt()[:, None]
    support, free = table.support[fits.family], table.base[fits.family]
    volume = (fits.scale_error * spread / _LOG_SCALE_PRIOR).clamp(1e-30, 1.0).log()
    base = (fits.base_sharpness * spread * problem.classes).clamp(1e-30, 1.0).log()
    weights = (fits.weight_sharpness * spread[..., None]).clamp(1e-30, 1.0).log()
    order = torch.arange(fits.top.shape[-1], device=support.device)
    mixture = (order > 0) & (order < support[:, None])
    volume = volume + torch.where(free, base, 0.0)
    volume = volume + torch.where(mixture, weights, 0.0).sum(-1)
    return volume - 0.5 * fits.chi2 / inflation[:, None]


def _descend(
    problem: ScaleProblem,
    scale: Tensor,
    table: FamilyTable,
    family: Tensor,
    *,
    weighted: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Damped Gauss–Newton in log|s|, all candidates at once; a step that does not help is undone.

    Returns the scales and objectives (B, M).
    """
    support, free = table.support[family], table.base[family]
    now = _residual(problem, scale, support, free, weighted=weighted)
    damping = torch.full_like(scale, 1e-3)
    for _ in range(steps):
        move = now.step(damping)
        if bool((move.abs() < _CONVERGED).all()):
            break
        trial = _residual(problem, scale * move.exp(), support, free, weighted=weighted)
        better = trial.objective < now.objective
        scale = torch.where(better, trial.point.scale, scale)
        damping = torch.where(better, damping * 0.1, damping * 10.0).clamp(1e-12, 1e12)
        now = _choose(better, trial, now)
    return scale, now.objective


def _choose(better: Tensor, new: _Residual, old: _Residual) -> _Residual:
    """Take the new terms where ``better`` (B, M), else the old; only what a step needs."""
    wide = better[..., None]
    return _Residual(
        point=new.point,
        top=new.top,
        weight=torch.where(wide, new.weight, old.weight),
        base=new.base,
        slope_base=new.slope_base,
        residual=torch.where(wide, new.residual, old.residual),
        jacobian=torch.where(wide, new.jacobian, old.jacobian),
        objective=torch.where(better, new.objective, old.objective),
    )


def _residual(
    problem: ScaleProblem, scale: Tensor, support: Tensor, free: Tensor, *, weighted: bool
) -> _Residual:
    """Evaluate y(s) − base over the classes outside the support, with its slope in log|s|."""
    point = problem.at(scale)
    top = largest_first(point.y, int(support.max()))
    rest = rest_mask(point.y, top, support.expand(scale.shape)).to(point.y.dtype)
    weight = rest / problem.variance(point) if weighted else rest
    total = weight.sum(-1).clamp(min=_TINY)
    mean = lambda t: torch.where(free, (weight * t).sum(-1) / total, 0.0)  # noqa: E731
    base, slope_base = mean(point.y), mean(point.slope)
    residual = point.y - base[..., None]
    objective = (weight * residual.square()).sum(-1)
    if not weighted:  # in units of the gradient, or growing scales would shrink it (§3)
        spread = point.delta - mean(point.delta)[..., None]
        objective = objective / (weight * spread.square()).sum(-1).clamp(min=_TINY)
    return _Residual(
        point=point,
        top=top,
        weight=weight,
        base=base,
        slope_base=slope_base,
        residual=residual,
        jacobian=point.slope - slope_base[..., None],
        objective=objective,
    )


def _with_feasibility(
    problem: ScaleProblem, fits: Fits, point: Point, inside: Tensor, free: Tensor
) -> Fits:
    """Keep the labels of the simplex whose every parameter is more than a rounding."""
    floor = _NEGLIGIBLE * problem.rounding(point)
    noisy = (problem.noise > 0)[:, None]
    # Under noise a parameter may be small; the evidence decides whether it is there.
    floor = torch.where(noisy, 0.0, floor)
    slack = torch.where(noisy, 6.0 * fits.weight_error.amax(-1).clamp(max=0.1), 0.0)
    above = fits.weights - fits.base[..., None] > (floor - slack)[..., None]
    slack = torch.where(noisy, 6.0 * fits.base_error.clamp(max=0.1), 0.0)
    positive = fits.base * problem.classes > floor - slack * problem.classes
    feasible = (above | ~inside).all(-1) & (positive | ~free)
    return Fits(**{**fits.__dict__, "feasible": feasible & (fits.freedom >= 1)})
