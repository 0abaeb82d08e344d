"""Finding every candidate scale: the scale-free residual ρ(s) on a grid of both signs (§3).

    ρ(s) = Var_rest[u − (s/σ) p(s)] / Var_rest[u],     rest = all classes outside the support

With a base of zero the variance becomes the mean square. ρ is the variance loss of the paper
(arXiv 2402.03124, §4) in units of the gradient, which removes its trivial zero at |s| → ∞.

Most of the grid need not be looked at: where a class has less probability than δ takes from it no
label is in the simplex, and the scales that this leaves are an interval (see ``_windows``).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradleak.labels.problem import FamilyTable, ScaleProblem

# Steps of the grid in the dimensionless scale t = s·range(a): logarithmic while the logits are
# small, linear while the softmax turns, logarithmic again once it saturates.
_LOG_STEP, _LINEAR_STEP = 0.1, 0.4
_SATURATED, _FAR, _END = 60.0, 1200.0, 1e5
_SATURATED_STEP = 0.02
_NEAREST = 1e-12
_KEEP = 3
# Values that are worked on at once: a core's cache, and what fills a GPU.
_RUN = {"cpu": 1 << 17, "cuda": 1 << 24}
# The simplex is asked for at every so many points of the grid; p may fall short of δ by a factor
# exp(_MARGIN), and by any where its own rounding is above _VAGUE.
_COARSE, _MARGIN, _VAGUE = 8, 1.0, 0.02


@cache
def _grid() -> tuple[float, ...]:
    """Return the grid of dimensionless scales t."""
    bend = _LINEAR_STEP / _LOG_STEP
    below = math.ceil(math.log(bend / _NEAREST) / _LOG_STEP)
    linear = round((_SATURATED - bend) / _LINEAR_STEP)
    slow = math.ceil(math.log(_FAR / _SATURATED) / _SATURATED_STEP)
    fast = math.ceil(math.log(_END / _FAR) / _LOG_STEP)
    return (
        *(bend * math.exp(-_LOG_STEP * n) for n in range(below, 0, -1)),
        *(bend + _LINEAR_STEP * n for n in range(linear)),
        *(_SATURATED * (_FAR / _SATURATED) ** (n / slow) for n in range(slow)),
        *(_FAR * (_END / _FAR) ** (n / fast) for n in range(fast + 1)),
    )


def scale_grid(problem: ScaleProblem) -> Tensor:
    """Return (B, S) positive scales, fine enough for every dip of ρ that the logits allow.

    It starts at the smallest possible scale and ends where the softmax has long saturated; a grid
    shorter than the longest of the batch repeats its last point. A head whose logits do not depend
    on the scale (range(a) = 0) gets an ordinary logarithmic grid.
    """
    grid = problem.a.new_tensor(_grid())
    spread = problem.a.amax(1) - problem.a.amin(1)
    start = problem.smallest_scale()
    reach = torch.where(spread > 0, spread, 1.0 / start)
    first = (torch.searchsorted(grid, start * reach) - 1).clamp(0, len(grid) - 2)
    count = len(grid) - int(first.min())
    index = first[:, None] + torch.arange(count, device=first.device)
    return grid[index.clamp(max=len(grid) - 1)] / reach[:, None]


def residual_curves(problem: ScaleProblem, scale: Tensor, table: FamilyTable) -> Tensor:
    """Return ρ (F, B, S) for every family at scales ``(B, S)``; inf where it is undetermined.

    The support at a scale is the largest entries of y(s). A family needs two classes outside its
    support, and one more for a free base.
    """
    rows = _rows_of(problem)
    ahead, behind = (_curves(rows.at(slice(k, None, 2)), scale.abs(), table) for k in (0, 1))
    return torch.where(scale > 0, ahead, behind)


class _Rows(NamedTuple):
    """Problems (R, C), (R,) of which the scale is positive: of a negative one, a and u turned."""

    a: Tensor
    b: Tensor
    u: Tensor
    sigma: Tensor

    def at(self, index: Tensor | slice) -> _Rows:
        """Return the rows in ``index``."""
        return _Rows(*(tensor[index] for tensor in self))


def _rows_of(problem: ScaleProblem) -> _Rows:
    """Return two rows for each problem, of the positive scales and of the negative ones."""
    return _Rows(
        torch.stack([problem.a, -problem.a], 1).flatten(0, 1),
        problem.b.repeat_interleave(2, 0),
        torch.stack([problem.u, -problem.u], 1).flatten(0, 1),
        problem.sigma.repeat_interleave(2, 0),
    )


def _curves(rows: _Rows, scale: Tensor, table: FamilyTable) -> Tensor:
    """Return ρ (F, R, S) at positive scales ``(R, S)``."""
    classes = rows.a.shape[-1]
    ratio = scale / rows.sigma[:, None]
    logits = torch.addcmul(rows.b[:, None], scale[..., None], rows.a[:, None])
    # (s/σ) y, the label in units of the gradient: ρ(s) needs no other normalisation.
    r = torch.addcmul(-rows.u[:, None], ratio[..., None], torch.softmax(logits, -1))
    largest = r.topk(min(int(table.support.max()), classes - 1), -1)
    u = rows.u[:, None].expand_as(r)
    r_sums = _rest_sums(r.scatter_(-1, largest.indices, 0.0), largest.values)
    u_sums = _rest_sums(u.scatter(-1, largest.indices, 0.0), u.gather(-1, largest.indices))
    undetermined = torch.full(scale.shape, math.inf, dtype=r.dtype, device=r.device)
    curves = []
    for k, base in zip(table.support.tolist(), table.base.tolist(), strict=True):
        rest = classes - k
        if rest < 2 + int(base) or k > largest.values.shape[-1]:
            curves.append(undetermined)
            continue
        (r_sum, r_square), (u_sum, u_square) = r_sums[k - 1], u_sums[k - 1]
        if base:
            r_square = (r_square - r_sum.square() / rest).clamp(min=0.0)
            u_square = u_square - u_sum.square() / rest
        curves.append(r_square / u_square.clamp(min=1e-300))
    return torch.stack(curves)


def _rest_sums(rest: Tensor, excluded: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return Σ t and Σ t² over all classes but the first k of ``excluded``, for k = 1 … K.

    ``rest`` (…, C) is t with zeros for all K excluded entries (…, K). These can exceed the rest by
    many orders, so they are added back rather than subtracted.
    """
    total, square = rest.sum(-1), torch.linalg.vector_norm(rest, dim=-1).square()
    sums = [(total, square)]
    for value in excluded[..., 1:].unbind(-1)[::-1]:
        total, square = total + value, torch.addcmul(square, value, value)
        sums.insert(0, (total, square))
    return sums


