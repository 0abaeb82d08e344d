"""One sample under noise: the scale search starts, maximum likelihood finishes (ALGORITHMS §3).

The search factorises the gradient first, which spends all its entries on one direction. Near its
roots the likelihood of the whole gradient is climbed for every family, and the families are
compared by their evidence, feature and label integrated out (Laplace's approximation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.labels.factorise import RankOne, leading_triple
from gradleak.labels.gaussian import Model, Observation, squares_of, take
from gradleak.labels.likelihood import Estimate, maximise
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.refine import Fits, describe, refine
from gradleak.labels.search import find_candidates

# Candidates that are climbed besides the best one of every family.
_MORE = 2
# Candidates whose excess over the least sum of squares is this many times that of the best one, or
# that many squared standard deviations above it, do not start.
_HOPELESS, _FAR = 10.0, 1e4
_SWEEPS = 100
_TINY = 1e-300


@dataclass(frozen=True)
class NoisyFits:
    """M maxima of the likelihood for each of B gradients; tensors (B, M) unless stated.

    ``family`` is the table index, ``top`` (B, M, K) the support by descending weight, ``weights``
    (B, M, K) the label there, ``base`` its value elsewhere, ``scale`` the signed norm of the
    feature, ``loss_scale`` γ; every ``*_error`` is one standard error. ``chi2`` is what the family
    adds to the residual of the best rank-one gradient, in units of the noise, with ``freedom``
    degrees of freedom, ``evidence`` its log evidence, ``feature`` (B, M, D).
    """

    family: Tensor
    top: Tensor
    weights: Tensor
    weight_error: Tensor
    base: Tensor
    base_error: Tensor
    scale: Tensor
    scale_error: Tensor
    loss_scale: Tensor
    loss_scale_error: Tensor
    chi2: Tensor
    freedom: Tensor
    evidence: Tensor
    feature: Tensor


def fit_under_noise(
    seen: Observation, table: FamilyTable, unit: float
) -> tuple[NoisyFits, ScaleProblem]:
    """Fit every family of ``table`` to B noisy gradients of one sample each.

    ``unit`` is the roundoff of the gradient's dtype. Returns the fits and the problem of one scalar
    that they started from.
    """
    problem, direction, leading = _search_problem(seen, unit)
    start = refine(problem, find_candidates(problem, table), table)
    if seen.grad_bias is not None:
        start = _with_known_scale(start, problem, 1.0 / leading.v[:, -1], table)
    least = seen.squares - leading.sigma.square()
    model = _model(start, direction, table, seen.classes)
    chosen = _promising(start, squares_of(seen, model) - least[:, None], seen, len(table.support))
    rows = torch.arange(len(chosen), device=chosen.device)
    found = maximise(seen, take(model, rows, chosen))
    family = start.family.expand(len(chosen), -1).gather(1, chosen)
    return _described(found, family, seen, least), problem


def _search_problem(seen: Observation, unit: float) -> tuple[ScaleProblem, Tensor, RankOne]:
    """Factorise the gradient, a bias gradient as its last column, for the search over s.

    Returns the problem, the direction v (B, D) of the feature x = s v, and the factors.
    """
    matrix = seen.gradient
    if seen.grad_bias is not None:
        matrix = torch.cat([matrix, seen.grad_bias[..., None]], -1)
    leading = _leading(matrix, seen.noise, unit)
    direction = leading.v[:, : seen.gradient.shape[2]]
    centred = seen.weight - seen.weight.mean(1, keepdim=True)
    problem = ScaleProblem(
        a=(seen.weight @ direction[..., None]).squeeze(-1),
        b=seen.bias,
        u=leading.u,
        sigma=leading.sigma,
        noise=seen.noise,
        unit=unit,
        weight_norms=torch.linalg.vector_norm(centred, dim=2),
    )
    return problem, direction, leading


def _leading(matrix: Tensor, noise: Tensor, unit: float) -> RankOne:
    """Find the leading singular triple (B, C, D) of noisy matrices to a part of the noise."""
    found = leading_triple(matrix)
    v, sigma = found.v, found.sigma
    for _ in range(_SWEEPS):
        v = (matrix.mT @ (matrix @ v[..., None])).squeeze(-1)
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        before, sigma = sigma, torch.linalg.vector_norm(matrix @ v[..., None], dim=(1, 2))
        if bool((sigma.square() - before.square() <= 1e-2 * noise.square()).all()):
            break
    v = torch.where(v.sum(1, keepdim=True) < 0, -v, v)
    u = (matrix @ v[..., None]).squeeze(-1) / sigma[:, None]
    return RankOne(u=u, sigma=sigma, v=v, residual=found.residual, unit=unit)


def _with_known_scale(
    start: Fits, problem: ScaleProblem, scale: Tensor, table: FamilyTable
) -> Fits:
    """Add the scale (B,) that the bias gradient gives to the candidates of every family."""
    every = torch.arange(len(table.support), device=scale.device)
    known = describe(problem, scale[:, None].expand(-1, len(every)), every, table, scale_known=True)
    joined = {
        name: torch.cat([value, getattr(known, name)], 0 if name == "family" else 1)
        for name, value in vars(start).items()
    }
    return Fits(**joined)


def _promising(start: Fits, excess: Tensor, seen: Observation, families: int) -> Tensor:
    """Return (B, M') the candidates to climb from: the best one of each family and a few more.

    ``excess`` (B, M) is what each adds to the least sum of squares. The hopeless ones, which are
    all but a few where the noise is small, give their place to the best one.
    """
    excess = excess.nan_to_num(math.inf)
    own = torch.stack(
        [torch.where(start.family == f, excess, math.inf).argmin(1) for f in range(families)], 1
    )
    others = excess.scatter(1, own, math.inf)
    more = others.topk(min(_MORE, others.shape[1] - families), 1, largest=False).indices
    chosen = torch.cat([own, more], 1)
    excess, order = excess.gather(1, chosen).sort(1)
    best = excess[:, :1]
    allowed = _HOPELESS * best.clamp(min=0.0) + _FAR * seen.noise[:, None].square()
    alive = excess <= best + allowed
    order = torch.where(alive, order, order[:, :1])
    return chosen.gather(1, order)[:, : int(alive.sum(1).amax().clamp(min=1))]


def _model(start: Fits, direction: Tensor, table: FamilyTable, classes: int) -> Model:
    """Turn candidates (B, M) into hypotheses to climb from."""
    theta = torch.cat(
        [start.weights[..., 1:] - start.base[..., None], classes * start.base[..., None]], -1
    )
    shape = start.scale.shape
    model = Model(
        top=start.top,
        support=table.support[start.family].expand(shape),
        base=table.base[start.family].expand(shape),
        theta=theta,
        feature=start.scale[..., None] * direction[:, None],
        loss_scale=torch.ones_like(start.scale),
    )
    return replace(model, theta=theta * model.active)


def _described(found: Estimate, family: Tensor, seen: Observation, least: Tensor) -> NoisyFits:
    """Turn maxima into labels with standard errors, and weigh them.

    ``least`` (B,) is the residual sum of squares of the best rank-one gradient.
    """
    model, classes = found.model, seen.classes
    theta, active = model.theta, model.active
    to_label = _label_map(theta.shape[-1], classes, theta)
    first = F.one_hot(torch.zeros_like(family), to_label.shape[0])
    inside = torch.arange(to_label.shape[0] - 1, device=family.device) < model.support[..., None]
    entries = theta @ to_label.mT + first
    covariance = found.covariance[..., 1:-1, 1:-1]
    variance = (to_label @ covariance @ to_label.mT).diagonal(dim1=-2, dim2=-1)
    errors = variance.clamp(min=0.0).sqrt()
    weights = torch.where(inside, entries[..., :-1], -math.inf).sort(-1, descending=True)
    turned = weights.indices
    noise = seen.noise[:, None].square()
    chi2 = ((found.squares - least[:, None]) / noise).clamp(min=0.0)
    spare = classes - 2 + int(seen.grad_bias is not None)
    scale_error = found.covariance[..., 0, 0].sqrt()
    return NoisyFits(
        family=family,
        top=model.top.gather(-1, turned),
        weights=torch.where(weights.values > -math.inf, weights.values, 0.0),
        weight_error=torch.where(inside, errors[..., :-1], 0.0).gather(-1, turned),
        base=entries[..., -1],
        base_error=errors[..., -1],
        scale=found.scale,
        scale_error=scale_error,
        loss_scale=model.loss_scale,
        loss_scale_error=found.covariance[..., -1, -1].sqrt(),
        chi2=chi2,
        freedom=spare - active.sum(-1),
        evidence=-0.5 * chi2 + _log_volume(found, noise, classes, seen.weight.shape[2]),
        feature=model.feature,
    )


def _label_map(count: int, classes: int, like: Tensor) -> Tensor:
    """Return (K + 1, K): the label on its K support classes, and elsewhere, per unit of θ."""
    eye = torch.eye(count, dtype=like.dtype, device=like.device)
    rows = torch.cat([-torch.ones_like(eye[:1]), eye], 0)
    rows[1:, -1] = 0.0
    rows[:, -1] += 1.0 / classes
    return rows


def _log_volume(found: Estimate, noise: Tensor, classes: int, width: int) -> Tensor:
    """Return (B, M) the log of the posterior volume over that of the prior (Laplace).

    Priors: log‖x‖ uniform and every direction alike, the weights uniform on their simplex, the
    smoothing on (0, 1), every choice of the support's classes alike. ``noise`` (B, 1) is τ².
    """
    theta, active, support = found.model.theta, found.model.active, found.model.support.double()
    error = found.covariance.diagonal(dim1=-2, dim2=-1)[..., 1:-1].clamp(min=_TINY).sqrt()
    # The part of the Gaussian that lies between 0 and 1, where the prior is.
    within = torch.special.log_ndtr(theta / error) + torch.special.log_ndtr((1.0 - theta) / error)
    count = 1.0 + active.sum(-1)
    choices = torch.lgamma(torch.full_like(support, classes + 1.0)) - torch.lgamma(
        classes - support + 1.0
    )
    return (
        0.5 * count * (2.0 * math.pi * noise).log()
        - 0.5 * found.log_det
        - width * torch.linalg.vector_norm(found.model.feature, dim=-1).log()
        + torch.where(active, within, 0.0).sum(-1)
        # 1 / the number of supports C!/(k! (C − k)!), and the simplex's density (k − 1)!
        - choices
        + torch.lgamma(support + 1.0)
        + torch.lgamma(support)
    )
