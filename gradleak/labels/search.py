"""Finding every candidate scale: the scale-free residual ρ(s) on a grid of both signs (§3).

    ρ(s) = Var_rest[u − (s/σ) p(s)] / Var_rest[u],     rest = all classes outside the support

With a base of zero the variance becomes the mean square. ρ is the variance loss of the paper
(arXiv 2402.03124, §4) in units of the gradient, which removes its trivial zero at |s| → ∞.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.labels.problem import FamilyTable, ScaleProblem, largest_first

# Steps of the grid in the dimensionless scale s·range(a): logarithmic while the logits are small,
# linear while the softmax turns, logarithmic again once it saturates.
_LOG_STEP, _LINEAR_STEP = 0.1, 0.4
_SATURATED, _FAR, _END = 60.0, 1200.0, 1e5
_SATURATED_STEP = 0.02
_KEEP = 3
_RUN = 1 << 17


def scale_grid(problem: ScaleProblem) -> Tensor:
    """Return (B, S) positive scales, fine enough for every dip of ρ that the logits allow.

    It starts at the smallest possible scale and ends where the softmax has long saturated. A head
    whose logits do not depend on the scale (range(a) = 0) gets an ordinary logarithmic grid.
    """
    spread = problem.a.amax(1) - problem.a.amin(1)
    start = problem.smallest_scale()
    reach = torch.where(spread > 0, spread, 1.0 / start)
    first = (start * reach).clamp(1e-12, _END / 2.0)
    # n(t) counts the steps from 0 on the first branch; its inverse places the grid points.
    bend, ratio = _LINEAR_STEP / _LOG_STEP, _SATURATED_STEP
    linear = (_SATURATED - bend) / _LINEAR_STEP
    steps = torch.where(
        first < bend,
        torch.log(first / bend) / _LOG_STEP,
        torch.where(
            first < _SATURATED,
            (first - bend) / _LINEAR_STEP,
            linear + torch.log(first / _SATURATED) / ratio,
        ),
    )
    # Far beyond saturation only the ratio of δ to p matters, and a coarser step serves.
    last = linear + math.log(_FAR / _SATURATED) / ratio
    steps = torch.where(steps < last, steps, last + torch.log(first / _FAR) / _LOG_STEP)
    fast = math.log(_END / _FAR) / _LOG_STEP
    count = int((last + fast - steps).amax().ceil()) + 1
    n = steps[:, None] + torch.arange(count, device=steps.device, dtype=torch.float64)
    grid = torch.where(
        n < 0,
        bend * torch.exp(_LOG_STEP * n.clamp(max=0.0)),
        torch.where(
            n < linear,
            bend + _LINEAR_STEP * n,
            torch.where(
                n < last,
                _SATURATED * torch.exp(ratio * (n.clamp(max=last) - linear)),
                _FAR * torch.exp(_LOG_STEP * (n - last).clamp(max=fast)),
            ),
        ),
    )
    return grid / reach[:, None]


def residual_curves(problem: ScaleProblem, scale: Tensor, table: FamilyTable) -> Tensor:
    """Return ρ (F, B, S) for every family at scales ``(B, S)``; inf where it is undetermined.

    The support at a scale is the largest entries of y(s). A family needs two classes outside its
    support, and one more for a free base.
    """
    logits = scale[..., None] * problem.a[:, None] + problem.b[:, None]
    ratio = (scale / problem.sigma[:, None])[..., None]
    u = problem.u[:, None].expand_as(logits)
    # (s/σ) y, the label in units of the gradient: ρ(s) needs no other normalisation.
    r = torch.softmax(logits, -1).mul_(ratio).sub_(u)
    top = largest_first(r * ratio.sign(), int(table.support.max()))
    r_sums, u_sums = _rest_sums(r, top), _rest_sums(u, top)
    undetermined = torch.full(scale.shape, math.inf, dtype=r.dtype, device=r.device)
    curves = []
    for k, base in zip(table.support.tolist(), table.base.tolist(), strict=True):
        rest = problem.classes - k
        if rest < 2 + int(base) or k > top.shape[-1]:
            curves.append(undetermined)
            continue
        (r_sum, r_square), (u_sum, u_square) = r_sums[k - 1], u_sums[k - 1]
        if base:
            r_square = (r_square - r_sum.square() / rest).clamp(min=0.0)
            u_square = u_square - u_sum.square() / rest
        curves.append(r_square / u_square.clamp(min=1e-300))
    return torch.stack(curves)


def _rest_sums(t: Tensor, top: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return Σ t and Σ t² over all classes but the k largest, for k = 1 … K.

    The excluded entries can exceed the rest by many orders, so they are added back rather than
    subtracted.
    """
    rest = t.scatter(-1, top, 0.0)
    total, square = rest.sum(-1), torch.linalg.vecdot(rest, rest)
    sums = [(total, square)]
    for excluded in t.gather(-1, top)[..., 1:].unbind(-1)[::-1]:
        total, square = total + excluded, square + excluded.square()
        sums.insert(0, (total, square))
    return sums


def find_candidates(problem: ScaleProblem, table: FamilyTable) -> Tensor:
    """Return (B, F, K) signed scales: the best local minima of ρ of every family, both signs."""
    grid = scale_grid(problem)
    scales = torch.stack([grid, -grid], 1)  # (B, 2, S)
    # In runs whose intermediate values stay in a core's cache.
    run = max(1, _RUN // problem.a.numel())
    runs: tuple[Tensor, ...] = torch.split(scales.flatten(1), run, 1)
    parts = [residual_curves(problem, part, table) for part in runs]
    curves = torch.cat(parts, -1).reshape(-1, *scales.shape)
    # A grid shorter than the longest of the batch repeats its last point.
    curves[..., 1:].masked_fill_(scales[..., 1:] == scales[..., :-1], math.inf)
    falls = torch.ones_like(curves, dtype=torch.bool)
    falls[..., 1:] &= curves[..., 1:] <= curves[..., :-1]
    falls[..., :-1] &= curves[..., :-1] <= curves[..., 1:]
    depth = curves.masked_fill(~falls, math.inf)
    lowest, best = depth.topk(min(_KEEP, depth.shape[-1]), -1, largest=False)
    # Where there are fewer minima, the lowest stands in.
    best = torch.where(lowest < math.inf, best, best[..., :1])
    found = scales.expand_as(curves).gather(-1, best)  # (F, B, 2, K)
    return found.flatten(2).movedim(0, 1)
