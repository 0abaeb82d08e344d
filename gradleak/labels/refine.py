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
from torch.linalg import vecdot

from gradleak.labels.problem import FamilyTable, Point, ScaleProblem, largest_first, rest_mask

_UNIFORM_STEPS, _WEIGHTED_STEPS = 2, 3
# Where nothing feasible fits to so many roundings, squared, or so many worse than what is not
# feasible, every family starts again at the best few scales of all families.
_STUCK, _SHARED, _ROUNDS = 25.0, 4, 2
# Candidates of a family that survive the first descent.
_SURVIVORS = 2
_LARGEST_STEP = 0.3
_SAME_SCALE = 1e-6
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
    """The families of M candidates: ``free`` (M,) 0 or 1, and the support among the K largest."""

    count: int
    free: Tensor
    inside: Tensor
    outside: Tensor

    @classmethod
    def of(cls, table: FamilyTable, family: Tensor, dtype: torch.dtype) -> _Choice:
        support = table.support[family]
        count = int(table.support.max())
        inside = torch.arange(count, device=support.device) < support[:, None]
        return cls(count, table.base[family].to(dtype), inside, (~inside).to(dtype))


@dataclass(frozen=True)
class _Residual:
    """Least-squares terms of M candidates at one scale each: (B, M, C) or (B, M)."""

    point: Point
    top: Tensor
    weight: Tensor
    base: Tensor
    slope_base: Tensor
    curvature: Tensor
    objective: Tensor
    step: Tensor


def refine(problem: ScaleProblem, candidates: Tensor, table: FamilyTable) -> Fits:
    """Bring candidate scales (B, F, K) to the nearest least-squares scale of their family.

    The few best distinct ones of each family go through the weighted descent and are described.
    """
    scale, family = _flatten(candidates)
    scale, rho = _descend(problem, scale, table, family, weighted=False, steps=_UNIFORM_STEPS)
    rho, order = rho.view(candidates.shape).sort(-1)
    scale = scale.view(candidates.shape).gather(-1, order)
    # Two candidates that met at the same scale are one.
    same = (scale[..., 1:] / scale[..., :-1] - 1.0).abs() < _SAME_SCALE
    rho[..., 1:].masked_fill_(same, math.inf)
    best = rho.topk(min(_SURVIVORS, rho.shape[-1]), -1, largest=False).indices
    scale, family = _flatten(scale.gather(-1, best))
    scale, _ = _descend(problem, scale, table, family, weighted=True, steps=_WEIGHTED_STEPS)
    fits = describe(problem, scale, family, table, scale_known=False)
    for _ in range(_ROUNDS):
        (index,) = torch.where(_stuck(problem, fits))
        if not len(index):
            break
        part, misfit = problem.part(index), fits.chi2[index] / fits.freedom[index].clamp(min=1)
        lowest = misfit.topk(min(_SHARED, misfit.shape[1]), -1, largest=False).indices
        shared = fits.scale[index].gather(-1, lowest)
        more, family = _flatten(shared[:, None].expand(-1, len(table.support), -1))
        more, _ = _descend(part, more, table, family, weighted=True, steps=_WEIGHTED_STEPS)
        fits = _joined(fits, describe(part, more, family, table, scale_known=False), index)
    return _with_neighbours(problem, fits, table)


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
    scale = fits.scale
    quality = _quality(fits)
    evidence = log_evidence(problem, fits, table, torch.ones_like(problem.sigma))
    likeliest = evidence.masked_fill(~fits.feasible, -math.inf)
    chosen = torch.stack([quality.argmin(-1), likeliest.argmax(-1)], -1)
    answers = scale.gather(-1, chosen)
    doubtful = (problem.noise == 0) & _saturated(problem, answers)
    (index,) = torch.where(doubtful)
    if not len(index):
        return fits
    # A label at the edge of what a larger family allows is one of many if that family is flat
    # there: ask every family just inside.
    nearby = 1.0 + torch.tensor(_NEARBY, dtype=scale.dtype, device=scale.device)
    around = (answers[index][..., None] * nearby).flatten(1)
    more = torch.arange(len(table.support), device=scale.device)
    more, around = more.repeat_interleave(around.shape[1]), around.repeat(1, len(more))
    return _joined(
        fits, describe(problem.part(index), around, more, table, scale_known=False), index
    )


def _joined(fits: Fits, more: Fits, index: Tensor) -> Fits:
    """Append candidates of the problems in ``index``; the other problems get infeasible ones."""
    fields = {"family": torch.cat([fits.family, more.family])}
    for name, value in vars(fits).items():
        if name != "family":
            new = getattr(more, name)
            wide = new.new_zeros((len(value), *new.shape[1:]))
            wide[index] = new
            fields[name] = torch.cat([value, wide], 1)
    return Fits(**fields)


def _saturated(problem: ScaleProblem, scales: Tensor) -> Tensor:
    """Return (B,) whether at any of ``scales`` (B, M) a few classes have all the probability."""
    p = problem.at(scales).p
    beyond = p.sum(-1) - p.topk(min(3, p.shape[-1]), -1).values.sum(-1)
    return (beyond < _SATURATED).any(-1)


