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

from gradleak.calculus.solve import LayerEquations, Solution, solve_input
from gradleak.calculus.window import Window

# What a map has of negative entries is noise; units up to this many times the largest of them, in
# standard deviations, count as closed, and those between the two other factors are in doubt.
_CLOSED, _DOUBT_FROM, _DOUBT_TO = 1.5, 0.7, 15.0
_LEAST_NOISE = 4.0
# Share of the output channels that may be left out: all that are to spare, within bounds.
_SPARE, _FEWEST, _MOST = 1.3, 0.02, 0.5
# A residual that many times above what it was so far tells of a mistake; a channel with that many
# times the median has one.
JUMP, _OUTLYING = 20.0, 8.0
_DECISIONS, _ROUNDS = 4, 8
# Patches that are less independent than this say nothing of single units.
_INDEPENDENT = 1e-9


@dataclass(frozen=True)
class Gate:
    """The ``mask`` (N, O, P) of a rectifier and how ``sure`` each unit is: 1 on the edge, or more.

    ``doubtful`` (D, 3) are the units in doubt, the most doubtful first.
    """

    mask: Tensor
    sure: Tensor
    doubtful: Tensor


def read_gate(value: Tensor, std: Tensor) -> Gate:
    """Read the gate off the recovered output (N, O, P) of a rectifier, with its errors ``std``."""
    ratio = value / std
    edge = _CLOSED * max(float((-ratio).amax()), _LEAST_NOISE)
    sure = (ratio.clamp(min=1e-3) / edge).log().abs()
    doubt = (ratio > _DOUBT_FROM / _CLOSED * edge) & (ratio < _DOUBT_TO / _CLOSED * edge)
    units = doubt.nonzero()
    order = sure[doubt].argsort()
    return Gate(ratio > edge, sure, units[order])


@dataclass(frozen=True)
class GatedLayer:
    """A layer under a gate: its delta is ``coefficient`` (N, O, P) where the gate is open."""

    window: Window
    coefficient: Tensor
    gradient: Tensor

    def equations(self, mask: Tensor) -> LayerEquations:
        """Return the layer's equations for one ``mask`` (N, O, P)."""
        return LayerEquations(self.window, self.coefficient * mask, self.gradient)


@dataclass(frozen=True)
class Settled:
    """A gate's final ``mask`` (N, O, P), the input below it, and how many units ``changed``."""

    mask: Tensor
    solution: Solution
    changed: int


def settle(
    gate: Gate, layer: GatedLayer, others: Sequence[LayerEquations], usual: float
) -> Settled:
    """Settle the units of ``gate`` by the gradient of the ``layer`` below it.

    ``others`` are equations of other layers on the same input; ``usual`` is the relative residual
    of the layers settled so far.
    """
    mask = gate.mask.clone()
    limit = _spare_channels(layer, others)
    units = _within(gate.doubtful, limit)
    for _ in range(_DECISIONS if len(units) else 0):
        out = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
        out[units[:, 1]] = True
        solved = solve_input([layer.equations(mask).without(out), *others])
        if not solved.determined:
            break
        before, mask = mask, _decided(mask, gate.doubtful, layer, solved.x)
        if len(units) == len(gate.doubtful) or bool((mask == before).all()):
            break
    solved = solve_input([layer.equations(mask), *others])
    if solved.determined and solved.residual > JUMP * usual:
        repaired = _repaired(mask, layer, others, solved, JUMP * usual, limit)
        if repaired is not None:
            mask = repaired
            solved = solve_input([layer.equations(mask), *others])
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
    left = layer.equations(mask).residuals(x)
    for channel in sorted(set(units[:, 1].tolist())):
        own = units[units[:, 1] == channel]
        columns = patches[own[:, 0], :, :, own[:, 2]].flatten(1)
        columns = columns * layer.coefficient[own[:, 0], channel, own[:, 2], None]
        share = torch.linalg.lstsq(columns.mT, left[channel].flatten()[:, None]).solution
        mask[own[:, 0], channel, own[:, 2]] = share.flatten() > 0.5
    return mask


def _repaired(
    mask: Tensor,
    layer: GatedLayer,
    others: Sequence[LayerEquations],
    solved: Solution,
    allowed: float,
    limit: int,
) -> Tensor | None:
    """Leave out the channels that fit worst until the others fit, and mend their units.

    Returns None where no such set of channels is found.
    """
    bad = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
    whole = layer.equations(mask)
    size = torch.linalg.vector_norm(layer.gradient)
    x = solved.x
    for _ in range(_ROUNDS):
        left = torch.linalg.vector_norm(whole.residuals(x).flatten(1), dim=1) / size
        usual = left[~bad].median()
        outlying = (left > _OUTLYING * usual) & ~bad
        if not bool(outlying.any()) or int((bad | outlying).sum()) > limit:  # the worst first
            worst = torch.where(bad, 0.0, left).topk(max(1, limit // 5)).indices
            outlying = torch.zeros_like(bad).index_fill(0, worst, True)
        more = bad | outlying
        if int(more.sum()) > limit:
            return None
        bad = more
        again = solve_input([whole.without(bad), *others])
        if not again.determined:
            return None
        x = again.x
        if again.residual <= allowed:
            return _mended(mask, bad, layer, x)
    return None


def _mended(mask: Tensor, bad: Tensor, layer: GatedLayer, x: Tensor) -> Tensor:
    """Read all units of the ``bad`` channels off their gradients, given the layer's input ``x``."""
    mask = mask.clone()
    patches = layer.window.patches(x).movedim(3, 1).flatten(2)  # (N, P, C·T)
    if patches.shape[0] * patches.shape[1] > patches.shape[2]:
        return mask
    for channel in bad.nonzero().flatten().tolist():
        columns = (layer.coefficient[:, channel, :, None] * patches).flatten(0, 1)
        target = layer.gradient[channel].flatten()
        share = torch.linalg.pinv(columns.mT, rtol=_INDEPENDENT) @ target
        mask[:, channel] = share.view(mask.shape[0], -1) > 0.5
    return mask
