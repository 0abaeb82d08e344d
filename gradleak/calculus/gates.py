"""Which units of a rectifier were open: read off a noisy map, settled by the gradient below (§6d).

Below a rectifier δ is known up to its mask. Where the map above was recovered with noise, units
near zero are in doubt. The layer below has more equations than unknowns: channels with a doubtful
unit are left out, the input is solved for from the others, and then each doubtful unit is the
unknown of a least-squares problem on its own channel. A mistake shows as a jump of the residual,
and is looked for in the channels where that is largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.solve import LayerEquations, Solution, least_squares, solve_input
from gradleak.calculus.window import Window

# What a map has of negative entries is noise; units up to this many times the largest of them, in
# standard deviations, count as closed, and those between the two other factors are in doubt.
_CLOSED, _DOUBT_FROM, _DOUBT_TO = 1.5, 0.7, 15.0
_LEAST_NOISE = 4.0
# Between noise and signal nothing may lie for this factor, or more; then the edge is there.
_GAP = 5.0
# Share of the output channels that may be left out: all that are to spare, within bounds.
_SPARE, _FEWEST, _MOST = 1.3, 0.02, 0.5
# A channel whose residual is that many times the median's has a mistake, unless it is no more than
# so many roundings of its gradient or of a usual one: to lose a unit of that size does no harm.
_OUTLYING, _ROUNDED = 4.0, 16.0
# Leaving out channels that do not stand out has to pay by this factor of the residual.
_WORTH = 0.7
_DECISIONS, _ROUNDS = 4, 8
# Patches that are less independent than this say nothing of single units.
_INDEPENDENT = 1e-9
# A unit's share of 0 or 1 is read where it is half of that many standard deviations wide.
_SIGMAS = 3.0


@dataclass(frozen=True)
class Gate:
    """The ``mask`` (N, O, P) of a rectifier, and which units of it are ``certain`` to be open.

    ``doubtful`` (D, 3) are the units in doubt, the most doubtful first.
    """

    mask: Tensor
    certain: Tensor
    doubtful: Tensor


def read_gate(value: Tensor, std: Tensor) -> Gate:
    """Read the gate off the recovered output (N, O, P) of a rectifier, with its errors ``std``."""
    ratio = value / std
    edge = _CLOSED * max(float((-ratio).amax()), _LEAST_NOISE)
    certain = ratio >= _DOUBT_TO / _CLOSED * edge
    doubt = (ratio > _DOUBT_FROM / _CLOSED * edge) & ~certain
    edge = _in_the_gap(ratio[doubt], ratio[certain], edge)
    order = (ratio[doubt] / edge).log().abs().argsort()
    return Gate(ratio > edge, certain, doubt.nonzero()[order])


def _in_the_gap(doubtful: Tensor, certain: Tensor, edge: float) -> float:
    """Return the middle of the widest gap above ``edge``, if it is wide: noise has none.

    What is below zero need not show the largest of the noise.
    """
    above = doubtful[doubtful > edge].sort().values
    last = certain.min()[None] if len(certain) else above.new_full((1,), _DOUBT_TO * edge)
    points = torch.cat([above.new_full((1,), edge), above, last])
    gaps = points[1:] / points[:-1]
    widest = int(gaps.argmax())
    if float(gaps[widest]) < _GAP:
        return edge
    return float((points[widest] * points[widest + 1]).sqrt())


def read_sign(value: Tensor, std: Tensor) -> Gate:
    """Read the gate off an output (N, O, P) that is below zero where the unit was closed."""
    ratio = value / std
    certain = ratio >= _LEAST_NOISE
    doubt = ratio.abs() < _LEAST_NOISE
    order = ratio[doubt].abs().argsort()
    return Gate(value > 0.0, certain, doubt.nonzero()[order])


@dataclass(frozen=True)
class GatedLayer:
    """A layer under a gate: its delta is ``coefficient`` (N, O, P) where the gate is open.

    Where it is closed, its delta is ``closed`` times that: 0 under a ReLU.
    """

    window: Window
    coefficient: Tensor
    gradient: Tensor
    closed: float = 0.0

    def equations(self, mask: Tensor) -> LayerEquations:
        """Return the layer's equations for one ``mask`` (N, O, P)."""
        slope = self.closed + (1.0 - self.closed) * mask
        return LayerEquations(self.window, self.coefficient * slope, self.gradient)

    @property
    def step(self) -> Tensor:
        """What opening a unit adds to its delta (N, O, P)."""
        return (1.0 - self.closed) * self.coefficient


@dataclass(frozen=True)
class Settled:
    """A gate's final ``mask`` (N, O, P), the input below it, and how many units ``changed``."""

    mask: Tensor
    solution: Solution
    changed: int


