"""Classes that samples share, where the rows of the gradient are nearly the labels (§2, §4).

A row is the sum of what its class has of every sample, w_nk [x_n, 1] / M. If one sample alone rests
on the class it is that sample's feature. If two do, the weights often add up to more than one,
which no label has, and one of the two is mixed: what it lacks elsewhere of one it has here, and
with its other row its feature is known. Taken off, the other sample is left. So who shares with
whom is a puzzle of few solutions, and the joint polish says of each whether it is the one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Labels, labels_of
from gradleak.labels.batch.subspace import Subspace

# What a label may lack of one and be whole; and a share of a class below this is none.
_LACK, _SHARE = 0.02, 0.02
# Readings that are yielded.
_READINGS = 64


@dataclass(frozen=True)
class _Reading:
    """One row (n,) a sample, times M, and the ``labels`` that it stands for: weights by class."""

    rows: tuple[Tensor, ...]
    labels: tuple[dict[int, float], ...]

    def weight(self, sample: int) -> float:
        """Return the weight of a sample's row, which is its last entry."""
        return sum(self.labels[sample].values())

    def cost(self, shares: int) -> int:
        """Return how many shares a reading has at least, after so many were given."""
        return shares + sum(self.weight(k) > 1.0 + _LACK for k in range(len(self.labels)))

    def over(self) -> int | None:
        """Return the row that weighs most, if that is more than one label does."""
        heaviest = max(range(len(self.labels)), key=self.weight)
        return heaviest if self.weight(heaviest) > 1.0 + _LACK else None

    def gives(self, giver: int, taker: int) -> _Reading | None:
        """Let a sample have in the class of ``taker`` what it lacks; None where that cannot be."""
        share = 1.0 - self.weight(giver)
        left = self.weight(taker) - share
        single = len(self.labels[giver]) == len(self.labels[taker]) == 1
        if giver == taker or not single or share < _LACK or left < _SHARE:
            return None
        (shared,) = self.labels[taker]
        rows, labels = list(self.rows), list(self.labels)
        rows[taker] = rows[taker] - share / self.weight(giver) * rows[giver]
        rows[giver] = rows[giver] / self.weight(giver)
        labels[taker] = {shared: left}
        labels[giver] = {**labels[giver], shared: share}
        return _Reading(tuple(rows), tuple(labels))


def share_out(
    whole: Subspace, rows: Tensor, classes: Tensor, sample: Tensor
) -> Iterator[tuple[Tensor, Labels]]:
    """Yield coordinates (N, n) and labels for each way in which samples may share classes.

    ``rows`` (L, n) are what each of the ``classes`` (L,) has of the samples, times M; those of one
    ``sample`` (L,) are parallel. Nothing is yielded where no row weighs more than a label.
    """
    unit = whole.unit_row
    assert unit is not None
    heights = (rows @ unit).tolist()
    groups = [(sample == k).nonzero()[:, 0].tolist() for k in range(int(sample.max()) + 1)]
    first = _Reading(
        tuple(rows[group].sum(0) for group in groups),
        tuple({int(classes[k]): heights[k] for k in group} for group in groups),
    )
    if first.over() is None:
        return
    for reading in _readings(first):
        stacked = torch.stack(reading.rows)
        supports, weights = [], []
        for label in reading.labels:
            order = sorted(label, key=lambda c: -label[c])
            supports.append(classes.new_tensor(order))
            weights.append(rows.new_tensor([label[c] for c in order]))
        base = torch.ones(len(supports), dtype=torch.bool)
        labels = labels_of(whole.classes, supports, weights, base)
        yield stacked / (stacked @ unit)[:, None], labels


def _readings(first: _Reading) -> Iterator[_Reading]:
    """Yield the readings of which no row weighs more than a label, those of fewest shares first.

    Beside what a sample gives to a row that is too heavy, it may give to another whose own sample
    gives to that one in turn.
    """
    count = itertools.count()  # of two that cost the same, the one that was thought of first
    open_ = [(first.cost(0), next(count), 0, first)]
    done = 0
    while open_ and done < _READINGS:
        _, _, shares, reading = heapq.heappop(open_)
        over = reading.over()
        if over is None:
            done += 1
            yield reading
            continue
        for giver, between in itertools.product(range(len(reading.rows)), repeat=2):
            if between in (giver, over):
                continue
            passed = reading.gives(giver, between)
            ahead = None if passed is None else passed.gives(between, over)
            if ahead is not None:
                heapq.heappush(open_, (ahead.cost(shares + 2), next(count), shares + 2, ahead))
        for giver in range(len(reading.rows)):
            ahead = reading.gives(giver, over)
            if ahead is not None:
                heapq.heappush(open_, (ahead.cost(shares + 1), next(count), shares + 1, ahead))