def find_candidates(problem: ScaleProblem, table: FamilyTable) -> Tensor:
    """Return (B, F, K) signed scales: the best local minima of ρ of every family, both signs."""
    grid = scale_grid(problem)
    rows = _rows_of(problem)
    start, length = _windows(problem, rows, grid)
    grid = grid.repeat_interleave(2, 0)
    longest = length.tolist()
    room = _RUN[grid.device.type] // problem.classes
    if len(longest) * max(longest) <= room:
        found = _minima(rows, grid, start, max(longest), table)
    else:
        # The longest first, so that a run of rows wastes little on the shorter ones.
        order = length.argsort(descending=True)
        longest = length[order].tolist()
        found = grid.new_empty(len(grid), len(table.support), _KEEP)
        done = 0
        while done < len(order):
            run = order[done : done + max(1, room // longest[done])]
            found[run] = _minima(rows.at(run), grid[run], start[run], longest[done], table)
            done += len(run)
    found[1::2] *= -1.0
    return found.view(len(grid) // 2, 2, -1, found.shape[-1]).movedim(1, 2).flatten(2)


def _minima(rows: _Rows, grid: Tensor, start: Tensor, length: int, table: FamilyTable) -> Tensor:
    """Return (R, F, K) the scales of the lowest local minima of ρ in windows of the grid (R, S)."""
    points = grid.shape[1]
    start = start.clamp(max=points - length)
    index = start[:, None] + torch.arange(length, device=grid.device)
    scale = grid.gather(1, index)
    run = max(1, _RUN[grid.device.type] // rows.a.numel())
    parts: tuple[Tensor, ...] = torch.split(scale, run, 1)
    curves = torch.cat([_curves(rows, part, table) for part in parts], -1)
    # A grid shorter than the longest of the batch repeats its last point.
    curves[..., 1:].masked_fill_(scale[:, 1:] == scale[:, :-1], math.inf)
    falls = torch.ones_like(curves, dtype=torch.bool)
    falls[..., 1:] &= curves[..., 1:] <= curves[..., :-1]
    falls[..., :-1] &= curves[..., :-1] <= curves[..., 1:]
    # The curve goes on beyond a window's end, unless the grid ends there.
    falls[..., 0] &= start == 0
    falls[..., -1] &= start + length == points
    depth = curves.masked_fill_(~falls, math.inf)
    lowest, best = depth.topk(min(_KEEP, length), -1, largest=False)
    # Where there are fewer minima, the lowest stands in.
    best = torch.where(lowest < math.inf, best, best[..., :1])
    return scale.expand_as(curves).gather(-1, best).movedim(0, 1)


def _windows(problem: ScaleProblem, rows: _Rows, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (R,) first index and length of the part of each row's grid where a label may be.

    y ≥ 0 asks p_i(s) ≥ δ_i(s) of every class. With u_i > 0, and the largest logit for the sum of
    all, that is F(s) = max_i [log(σ u_i) − b_i − s a_i] + max_j [s a_j + b_j] − log s ≤ 0, and F is
    convex: the scales that it leaves are an interval, and where the points looked at are all
    outside, it lies beside the lowest. Noise hides δ, so noisy gradients keep the whole grid.
    """
    points = grid.shape[1]
    coarse = grid[:, ::_COARSE]
    s = coarse.repeat_interleave(2, 0)[..., None]
    taken = torch.log((rows.sigma[:, None] * rows.u).clamp(min=0.0)) - rows.b
    short = torch.addcmul(taken[:, None], s, rows.a[:, None], value=-1.0).amax(-1)
    top = torch.addcmul(rows.b[:, None], s, rows.a[:, None]).amax(-1)
    excess = short + top - s[..., 0].log()
    slope, offset = problem.largest_logit
    vague = (torch.addcmul(offset, coarse, slope) > _VAGUE) | (problem.noise > 0.0)[:, None]
    inside = (excess <= _MARGIN) | vague.repeat_interleave(2, 0)
    inside.scatter_(1, excess.argmin(1, keepdim=True), True)
    number = torch.arange(coarse.shape[1], device=grid.device)
    first = torch.where(inside, number, points).amin(1) - 1
    last = torch.where(inside, number, -1).amax(1) + 1
    # A root just inside is lowest at a point just outside, which has to have neighbours.
    start = (first * _COARSE - 2).clamp(min=0)
    return start, (last * _COARSE + 3).clamp(max=points) - start
