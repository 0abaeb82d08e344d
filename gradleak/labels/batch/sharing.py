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
# Readings that are yielded, times N², since to polish one costs so much the more; and of those that
# are not complete, how many are gone on with.
_WORK, _BEGUN = 16384, 4096


@dataclass(frozen=True)
class _Reading:
    """Who shares with whom: ``gifts`` (giver, taker, share), in the order in which they were made.

    ``weights`` are those that are left in each sample's row; ``single`` are the samples of one
    class so far. A giver has given all that it lacked.
    """

    weights: tuple[float, ...]
    single: tuple[bool, ...]
    gifts: tuple[tuple[int, int, float], ...] = ()

    def over(self) -> list[int]:
        """Return the rows that weigh more than one label does, the heaviest first."""
        heavy = [k for k, weight in enumerate(self.weights) if weight > 1.0 + _LACK]
        return sorted(heavy, key=lambda k: -self.weights[k])

    def after(self, giver: int, taker: int) -> _Reading | None:
        """Let a sample have in the class of ``taker`` what it lacks; None where that cannot be.

        More than one label may be left to the taker only where three samples share a class.
        """
        share = 1.0 - self.weights[giver]
        left = self.weights[taker] - share
        single = self.single[giver] and self.single[taker] and giver != taker
        if not single or share < _LACK or left < _SHARE:
            return None
        if left > 1.0 + _LACK and self.weights[taker] < 2.0:
            return None
        weights, alone = list(self.weights), list(self.single)
        weights[giver], weights[taker], alone[giver] = 1.0, left, False
        return _Reading(tuple(weights), tuple(alone), (*self.gifts, (giver, taker, share)))


def share_out(
    whole: Subspace, rows: Tensor, classes: Tensor, sample: Tensor
) -> Iterator[tuple[Tensor, Labels]]:
    """Yield coordinates (N, n) and labels for each way in which samples may share classes.

    ``rows`` (L, n) are what each of the ``classes`` (L,) has of the samples, times M; those of one
    ``sample`` (L,) are parallel. Nothing is yielded where no row weighs more than a label.
    """
    unit = whole.unit_row
    assert unit is not None
    groups = [(sample == k).nonzero()[:, 0].tolist() for k in range(int(sample.max()) + 1)]
    own = torch.stack([rows[group].sum(0) for group in groups])
    heights = (rows @ unit).tolist()
    first = _Reading(tuple((own @ unit).tolist()), tuple(len(group) == 1 for group in groups))
    if not first.over():
        return
    for reading in itertools.islice(_readings(first), max(1, _WORK // len(groups) ** 2)):
        left = own.clone()
        labels = [{int(classes[k]): heights[k] for k in group} for group in groups]
        for giver, taker, share in reading.gifts:
            left[giver] = left[giver] / (left[giver] @ unit)
            left[taker] = left[taker] - share * left[giver]
            (shared,) = labels[taker]
            labels[taker][shared] -= share
            labels[giver][shared] = share
        yield left / (left @ unit)[:, None], _labels(whole, labels, rows)


def _labels(whole: Subspace, labels: list[dict[int, float]], like: Tensor) -> Labels:
    """Return labels of weights by class, all of them with a base."""
    supports, weights = [], []
    for label in labels:
        order = sorted(label, key=lambda c: -label[c])
        supports.append(torch.tensor(order, device=like.device))
        weights.append(like.new_tensor([label[c] for c in order]))
    base = torch.ones(len(supports), dtype=torch.bool)
    return labels_of(whole.classes, supports, weights, base)


def _readings(first: _Reading) -> Iterator[_Reading]:
    """Yield the readings of which no row weighs more than a label, those of fewest gifts first.

    Beside what a sample gives to a row that is too heavy, it may give to another whose own sample
    gives to that one in turn.
    """
    count = itertools.count()  # of two that cost the same, the one that was thought of first
    open_ = [(0, 0, next(count), first)]
    everyone = range(len(first.weights))
    for _ in range(_BEGUN):
        if not open_:
            return
        *_, reading = heapq.heappop(open_)
        over = reading.over()
        if not over:
            yield reading
            continue
        ahead = [reading.after(giver, over[0]) for giver in everyone]
        for giver, between in itertools.product(everyone, repeat=2):
            passed = None if between in over else reading.after(giver, between)
            ahead.append(None if passed is None else passed.after(between, over[0]))
        for one in ahead:
            if one is not None:
                heavy = len(one.over())
                heapq.heappush(open_, (len(one.gifts) + heavy, heavy, next(count), one))