def settle(
    gate: Gate,
    layer: GatedLayer,
    others: Sequence[LayerEquations],
    allowed: float,
    precision: float,
) -> Settled:
    """Settle the units of ``gate`` by the gradient of the ``layer`` below it.

    ``others`` are equations of other layers on the same input; ``allowed`` is the relative
    residual above which there is a mistake, ``precision`` the relative rounding of the gradients.
    """
    mask = gate.mask.clone()
    limit = _spare_channels(layer, others)
    units = _within(gate.doubtful, limit)
    for _ in range(_DECISIONS if len(units) else 0):
        out = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
        out[units[:, 1]] = True
        solved = solve_input([layer.equations(mask).without(out), *others], precision)
        if not solved.determined:
            break
        before, mask = mask, _decided(mask, gate.doubtful, layer, solved.x)
        if len(units) == len(gate.doubtful) or bool((mask == before).all()):
            break
    solved = solve_input([layer.equations(mask), *others], precision)
    if solved.determined:
        bad, x = _misfits(mask, layer, others, solved, allowed, limit, precision)
        mended = _mended(mask, gate.certain, bad, layer, x)
        if bool((mended != mask).any()):
            again = solve_input([layer.equations(mended), *others], precision)
            if again.determined and again.residual < solved.residual:
                mask, solved = mended, again
    return Settled(mask, solved, int((mask != gate.mask).sum()))


def _spare_channels(layer: GatedLayer, others: Sequence[LayerEquations]) -> int:
    """Return how many output channels the equations can do without."""
    samples, channels, _ = layer.coefficient.shape
    rows = channels * layer.window.taps
    rows += sum(e.delta.shape[1] * e.window.taps for e in others)
    share = 1.0 - _SPARE * samples * layer.window.places / rows
    return max(1, int(min(_MOST, max(_FEWEST, share)) * channels))


def _within(units: Tensor, limit: int) -> Tensor:
    """Return the most doubtful of ``units`` (D, 3) that lie in at most ``limit`` channels."""
    channels = units[:, 1]
    first: dict[int, None] = dict.fromkeys(channels.tolist())
    if len(first) <= limit:
        return units
    kept = torch.tensor(list(first)[:limit], device=units.device)
    return units[torch.isin(channels, kept)]


def _decided(mask: Tensor, units: Tensor, layer: GatedLayer, x: Tensor) -> Tensor:
    """Decide doubtful ``units`` (D, 3), channel by channel, given the layer's input ``x``."""
    mask = mask.clone()
    mask[units[:, 0], units[:, 1], units[:, 2]] = False
    patches = layer.window.patches(x)  # (N, C, T, P)
    channels = torch.unique(units[:, 1])
    rests = layer.equations(mask).only(channels).residuals(x)
    for channel, left in zip(channels.tolist(), rests, strict=True):
        own = units[units[:, 1] == channel]
        columns = patches[own[:, 0], :, :, own[:, 2]].flatten(1)
        columns = columns * layer.step[own[:, 0], channel, own[:, 2], None]
        share = least_squares(columns.mT, left.flatten()[:, None])
        mask[own[:, 0], channel, own[:, 2]] = share.flatten() > 0.5
    return mask


def _misfits(
    mask: Tensor,
    layer: GatedLayer,
    others: Sequence[LayerEquations],
    solved: Solution,
    allowed: float,
    limit: int,
    precision: float,
) -> tuple[Tensor, Tensor]:
    """Leave out the channels that fit worst until the others agree with each other.

    Returns which channels (O,) were left out, at most ``limit``, and the input without them.
    """
    bad = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
    whole = layer.equations(mask)
    sizes = whole.sizes()
    rounding = _ROUNDED * precision * sizes.clamp(min=float(sizes.square().mean().sqrt()))
    for _ in range(_ROUNDS):
        left = whole.misfits(solved.x)
        outlying = (left > _OUTLYING * left[~bad].median()) & (left > rounding) & ~bad
        agreed = not bool(outlying.any())
        if agreed and solved.residual <= allowed:
            break
        if agreed or int((bad | outlying).sum()) > limit:  # the worst first
            worst = torch.where(bad, 0.0, left).topk(max(1, limit // 5)).indices
            outlying = torch.zeros_like(bad).index_fill(0, worst, True)
        more = bad | outlying
        if int(more.sum()) > limit:
            break
        again = solve_input([whole.without(more), *others], precision)
        if not again.determined or (agreed and again.residual > _WORTH * solved.residual):
            break
        bad, solved = more, again
    return bad, solved.x


def _mended(mask: Tensor, certain: Tensor, bad: Tensor, layer: GatedLayer, x: Tensor) -> Tensor:
    """Read the units of the ``bad`` channels off their gradients, given the layer's input ``x``.

    Only what the gradient's own noise leaves beyond doubt is changed, and nothing ``certain``.
    """
    mask = mask.clone()
    if not bool(bad.any()):
        return mask
    patches = layer.window.patches(x).movedim(3, 1).flatten(2)  # (N, P, C·T)
    rest = layer.equations(mask).misfits(x)[~bad]
    noise = (rest.square().mean() / layer.gradient[0].numel()).sqrt()
    closed = layer.equations(torch.zeros_like(mask)).only(bad)
    for channel, shut in zip(bad.nonzero().flatten().tolist(), closed.residuals(x), strict=True):
        fixed = certain[:, channel]
        columns = layer.step[:, channel, :, None] * patches
        target = shut.flatten() - columns[fixed].sum(0)
        free = columns[~fixed]
        if len(free) > len(target) or not len(free):
            continue
        left, size, right = torch.linalg.svd(free.mT, full_matrices=False)
        back = torch.where(size > _INDEPENDENT * size[0], 1.0 / size, 0.0)
        share = right.mT @ (back * (left.mT @ target))
        spread = noise * (right.mT * back).norm(dim=1)
        own = mask[:, channel]
        own[~fixed] = torch.where(_SIGMAS * spread < 0.5, share > 0.5, own[~fixed])
        mask[:, channel] = own
    return mask
