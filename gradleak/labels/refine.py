"""Refining candidate scales and weighing the families against each other (§3).

Given the scale, a family's base and weights follow in closed form, so each candidate is a
one-dimensional least-squares problem in log|s|, with the inverse variances of rounding and noise
as weights. The families are compared by the Laplace approximation of their evidence: a parameter
that the gradient determines sharply must pay for its freedom, one that it does not determine costs
nothing and proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.linalg import vecdot

from gradleak.labels.problem import FamilyTable, Point, ScaleProblem, largest_first

# Steps of the descent. One is needed while it gains more than _GAIN in χ², and either
# a fit is in reach, χ² per class below _HOPELESS, or χ² still falls by the factor _FALLS.
_STEPS, _GAIN, _HOPELESS, _FALLS = 8, 0.05, 100.0, 0.1
# The last step is not looked at again but followed in a straight line, if it is no longer than
# _STRAIGHT and what that misses, about step² in units of the standard error, is below _CURVED.
_STRAIGHT, _CURVED = 1e-3, 1e-3
# How far the descent may lead in log|s|: χ² has a trivial zero at |s| → ∞, where δ vanishes.
_FARTHEST = 0.9
# Where nothing feasible fits to so many roundings, squared, or so many worse than what is not
# feasible, every family starts again at the best few scales of all families.
_STUCK, _SHARED, _ROUNDS = 25.0, 4, 2
_LARGEST_STEP = 0.3
# Relative rounding of a probability at which it says nothing any more.
_SCRAMBLED = 0.05
# Probability beyond the three largest classes below which a larger family may be flat in s.
_SATURATED = 1e-2
_NEARBY = (-1e-1, -1e-2, -1e-3, 1e-3, 1e-2, 1e-1)
# Prior width of log|s| in the evidence: the features of real networks span about five decades.
_LOG_SCALE_PRIOR = math.log(1e5)
# A label parameter smaller than this many roundings of a probability is zero.
_NEGLIGIBLE, _NEGLIGIBLE_AT_MOST = 16.0, 1e-4
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
class _Choice:
    """The families of M candidates: ``family`` (M,), and the rows of the table that they are."""

    family: Tensor
    support: Tensor
    free: Tensor
    outside: Tensor

    @classmethod
    def of(cls, table: FamilyTable, family: Tensor) -> _Choice:
        return cls(family, table.support[family], table.free[family], table.outside[family])


@cache
def _choice(table: FamilyTable, each: int) -> _Choice:
    """Return the choice of ``each`` candidates for every family in turn."""
    with torch.inference_mode(False):
        count = torch.arange(len(table.support), device=table.support.device)
        return _Choice.of(table, count.repeat_interleave(each))


@dataclass(frozen=True)
class _Residual:
    """Least-squares terms of M candidates at one scale each: (B, M, C) or (B, M).

    ``weight`` is the inverse ``variance`` outside the support, ``total`` its sum, ``objective`` χ²,
    ``promise`` what a Gauss–Newton ``step`` in log|s| would leave of it.
    """

    point: Point
    top: Tensor
    weight: Tensor
    variance: Tensor
    total: Tensor
    base: Tensor
    slope_base: Tensor
    gradient: Tensor
    curvature: Tensor
    objective: Tensor
    promise: Tensor
    step: Tensor


def refine(problem: ScaleProblem, candidates: Tensor, table: FamilyTable) -> Fits:
    """Bring candidate scales (B, F, K) to the nearest least-squares scale of their family.

    Families that end beside their root start again where the others got to.
    """
    fits = _settle(problem, candidates, table)
    for _ in range(_ROUNDS):
        (index,) = torch.where(_stuck(problem, fits))
        if not len(index):
            break
        misfit = fits.chi2[index] / fits.freedom[index].clamp(min=1)
        lowest = misfit.topk(min(_SHARED, misfit.shape[1]), -1, largest=False).indices
        shared = fits.scale[index].gather(-1, lowest)
        shared = shared[:, None].expand(-1, len(table.support), -1)
        fits = _joined(fits, _settle(problem.part(index), shared, table), index)
    return _with_neighbours(problem, fits, table)


def _settle(problem: ScaleProblem, candidates: Tensor, table: FamilyTable) -> Fits:
    """Descend from candidate scales (B, F, K) and describe the ends."""
    choice = _choice(table, candidates.shape[2])
    now = _descend(problem, candidates.flatten(1), choice)
    return _describe(problem, now, choice, scale_known=False)


def _stuck(problem: ScaleProblem, fits: Fits) -> Tensor:
    """Return (B,) whether what fits best is not feasible, or nothing fits at all.

    Where two classes change places in the support, a family has a false minimum beside its root;
    a larger family, which holds both classes, has not, and its weights tell that it is too large.
    """
    feasible = torch.where(fits.feasible, fits.chi2, math.inf).amin(-1)
    missing = (_quality(fits).amin(-1) > _STUCK) | (feasible > fits.chi2.amin(-1) + _STUCK)
    return (problem.noise == 0) & missing


def _quality(fits: Fits) -> Tensor:
    """Return (B, M) the misfit by degree of freedom, inf where the label is not feasible."""
    return torch.where(fits.feasible, fits.chi2 / fits.freedom.clamp(min=1), math.inf)


def _with_neighbours(problem: ScaleProblem, fits: Fits, table: FamilyTable) -> Fits:
    """Add to the fits of a saturated softmax every family just beside the best of them."""
    evidence = log_evidence(problem, fits, table, torch.ones_like(problem.sigma))
    likeliest = evidence.masked_fill(~fits.feasible, -math.inf)
    chosen = torch.stack([_quality(fits).argmin(-1), likeliest.argmax(-1)], -1)
    answers = fits.scale.gather(-1, chosen)
    (index,) = torch.where((problem.noise == 0) & _saturated(problem, answers))
    if not len(index):
        return fits
    # A label at the edge of what a larger family allows is one of many if that family is flat
    # there: ask every family just inside.
    around = (answers[index][..., None] * (1.0 + answers.new_tensor(_NEARBY))).flatten(1)
    choice = _choice(table, around.shape[1])
    part = problem.part(index)
    near = _residual(part, around.repeat(1, len(table.support)), choice)
    return _joined(fits, _describe(part, near, choice, scale_known=False), index)


def _joined(fits: Fits, more: Fits, index: Tensor) -> Fits:
    """Append candidates of the problems in ``index``; the others get ones that fit nothing."""
    fields = {"family": torch.cat([fits.family, more.family])}
    for name, value in vars(fits).items():
        if name != "family":
            new = getattr(more, name)
            wide = new.new_full((len(value), *new.shape[1:]), math.inf if name == "chi2" else 0)
            wide[index] = new
            fields[name] = torch.cat([value, wide], 1)
    return Fits(**fields)


def _saturated(problem: ScaleProblem, scales: Tensor) -> Tensor:
    """Return (B,) whether at any of ``scales`` (B, M) a few classes have all the probability."""
    p = problem.at(scales).p
    beyond = p.sum(-1) - p.topk(min(3, p.shape[-1]), -1).values.sum(-1)
    return (beyond < _SATURATED).any(-1)


def describe(
    problem: ScaleProblem, scale: Tensor, family: Tensor, table: FamilyTable, *, scale_known: bool
) -> Fits:
    """Fit the label parameters of each family at scales ``(B, M)`` and state their errors.

    ``scale_known`` holds the scale fixed (a bias gradient gives it) instead of counting it as an
    unknown of the fit.
    """
    choice = _Choice.of(table, family)
    now = _residual(problem, scale, choice)
    return _describe(problem, now, choice, scale_known=scale_known)


def _describe(problem: ScaleProblem, now: _Residual, choice: _Choice, *, scale_known: bool) -> Fits:
    """Fit the label parameters at the scales of ``now``, as :func:`describe` does."""
    point, top, free, step = now.point, now.top, choice.free, now.step
    step = torch.zeros_like(step) if scale_known else step * (step.abs() <= _STRAIGHT)
    base = now.base + step * now.slope_base
    chi2 = now.objective + step * (2.0 * now.gradient + step * now.curvature)
    outside = choice.outside[:, : top.shape[-1]]
    inside = 1.0 - outside
    log_error = now.curvature.rsqrt()
    if scale_known:
        log_error = problem.unit[:, None].expand_as(log_error)
    base_sharpness = now.total.rsqrt() * free
    slope = point.slope.gather(-1, top)
    weights = torch.addcmul(point.y.gather(-1, top), slope, step[..., None])
    own = (weights, slope, now.variance.gather(-1, top).sqrt())
    # With one class the label sums to one by itself: its weight is known from the base.
    rest = problem.classes - 1
    alone = (1.0 - rest * base, -rest * now.slope_base, rest * base_sharpness)
    single = (choice.support == 1)[:, None] & (outside == 0.0)
    parts = torch.where(single, torch.stack(alone)[..., None], torch.stack(own))
    weights, slope, sharpness = parts[0], parts[1] * inside, parts[2] * inside
    equations = ((now.weight > 0) & point.informative()).sum(-1)
    fits = Fits(
        scale=point.scale * step.exp(),
        family=choice.family,
        top=top,
        weights=weights,
        base=base,
        chi2=chi2.clamp(min=0.0),
        freedom=equations - free.long() - int(not scale_known),
        scale_error=log_error,
        weight_error=torch.hypot(sharpness, slope * log_error[..., None]),
        base_error=torch.hypot(base_sharpness, now.slope_base * log_error),
        weight_sharpness=sharpness,
        base_sharpness=base_sharpness,
        feasible=free > 0,
    )
    return _with_feasibility(problem, fits, point, choice, scale_known)


def log_evidence(
    problem: ScaleProblem, fits: Fits, table: FamilyTable, inflation: Tensor
) -> Tensor:
    """Return (B, M) the Laplace log evidence of each fit under uniform priors.

    Priors: log|s| over five decades, each mixture weight over (0, 1), the base over (0, 1/C), and
    under noise every choice of the support's classes alike.
    ``inflation`` (B,) scales the variances where even the best fit exceeds the noise model. A
    parameter that is worse determined than its prior contributes nothing.
    """
    spread = (2.0 * math.pi * inflation).sqrt()[:, None]
    parameters = (fits.scale_error / _LOG_SCALE_PRIOR, fits.base_sharpness * problem.classes)
    errors = torch.cat([torch.stack(parameters, -1), fits.weight_sharpness], -1)
    volumes = (errors * spread[..., None]).clamp(1e-30, 1.0).log()
    has = table.has[fits.family, : volumes.shape[-1]]
    volume = volumes.masked_fill(~has, 0.0).sum(-1)
    if problem.noisy:
        # Without noise a fit of the wrong classes is no fit; under it the best of many may be one.
        noisy = (problem.noise > 0).to(volume.dtype)[:, None]
        volume = volume - noisy * _log_choices(problem.classes, table.support[fits.family])
    return volume - 0.5 * fits.chi2 / inflation[:, None]


def _log_choices(classes: int, support: Tensor) -> Tensor:
    """Return log of the number of supports of each size (M,) among ``classes``."""
    k = support.double() + 1.0
    c = torch.full_like(k, classes + 1.0)
    return torch.lgamma(c) - torch.lgamma(k) - torch.lgamma(c - support)


def _descend(problem: ScaleProblem, scale: Tensor, choice: _Choice) -> _Residual:
    """Gauss–Newton in log|s| from ``scale`` (B, M); returns the terms at the best points met.

    A problem is left alone when none of its candidates that may still fit gains by another step,
    so that its answer does not depend on the batch.
    """
    hopeless = _HOPELESS * problem.classes
    settled = scale.clone()
    index = torch.arange(len(scale), device=scale.device)
    start, moved, part = scale, torch.zeros_like(scale), problem
    best, lowest = scale, torch.full_like(scale, math.inf)
    for left in range(_STEPS, -1, -1):
        now = _residual(part, scale, choice)
        step = now.step
        best = torch.where(now.objective > lowest, best, scale)
        lowest = torch.fmin(now.objective, lowest)
        # A family without an equation left has no numbers here, and is never worth a step.
        worth = now.promise < (_FALLS * now.objective).clamp_(min=hopeless)
        gain = now.objective - now.promise
        worth &= (gain > _GAIN) & (gain.sqrt() * step.abs() > _CURVED)
        more = worth.any(1).tolist() if left else [False] * len(scale)
        if not all(more):
            worse = (now.objective > lowest * (1.0 + _GAIN) + _GAIN) & (lowest < hopeless)
            settled[index] = torch.where(worse.any(1, keepdim=True), best, scale)
            if not any(more):
                unmoved = len(index) == len(settled) and bool((settled == scale).all())
                return now if unmoved else _residual(problem, settled, choice)
            keep = torch.tensor([b for b, again in enumerate(more) if again], device=scale.device)
            index, part = index[keep], part.part(keep)
            state = (start, moved, best, lowest, step)
            start, moved, best, lowest, step = (tensor[keep] for tensor in state)
        moved = (moved + step).clamp(-_FARTHEST, _FARTHEST)
        scale = start * moved.exp()
    raise AssertionError("the last step settles every problem")


def _residual(problem: ScaleProblem, scale: Tensor, choice: _Choice) -> _Residual:
    """Evaluate y(s) − base over the classes outside the support, and the Gauss–Newton step."""
    point = problem.at(scale)
    top = largest_first(point.y, choice.outside.shape[1])
    outside = choice.outside[:, : top.shape[-1]].expand(top.shape)
    variance = problem.variance(point)
    weight = variance.reciprocal()
    weight.scatter_(-1, top, weight.gather(-1, top) * outside)
    total = weight.sum(-1).clamp_(min=_TINY)
    share = choice.free / total
    both = torch.stack([point.y, point.slope], -2)
    bases = vecdot(weight[..., None, :], both) * share[..., None]
    both -= bases[..., None]
    # Sums over the classes of residual², residual · slope and slope²: one product of matrices.
    products = (both * weight[..., None, :]) @ both.mT
    objective, gradient = products[..., 0, 0], products[..., 0, 1]
    curvature = products[..., 1, 1].clamp(min=_TINY)
    step = (-gradient / curvature).clamp(-_LARGEST_STEP, _LARGEST_STEP)
    promise = (objective + step * (2.0 * gradient + step * curvature)).clamp(min=0.0)
    return _Residual(
        point=point,
        top=top,
        weight=weight,
        variance=variance,
        total=total,
        base=bases[..., 0],
        slope_base=bases[..., 1],
        gradient=gradient,
        curvature=curvature,
        objective=objective,
        promise=promise,
        step=step,
    )


def _with_feasibility(
    problem: ScaleProblem, fits: Fits, point: Point, choice: _Choice, scale_known: bool
) -> Fits:
    """Keep the labels of the simplex whose every parameter is more than a rounding."""
    outside = choice.outside[:, : fits.top.shape[-1]] > 0.0
    rounding = problem.rounding(point)
    floor = (_NEGLIGIBLE * rounding).clamp(max=_NEGLIGIBLE_AT_MOST)
    weight_floor, base_floor = floor, floor
    if problem.noisy:
        # Under noise a parameter may be small; the evidence decides whether it is there.
        noisy = (problem.noise > 0)[:, None]
        slack = 6.0 * fits.weight_error.amax(-1).clamp(max=0.1)
        weight_floor = torch.where(noisy, -slack, floor)
        slack = 6.0 * fits.base_error.clamp(max=0.1)
        base_floor = torch.where(noisy, -slack * problem.classes, floor)
    above = (fits.weights - fits.base[..., None] > weight_floor[..., None]) | outside
    positive = (fits.base * problem.classes > base_floor) | (choice.free == 0.0)
    # Where the rounding of the logits alone scrambles the probabilities, everything fits.
    feasible = above.all(-1) & positive & (rounding < _SCRAMBLED)
    # Classes that float32 has rounded away fit any scale; they are equations all the same.
    least = choice.support + choice.free + int(not scale_known)
    return replace(fits, feasible=feasible & (least < problem.classes))
