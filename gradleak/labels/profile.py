"""Intervals of a label under noise, from the profile of its likelihood.

A parameter's interval is where the likelihood, maximised over all the others, is not below its
maximum by more than half a χ² of one degree of freedom. Unlike a multiple of the standard error it
stays right where the information changes within it: a larger feature says more about the label.
Source: D. J. Venzon and S. H. Moolgavkar, Applied Statistics 37 (1988) 87-94.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.labels.gaussian import (
    Aim,
    Model,
    Observation,
    label_map,
    linearise,
    moved,
    squares_of,
    take,
)
from gradleak.labels.likelihood import freed_norm
from gradleak.labels.maxima import Maxima
from gradleak.labels.verdict import INTERVAL_STDS, Interval, LabelIntervals, SampleLabel
from gradleak.labels.weigh import Choice

_STEPS = 12
# How near to its level, in squared standard deviations, χ² has to end.
_REACHED = 0.05


@dataclass(frozen=True)
class Ends:
    """The lower and upper ends of intervals: ``scale`` (B, 2) of ‖x‖, ``loss_scale`` (B, 2) of γ.

    ``entries`` (B, K + 1, 2) are those of the label at the K classes of ``model.top`` and, last, of
    all others. An end is infinite where the likelihood does not fall so far.
    """

    scale: Tensor
    entries: Tensor
    loss_scale: Tensor


def profile(seen: Observation, peak: Model, *, loss_scale_free: bool) -> Ends:
    """Follow the profiles from the maxima ``peak`` (B, 1) of the likelihood to their ends."""
    to_label = label_map(peak.theta, seen.classes)
    along = to_label.new_zeros(len(to_label) + 2, to_label.shape[1] + 2)
    along[0, 0] = along[-1, -1] = 1.0
    along[1:-1, 1:-1] = to_label
    along = torch.cat([-along, along])[None]
    free = torch.cat(
        [
            torch.ones_like(peak.base)[..., None],
            peak.active,
            torch.full_like(peak.base, loss_scale_free)[..., None],
        ],
        -1,
    )
    variance = seen.noise[:, None].square()
    level = squares_of(seen, peak) + INTERVAL_STDS**2 * variance
    aim = Aim(along * free, level.expand(-1, along.shape[1]))
    model = Model(
        **{
            name: value.expand(-1, along.shape[1], *value.shape[2:])
            for name, value in vars(peak).items()
        }
    )
    gram = seen.gram()
    for step in range(_STEPS + 1):
        now = linearise(seen, model, gram, loss_scale_free, aim)
        reached = (now.squares - aim.squares).abs() <= _REACHED * variance
        reached |= (aim.along == 0.0).all(-1)
        if step == _STEPS or bool(reached.all()):
            break
        # What has arrived stays, so that no interval depends on the others.
        model = moved(model, now, (~reached).to(now.squares.dtype))
    values = torch.cat(
        [
            freed_norm(now, variance)[..., None],
            model.entries(to_label),
            model.loss_scale[..., None],
        ],
        -1,
    )
    count = values.shape[-1]
    low, high = (part.diagonal(dim1=1, dim2=2) for part in (values[:, :count], values[:, count:]))
    low = torch.where(reached[:, :count], low, -math.inf)
    high = torch.where(reached[:, count:], high, math.inf)
    both = torch.stack([low, high], -1)
    return Ends(scale=both[:, 0], entries=both[:, 1:-1], loss_scale=both[:, -1])


def with_intervals(
    choices: Sequence[Choice | None],
    seen: Observation,
    found: Maxima,
    *,
    loss_scale_free: bool = False,
) -> list[Choice | None]:
    """State the 95 % intervals of the answers that were chosen among the maxima ``found``."""
    made = [(b, choice.index) for b, choice in enumerate(choices) if choice is not None]
    if not made:
        return list(choices)
    rows, columns = torch.tensor(made, device=seen.noise.device).unbind(1)
    few, _ = seen.rows(rows, None)
    peak = take(found.model, rows, columns[:, None])
    ends = profile(few, peak, loss_scale_free=loss_scale_free)
    order = found.order[rows, columns].tolist()
    stated = list(choices)
    for row, (b, _) in enumerate(made):
        choice = choices[b]
        if choice is None or choice.decision.answer is None:
            continue
        answer = choice.decision.answer
        intervals = _intervals(answer, ends, row, order[row])
        decision = replace(choice.decision, answer=replace(answer, intervals=intervals))
        stated[b] = replace(choice, decision=decision)
    return stated


def _intervals(answer: SampleLabel, ends: Ends, row: int, order: Sequence[int]) -> LabelIntervals:
    """Return the intervals ``row``; ``order`` are the places of the answer's classes in them."""
    scale = _around(ends.scale[row], abs(answer.scale), math.inf)
    if answer.scale < 0.0:
        scale = Interval(-scale.high, -scale.low)
    entries = ends.entries[row]
    weights = [
        _around(entries[place], weight, 1.0)
        for place, weight in zip(order, answer.weights, strict=False)
    ]
    base = _around(entries[-1], answer.base, 1.0) if answer.base_error > 0.0 else None
    gamma = None
    if answer.loss_scale is not None:
        gamma = _around(ends.loss_scale[row], answer.loss_scale, math.inf)
    return LabelIntervals(scale, tuple(weights), base, gamma)


def _around(ends: Tensor, value: float, most: float) -> Interval:
    """Return the interval as far as it lies in 0 … ``most``, with ``value`` in it."""
    low, high = ends.clamp(0.0, most).tolist()
    return Interval(min(low, value), max(high, value))
