"""Labels that a Gram matrix of their columns may come from (ALGORITHMS §4).

ŶᵀŶ has for a mixed label λ, 1 − λ the entry λ (1 − λ) where its classes meet, which tells λ but not
whose it is; what the mixed labels of a class leave of the diagonal is the sum of the squares of its
other labels, one if it is at most one and the batch has no sample to spare. What is left open is
drawn: the simpler the likelier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of the matrix are zero below so many times their median, and at least this.
_NOISE, _LEAST = 6.0, 0.01
# The diagonal adds up to within so many times that.
_SUMS = 4.0
# Mixed labels of one group of classes whose order is tried, and draws without a fit that end it.
_MIXED, _DRAWS = 8, 64
# How much less likely a sample more makes a reading of a group, and being off by one.
_MORE, _OFF = 1.5, 5.0
# Two labels of nearly one are hard so often.
_OFTEN = 0.9
# A class with a label of nearly one is hardly two of less, nor one of less than this.
_HARDLY, _SMALL = 0.05, 0.3


class Part(NamedTuple):
    """A label: places of its classes among those labelled, weights, whether it has a base."""

    places: tuple[int, ...]
    weights: tuple[float, ...]
    smoothed: bool


@dataclass(frozen=True)
class _Reading:
    """One way to read a group of classes: mixed labels, and (class, Σ w², labels) of the others."""

    mixed: list[Part]
    single: list[tuple[int, float, int]]
    off: float

    @property
    def samples(self) -> int:
        """Number of labels."""
        return len(self.mixed) + sum(labels for _, _, labels in self.single)


def structures(gram: Tensor, samples: int, dice: torch.Generator) -> Iterator[list[Part]]:
    """Draw labels of ``samples`` = N that ``gram`` (K, K) allows, again and again.

    Ends where there are none, or none are met in a while.
    """
    apart = gram[~torch.eye(len(gram), dtype=torch.bool, device=gram.device)].abs()
    zero = max(_LEAST, _NOISE * float(apart.median())) if len(apart) else _LEAST
    groups = [_readings(group, gram.cpu(), zero) for group in _groups(gram > zero)]
    if not all(groups):
        return
    missed = 0
    while missed < _DRAWS:
        chosen = [readings[_drawn(_likely(readings), dice)] for readings in groups]
        spare = samples - sum(reading.samples for reading in chosen)
        single = [one for reading in chosen for one in reading.single]
        if not 0 <= spare <= len(single):
            missed += 1
            continue
        missed = 0
        parts = [part for reading in chosen for part in reading.mixed]
        split = _split_among(single, spare, zero, dice)
        for place, (k, squares, labels) in enumerate(single):
            parts += _alone(k, squares, labels + (place in split), dice)
        yield parts


def _groups(joined: Tensor) -> list[list[int]]:
    """Return the sets of classes that mixed labels join."""
    from scipy.sparse.csgraph import connected_components

    count, names = connected_components(joined.cpu().numpy(), directed=False)
    return [[k for k, name in enumerate(names.tolist()) if name == each] for each in range(count)]


def _readings(group: list[int], gram: Tensor, zero: float) -> list[_Reading]:
    """Return the ways to read one group of classes, those of the fewest samples first."""
    square = {k: float(gram[k, k]) for k in group}
    pairs = [(i, j) for i, j in itertools.combinations(group, 2) if float(gram[i, j]) > zero]
    found = []
    if len(group) == 2:
        i, j = group
        x, y = (math.sqrt(max(square[k], 0.0)) for k in group)
        if abs(x * y - float(gram[i, j])) < 2.0 * zero and x + y < 1.0 + _SUMS * zero:
            part = _ordered((i, j), (x, y), x + y < 1.0 - _SUMS * zero)
            found.append(_Reading([part], [], abs(1.0 - x - y)))
    for turned in itertools.product((False, True), repeat=min(len(pairs), _MIXED)):
        left, mixed = dict(square), []
        for (i, j), swap in zip(pairs, turned, strict=False):
            larger = 0.5 + math.sqrt(max(0.0, 0.25 - float(gram[i, j])))
            x, y = (1.0 - larger, larger) if swap else (larger, 1.0 - larger)
            left[i], left[j] = left[i] - x * x, left[j] - y * y
            mixed.append(_ordered((i, j), (x, y), False))
        if min(left.values()) < -_SUMS * zero:
            continue
        none = [abs(v) for v in left.values() if v < _SUMS * zero]
        single = [
            (k, v, max(1, math.ceil(v - _SUMS * zero)))
            for k, v in left.items()
            if v >= _SUMS * zero
        ]
        found.append(_Reading(mixed, single, sum(none)))
    return sorted(found, key=lambda reading: (reading.samples, reading.off))


def _ordered(places: tuple[int, int], weights: tuple[float, float], smoothed: bool) -> Part:
    if weights[0] >= weights[1]:
        return Part(places, weights, smoothed)
    return Part(places[::-1], weights[::-1], smoothed)


def _likely(readings: list[_Reading]) -> list[float]:
    costs = [_MORE * r.samples + _OFF * r.off for r in readings]
    return [math.exp(min(costs) - cost) for cost in costs]


def _split_among(
    single: list[tuple[int, float, int]], spare: int, zero: float, dice: torch.Generator
) -> list[int]:
    """Choose the classes that have one label more than they must."""
    if not spare:
        return []
    hard = [_HARDLY if abs(squares - 1.0) < 2.0 * zero else 1.0 for _, squares, _ in single]
    small = [_HARDLY if squares < _SMALL else 1.0 for _, squares, _ in single]
    chances = torch.tensor(hard) * torch.tensor(small)
    chosen: list[int] = torch.multinomial(chances, spare, generator=dice).tolist()
    return chosen


def _alone(k: int, squares: float, labels: int, dice: torch.Generator) -> list[Part]:
    """Return labels of class ``k`` alone whose weights have the sum of squares ``squares``.

    Of two, one is hard, or both are smoothed and drawn.
    """
    if labels == 1:
        return [alone(k, math.sqrt(squares))]
    if labels > 2:
        return [alone(k, math.sqrt(squares / labels))] * labels
    least = math.sqrt(max(squares - 1.0, 0.02))
    first, second = torch.rand(2, generator=dice).tolist()
    if squares > 1.0 and first < (_OFTEN if abs(squares - 2.0) < _LEAST else 0.5):
        return [alone(k, 1.0), alone(k, least)]
    weight = least + (math.sqrt(squares / 2.0) - least) * second
    other = math.sqrt(max(squares - weight * weight, 0.02))
    return [Part((k,), (min(w, 1.0),), True) for w in (other, weight)]


def alone(k: int, weight: float) -> Part:
    """Return a label of one class, smoothed unless its weight is nearly one."""
    weight = min(weight, 1.0)
    return Part((k,), (weight,), weight < 1.0 - _LEAST)


def _drawn(chances: list[float], dice: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(chances), 1, generator=dice))
