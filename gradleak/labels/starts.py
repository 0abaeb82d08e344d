"""Where the climb to the likelihood's maxima starts: the roots of the search, family by family.

The search for the scale factorises the gradient first, which spends all its entries on one
direction; under noise its roots are near the maxima, and every family starts from all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.labels.factorise import leading_triple
from gradleak.labels.gaussian import Model, Observation, squares_of, take
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.refine import Fits, describe, refine
from gradleak.labels.search import find_candidates

# Candidates that are climbed besides the best one of every family.
_MORE, _MORE_SCALES = 2, 18
# Roots of the search that every family starts from.
_ROOTS = 3
_FIXED_POINT = 4
_SHARES = (1.0, 1.4, 2.0)
# Candidates whose excess over the least sum of squares is this many times that of the best one, or
# that many squared standard deviations above it, do not start.
_HOPELESS, _FAR = 10.0, 1e4
# Sweeps of the power iteration, which ends when one changes σ² by less than this part of τ².
_SWEEPS, _PART = 100, 1e-2
_TINY = 1e-300


@dataclass(frozen=True)
class Factors:
    """A noisy gradient as the search for the scale sees it.

    ``problem`` holds B problems of one scalar s, ``direction`` (B, D) gives x = s v, and ``known``
    (B,) is s where a bias gradient gives it, else None; ``least`` (B,) is the residual sum of
    squares of the best rank-one gradient.
    """

    problem: ScaleProblem
    direction: Tensor
    known: Tensor | None
    least: Tensor


def factorise_noisy(seen: Observation, unit: Tensor) -> Factors:
    """Factorise noisy gradients, a bias gradient as the last column, for the search over s.

    ``unit`` (B,) is the roundoff of the gradients' precision.
    """
    matrix = seen.gradient
    if seen.grad_bias is not None:
        matrix = torch.cat([matrix, seen.grad_bias[..., None]], -1)
    u, sigma, v = _leading(matrix, seen.noise)
    direction = v[:, : seen.gradient.shape[2]]
    centred = seen.weight - seen.weight.mean(1, keepdim=True)
    problem = ScaleProblem(
        a=(seen.weight @ direction[..., None]).squeeze(-1),
        b=seen.bias,
        u=u,
        sigma=sigma,
        noise=seen.noise,
        unit=unit,
        weight_norms=torch.linalg.vector_norm(centred, dim=2),
    )
    known = None if seen.grad_bias is None else 1.0 / v[:, -1]
    return Factors(problem, direction, known, seen.squares - sigma.square())


def _leading(matrix: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, σ, v of the leading singular triple of (B, C, D), exact to a part of the noise."""
    found = leading_triple(matrix)
    v, sigma = found.v, found.sigma
    going = torch.ones_like(noise, dtype=torch.bool)
    for _ in range(_SWEEPS):
        swept = (matrix.mT @ (matrix @ v[..., None])).squeeze(-1)
        swept = swept / torch.linalg.vector_norm(swept, dim=1, keepdim=True).clamp(min=_TINY)
        v = torch.where(going[:, None], swept, v)
        before, sigma = sigma, torch.linalg.vector_norm(matrix @ v[..., None], dim=(1, 2))
        going &= sigma.square() - before.square() > _PART * noise.square()
        if not bool(going.any()):
            break
    v = torch.where(v.sum(1, keepdim=True) < 0, -v, v)
    u = (matrix @ v[..., None]).squeeze(-1) / sigma.clamp(min=_TINY)[:, None]
    return u, sigma, v


def starts_of(
    seen: Observation, factors: Factors, table: FamilyTable, loss_scales: Tensor | None
) -> tuple[Model, Tensor]:
    """Return the hypotheses (B, M) to climb from, and the table index (B, M) of their families.

    ``loss_scales`` (K,) are those to start from where it is unknown (one gradient only), else None.
    """
    if loss_scales is None:
        start = _starts(factors.problem, factors.known, table)
        gamma, family = torch.ones_like(start.scale), start.family.expand_as(start.scale)
    else:
        start, gamma, family = _starts_of_every(factors, loss_scales, table)
    model = _model(start, family, gamma, factors.direction, table, seen.classes)
    excess = squares_of(seen, model) - factors.least[:, None]
    more = _MORE if loss_scales is None else _MORE_SCALES
    kind = 2 * family + (start.scale.reshape_as(family) < 0.0)
    chosen = _promising(kind, excess, seen.noise, 2 * len(table.support), more)
    rows = torch.arange(len(chosen), device=chosen.device)
    return take(model, rows, chosen), family.gather(1, chosen)