def _flatten(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scales (B, F, K) into (B, M), M = F·K, and the table index (M,) of each."""
    family = torch.arange(scale.shape[1], device=scale.device)
    return scale.flatten(1), family.repeat_interleave(scale.shape[2])


def describe(
    problem: ScaleProblem, scale: Tensor, family: Tensor, table: FamilyTable, *, scale_known: bool
) -> Fits:
    """Fit the label parameters of each family at scales ``(B, M)`` and state their errors.

    ``scale_known`` holds the scale fixed (a bias gradient gives it) instead of counting it as an
    unknown of the fit.
    """
    support, free = table.support[family], table.base[family]
    choice = _Choice.of(table, family, scale.dtype)
    now = _residual(problem, scale, choice, weighted=True)
    point, top = now.point, now.top
    known = problem.unit[:, None].expand_as(scale)
    log_error = known if scale_known else now.curvature.rsqrt()
    variance = problem.variance(point)
    weights = point.y.gather(-1, top)
    sharpness = variance.gather(-1, top).sqrt()
    slope = point.slope.gather(-1, top)
    base_sharpness = now.weight.sum(-1).clamp(min=_TINY).rsqrt()
    inside = choice.inside[:, : top.shape[-1]]
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
    return _with_feasibility(problem, fits, point, inside, free, scale_known)


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
    support, free = table.support[fits.family], table.base[fits.family]
    volume = (fits.scale_error * spread / _LOG_SCALE_PRIOR).clamp(1e-30, 1.0).log()
    base = (fits.base_sharpness * spread * problem.classes).clamp(1e-30, 1.0).log()
    weights = (fits.weight_sharpness * spread[..., None]).clamp(1e-30, 1.0).log()
    order = torch.arange(fits.top.shape[-1], device=support.device)
    mixture = (order > 0) & (order < support[:, None])
    volume = volume + torch.where(free, base, 0.0)
    if problem.noisy:
        # Without noise a fit of the wrong classes is no fit; under it the best of many may be one.
        noisy = (problem.noise > 0).to(volume.dtype)[:, None]
        volume = volume - noisy * _log_choices(problem.classes, support)
    volume = volume + torch.where(mixture, weights, 0.0).sum(-1)
    return volume - 0.5 * fits.chi2 / inflation[:, None]


def _log_choices(classes: int, support: Tensor) -> Tensor:
    """Return log of the number of supports of each size (M,) among ``classes``."""
    k = support.double() + 1.0
    c = torch.full_like(k, classes + 1.0)
    return torch.lgamma(c) - torch.lgamma(k) - torch.lgamma(c - support)


def _descend(
    problem: ScaleProblem,
    scale: Tensor,
    table: FamilyTable,
    family: Tensor,
    *,
    weighted: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Gauss–Newton in log|s|, all candidates at once; the best point met is kept.

    Returns the scales and objectives (B, M).
    """
    choice = _Choice.of(table, family, scale.dtype)
    now = _residual(problem, scale, choice, weighted=weighted)
    best, lowest = scale, now.objective
    for _ in range(steps):
        scale = scale * now.step.exp()
        now = _residual(problem, scale, choice, weighted=weighted)
        better = now.objective < lowest
        best = torch.where(better, scale, best)
        lowest = torch.where(better, now.objective, lowest)
    return best, lowest


def _residual(
    problem: ScaleProblem, scale: Tensor, choice: _Choice, *, weighted: bool
) -> _Residual:
    """Evaluate y(s) − base over the classes outside the support, and the Gauss–Newton step."""
    point = problem.at(scale)
    top = largest_first(point.y, choice.count)
    weight = rest_mask(point.y, top, choice.outside[:, : top.shape[-1]])
    if weighted:
        weight = weight / problem.variance(point)
    share = choice.free / weight.sum(-1).clamp(min=_TINY)
    base, slope_base = vecdot(weight, point.y) * share, vecdot(weight, point.slope) * share
    residual = point.y - base[..., None]
    jacobian = point.slope - slope_base[..., None]
    pull = weight * residual
    objective, gradient = vecdot(pull, residual), vecdot(pull, jacobian)
    curvature = vecdot(weight * jacobian, jacobian).clamp(min=_TINY)
    if not weighted:  # in units of the gradient, or growing scales would shrink it (§3)
        square, mean = vecdot(weight * point.delta, point.delta), vecdot(weight, point.delta)
        objective = objective / (square - mean.square() * share).clamp(min=_TINY)
    step = (-gradient / curvature).clamp(-_LARGEST_STEP, _LARGEST_STEP)
    return _Residual(point, top, weight, base, slope_base, curvature, objective, step)


def _with_feasibility(
    problem: ScaleProblem,
    fits: Fits,
    point: Point,
    inside: Tensor,
    free: Tensor,
    scale_known: bool,
) -> Fits:
    """Keep the labels of the simplex whose every parameter is more than a rounding."""
    floor = (_NEGLIGIBLE * problem.rounding(point)).clamp(max=_NEGLIGIBLE_AT_MOST)
    noisy = (problem.noise > 0)[:, None]
    # Under noise a parameter may be small; the evidence decides whether it is there.
    floor = torch.where(noisy, 0.0, floor)
    slack = torch.where(noisy, 6.0 * fits.weight_error.amax(-1).clamp(max=0.1), 0.0)
    above = fits.weights - fits.base[..., None] > (floor - slack)[..., None]
    slack = torch.where(noisy, 6.0 * fits.base_error.clamp(max=0.1), 0.0)
    positive = fits.base * problem.classes > floor - slack * problem.classes
    feasible = (above | ~inside).all(-1) & (positive | ~free)
    # Where the rounding of the logits alone scrambles the probabilities, everything fits.
    feasible = feasible & (problem.rounding(point) < _SCRAMBLED)
    # Classes that float32 has rounded away fit any scale; they are equations all the same.
    rest = problem.classes - inside.sum(-1) - free.long() - int(not scale_known)
    return Fits(**{**fits.__dict__, "feasible": feasible & (rest >= 1)})
