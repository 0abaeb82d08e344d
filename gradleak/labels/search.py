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
# Minima that are kept of a sign, and of both. What a parabola promises between the points of the
# grid is believed but for a part of ρ at the points.
_KEEP, _CANDIDATES, _DOUBT = 3, 3, 0.01
# Values that are worked on at once: a core's cache, and what fills a GPU.
_RUN, _GPU_RUN = 1 << 17, 1 << 26
# The simplex is asked for at every so many points of the grid; p may fall short of δ by a factor
# exp(_MARGIN), and by any where its own rounding is above _VAGUE.
_COARSE, _MARGIN, _VAGUE = 8, 1.0, 0.02


@cache
def _grid(device: torch.device) -> Tensor:
    """Return the grid of dimensionless scales t, float64."""
    bend = _LINEAR_STEP / _LOG_STEP
    below = math.ceil(math.log(bend / _NEAREST) / _LOG_STEP)
    linear = round((_SATURATED - bend) / _LINEAR_STEP)
    slow = math.ceil(math.log(_FAR / _SATURATED) / _SATURATED_STEP)
    fast = math.ceil(math.log(_END / _FAR) / _LOG_STEP)
    points = (
        *(bend * math.exp(-_LOG_STEP * n) for n in range(below, 0, -1)),
        *(bend + _LINEAR_STEP * n for n in range(linear)),
        *(_SATURATED * (_FAR / _SATURATED) ** (n / slow) for n in range(slow)),
        *(_FAR * (_END / _FAR) ** (n / fast) for n in range(fast + 1)),
    )
    with torch.inference_mode(False):
        return torch.tensor(points, dtype=torch.float64, device=device)


def scale_grid(problem: ScaleProblem) -> Tensor:
    """Return (B, S) positive scales, fine enough for every dip of ρ that the logits allow.

    It starts below the smallest possible scale and ends where the softmax has long saturated; a
    grid shorter than the longest of the batch repeats its last point. A head whose logits do not
    depend on the scale (range(a) = 0) gets an ordinary logarithmic grid.
    """
    grid, first, reach = _place(problem)
    index = first[:, None] + torch.arange(len(grid) - int(first.min()), device=grid.device)
    return grid[index.clamp(max=len(grid) - 1)] / reach[:, None]