def _starts(problem: ScaleProblem, known: Tensor | None, table: FamilyTable) -> Fits:
    """Return the candidates of the search, and every family at the scales of the best few.

    A root that one family finds is one for the others too, and so is the ``known`` scale (B,).
    """
    start = refine(problem, find_candidates(problem, table), table)
    quality = torch.where(start.feasible, start.chi2 / start.freedom.clamp(min=1), math.inf)
    best = quality.topk(min(_ROOTS, quality.shape[1]), 1, largest=False).indices
    scale = start.scale.gather(1, best)
    scale = scale if known is None else torch.cat([scale, known[:, None]], 1)
    every = torch.arange(len(table.support), device=scale.device)
    most = int(table.support.max())
    scales = torch.cat([scale, *_anchored(problem, scale, most), _plain(problem, most)], 1)
    more = describe(
        problem,
        scales.repeat_interleave(len(every), 1),
        every.repeat(scales.shape[1]),
        table,
        scale_known=True,
    )
    joined = {
        name: torch.cat([value, getattr(more, name)], 0 if name == "family" else 1)
        for name, value in vars(start).items()
    }
    return Fits(**joined)


def _anchored(problem: ScaleProblem, scale: Tensor, most: int) -> list[Tensor]:
    """Return scales (B, R) near ``scale`` at which the label is all on its k largest, k ≤ ``most``.

    A label without a base sums to one on its support: s = σ Σ u / (Σ p(s) − 1), both over it. In
    many classes that says more than the search, which looks at the others one by one.
    """
    top = problem.at(scale).y.topk(min(most, problem.classes - 1), -1).indices
    u = problem.u[:, None].expand(*scale.shape, -1).gather(-1, top).cumsum(-1)
    found = []
    for k in range(top.shape[-1]):
        s = scale
        for _ in range(_FIXED_POINT):
            inside = problem.at(s).p.gather(-1, top[..., : k + 1]).sum(-1)
            aim = problem.sigma[:, None] * u[..., k] / (inside - 1.0)
            s = (aim / scale).nan_to_num(1.0).clamp(0.3, 3.0) * scale
        found.append(s)
    return found


def _plain(problem: ScaleProblem, most: int) -> Tensor:
    """Return (B, 6 K) scales of both signs that ordinary labels have, whatever the search says.

    Where p is small, δ = −y on the support: s = σ Σ |u| / Σ y over the k most negative entries of
    s u, and Σ y lies between a half and one for all but the most smoothed labels.
    """
    count = min(most, problem.classes - 1)
    found = []
    for sign in (1.0, -1.0):
        largest = (-sign * problem.u).topk(count, 1).values.clamp(min=0.0).cumsum(1)
        found.append(sign * problem.sigma[:, None] * largest)
    scale = torch.cat(found, 1)
    scale = torch.where(scale == 0.0, problem.smallest_scale()[:, None], scale)
    return torch.cat([share * scale for share in _SHARES], 1)


def _starts_of_every(
    factors: Factors, loss_scales: Tensor, table: FamilyTable
) -> tuple[Fits, Tensor, Tensor]:
    """Search at every loss scale (K,), and line the candidates up as those of one gradient.

    Returns them with their loss scale and family, (1, K·M) each. G/γ has the factors of G, and its
    singular value divided by γ.
    """
    count = len(loss_scales)
    many = factors.problem.part(torch.zeros(count, dtype=torch.long, device=loss_scales.device))
    many = replace(many, sigma=many.sigma / loss_scales, noise=many.noise / loss_scales)
    known = None if factors.known is None else factors.known.expand(count)
    start = _starts(many, known, table)
    gamma = loss_scales[:, None].expand_as(start.scale).reshape(1, -1)
    family = start.family.expand_as(start.scale).reshape(1, -1)
    flat = {
        name: value.reshape(1, -1, *value.shape[2:])
        for name, value in vars(start).items()
        if name != "family"
    }
    return Fits(family=start.family, **flat), gamma, family


def _promising(kind: Tensor, excess: Tensor, noise: Tensor, kinds: int, more: int) -> Tensor:
    """Return (B, M') the candidates to climb from: the best one of each kind and a few more.

    ``kind`` (B, M) is a candidate's family and sign, ``excess`` (B, M) what it adds to the least
    sum of squares. The hopeless ones, which are all but a few where the noise is small, give their
    place to the best one.
    """
    excess = excess.nan_to_num(math.inf)
    own = torch.stack([torch.where(kind == k, excess, math.inf).argmin(1) for k in range(kinds)], 1)
    others = excess.scatter(1, own, math.inf)
    rest = others.topk(min(more, others.shape[1]), 1, largest=False).indices
    chosen = torch.cat([own, rest], 1)
    excess, order = excess.gather(1, chosen).sort(1)
    best = excess[:, :1]
    allowed = _HOPELESS * best.clamp(min=0.0) + _FAR * noise[:, None].square()
    alive = excess <= best + allowed
    order = torch.where(alive, order, order[:, :1])
    return chosen.gather(1, order)[:, : int(alive.sum(1).amax().clamp(min=1))]


def _model(
    start: Fits,
    family: Tensor,
    gamma: Tensor,
    direction: Tensor,
    table: FamilyTable,
    classes: int,
) -> Model:
    """Turn candidates (B, M) into hypotheses to climb from."""
    base = start.base[..., None]
    model = Model(
        top=start.top,
        support=table.support[family],
        base=table.base[family],
        theta=torch.cat([start.weights[..., 1:] - base, classes * base], -1),
        feature=start.scale[..., None] * direction[:, None],
        loss_scale=gamma,
    )
    return replace(model, theta=model.theta * model.active)