def _place(problem: ScaleProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Return the grid of t, the index (B,) at which it begins for each problem, and range(a)."""
    grid = _grid(problem.a.device)
    low, high = torch.aminmax(problem.a, dim=1)
    reach, start = high - low, problem.smallest_scale()
    reach = torch.where(reach > 0, reach, start.reciprocal())
    first = torch.searchsorted(grid, start * reach) - 2  # a minimum has a neighbour below
    return grid, first.clamp(0, len(grid) - _KEEP - 2), reach


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
    ratio = (scale / rows.sigma[:, None])[..., None]
    logits = torch.addcmul(rows.b[:, None], scale[..., None], rows.a[:, None])
    # (s/σ) y, the label in units of the gradient: ρ(s) needs no other normalisation.
    r = torch.addcmul(-rows.u[:, None], ratio, torch.softmax(logits, -1))
    u = rows.u[:, None].expand_as(r)
    largest, top = r.topk(min(table.largest, classes - 1), -1)
    excluded = torch.stack([largest, u.gather(-1, top)])
    rests = r.scatter_(-1, top, 0.0), u.scatter(-1, top, 0.0)
    total = torch.stack([rest.sum(-1) for rest in rests])[..., None]
    square = torch.stack([torch.linalg.vector_norm(rest, dim=-1) for rest in rests])[..., None]
    # Σ t and Σ t² over all classes but the k largest, (2, R, S, F), for t = r and u. The excluded
    # entries may exceed the rest by many orders, so they are added back rather than subtracted.
    back = table.outside[:, : top.shape[-1]].mT
    total, square = total + excluded @ back, square.square() + excluded.square() @ back
    spread = square - total.square() * (table.free / (classes - table.support))
    curves = (spread[0].clamp(min=0.0) / spread[1].clamp(min=1e-300)).movedim(-1, 0)
    if classes < table.largest + 3:
        determined = classes - table.support >= 2 + table.base.long()
        curves = curves.masked_fill(~determined[:, None, None], math.inf)
    return curves


def find_candidates(problem: ScaleProblem, table: FamilyTable) -> Tensor:
    """Return (B, F, K) signed scales: the most promising minima of ρ of every family."""
    rows = _rows_of(problem)
    grid, first, reach = _place(problem)
    begin, end = _windows(problem, rows, grid, first, reach)
    reach = reach.repeat_interleave(2)
    length = end - begin
    longest = length.tolist()
    room = _run(grid) // problem.classes
    if len(longest) * max(longest) <= room:
        found = _minima(rows, _Window(grid, begin, reach), max(longest), table)
    else:
        # The longest first, so that a run of rows wastes little on the shorter ones.
        order = length.argsort(descending=True)
        longest = length[order].tolist()
        found = grid.new_empty(2, len(table.support), len(begin), _KEEP)
        done = 0
        while done < len(order):
            run = order[done : done + max(1, room // longest[done])]
            window = _Window(grid, begin[run], reach[run])
            found[:, :, run] = _minima(rows.at(run), window, longest[done], table)
            done += len(run)
    scale, promise = found.view(2, -1, len(first), 2, found.shape[-1]).transpose(1, 2)
    scale[..., 1, :] *= -1.0
    lowest, best = promise.flatten(2).topk(_CANDIDATES, -1, largest=False)
    # Where there are fewer minima, the lowest stands in.
    best = torch.where(lowest < math.inf, best, best[..., :1])
    chosen: Tensor = scale.flatten(2).gather(-1, best)
    return chosen


def _run(where: Tensor) -> int:
    return _RUN if where.device.type == "cpu" else _GPU_RUN


class _Window(NamedTuple):
    """Where to look: the ``grid`` of t, in units of 1/``reach`` (R,), from index ``begin`` (R,)."""

    grid: Tensor
    begin: Tensor
    reach: Tensor


def _minima(rows: _Rows, window: _Window, length: int, table: FamilyTable) -> Tensor:
    """Return (2, F, R, K) the lowest local minima of ρ in windows of that length: scale, promise.

    The promise is what ρ may fall to between the points of the grid, the lower the better.
    """
    points = len(window.grid)
    index = window.begin[:, None] + torch.arange(length, device=window.begin.device)
    scale = window.grid[index.clamp(max=points - 1)] / window.reach[:, None]
    run = max(1, _run(scale) // rows.a.numel())
    parts: tuple[Tensor, ...] = torch.split(scale, run, 1)
    curves = torch.cat([_curves(rows, part, table) for part in parts], -1)
    # A shorter window goes on as far as the grid does; nan is no minimum, nor a neighbour of one.
    curves.masked_fill_(index >= points, math.nan)
    inner = curves[..., 1:-1]
    falls = (inner <= curves[..., :-2]) & (inner <= curves[..., 2:])
    depth = inner.masked_fill(~falls, math.inf)
    lowest, best = depth.topk(_KEEP, -1, largest=False)
    # The parabola through a minimum and its neighbours says where it is between the points.
    around = best[..., None] + torch.arange(3, device=best.device)
    left, middle, right = _taken(curves, around).unbind(-1)
    bend = (left - 2.0 * middle + right).clamp(min=1e-300)
    shift = (0.5 * (left - right) / bend).clamp(-0.5, 0.5)
    bottom = (middle - 0.25 * (left - right) * shift).clamp(min=0.0)
    low, centre, high = _taken(scale.expand_as(curves), around).unbind(-1)
    # Where there are fewer minima than places there is nothing to promise.
    promise = torch.where(lowest < math.inf, bottom + _DOUBT * middle, lowest)
    return torch.stack([centre + 0.5 * shift * (high - low), promise])


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values`` (F, R, S) at ``index`` (F, R, K, J)."""
    return values.gather(-1, index.flatten(2)).view(index.shape)


def _windows(
    problem: ScaleProblem, rows: _Rows, grid: Tensor, first: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (R,) first and last index, exclusive, of each row's grid where a label may be.

    y ≥ 0 asks p_i(s) ≥ δ_i(s) of every class. With u_i > 0, and the largest logit for the sum of
    all, that is F(s) = max_i [log(σ u_i) − b_i − s a_i] + max_j [s a_j + b_j] − log s ≤ 0, and F is
    convex: the scales that it leaves are an interval, and where the points looked at are all
    outside, it lies beside the lowest. Noise hides δ, so noisy gradients keep the whole grid.
    """
    points = len(grid)
    looks = (points - int(first.min()) - 1) // _COARSE + 2
    index = first[:, None] + _COARSE * torch.arange(looks, device=grid.device)
    coarse = grid[index.clamp_(max=points - 1)] / reach[:, None]
    a, b, u = (tensor.view(len(first), 2, -1) for tensor in (rows.a, rows.b, rows.u))
    s = coarse[:, None, :, None]
    taken = torch.log((problem.sigma[:, None, None] * u).clamp_(min=0.0)).sub_(b)
    excess = torch.addcmul(taken[:, :, None], s, a[:, :, None], value=-1.0).amax(-1)
    excess += torch.addcmul(b[:, :, None], s, a[:, :, None]).amax(-1)
    excess -= coarse.log()[:, None]
    slope, offset = problem.largest_logit
    vague = (torch.addcmul(offset, coarse, slope) > _VAGUE) | (problem.noise > 0.0)[:, None]
    outside = (excess > _MARGIN) & ~vague[:, None]
    outside.scatter_(-1, excess.argmin(-1, keepdim=True), False)
    # A root just inside is lowest at a point just outside, which has to have neighbours.
    index = index[:, None].expand_as(excess)
    begin = index.masked_fill(outside, points).amin(-1) - (_COARSE + 2)
    end = index.masked_fill(outside, 0).amax(-1) + (_COARSE + 3)
    return begin.maximum(first[:, None]).flatten(), end.clamp_(max=points).flatten()
