"""Samples that share a class turned against one another: what moments leave open (ALGORITHMS §4).

Samples as they are made orthonormal can be turned in all directions that the rows of their labels'
classes do not tell, and the rows and the second moment stay as they are; so they do if two labels
of one class turn in their plane, their weights the projections on their row. To first order nothing
else tells these apart. The gradient does: every direction of U lies in the span of the deltas, and
those with the smallest singular values are the differences of deltas that are nearly parallel. They
depend on nothing but the turn, once the other samples are known; so the turns are drawn by the
hundred, and the best of them varied less and less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Polished
from gradleak.labels.batch.structures import Part, alone
from gradleak.labels.batch.subspace import Subspace

# Draws at first; how many are kept, and varied how often; in so many generations, each so much
# narrower than the one before, in radians.
_FIRST, _KEPT, _EACH, _GENERATIONS = 1024, 16, 16, 10
_WIDE, _WIDTH, _NARROWER = 2.0, 0.5, 0.7
# A direction of the samples is told by the rows if they have this part of the largest along it.
_TOLD, _TINY = 1e-6, 1e-14
# What a weight outside its bounds costs, beside a share of U that is not in the span of the deltas.
_SMALLEST, _OUTSIDE = 0.03, 10.0


def turned(
    whole: Subspace, labelled: Tensor, solved: Polished, parts: list[Part], dice: torch.Generator
) -> tuple[Tensor, list[Part]] | None:
    """Return coordinates (N, n) and labels turned so that the deltas span U best.

    ``solved`` are all samples as they were polished, ``parts`` their labels on the ``labelled``
    classes. None where no turn is open.
    """
    turning = _Turning(whole, labelled, solved, parts)
    if not turning.open:
        return None
    turns, angles = turning.drawn(_FIRST, _WIDE, dice)
    turns[::2, :, 0] *= -1.0
    misfits = turning.misfits(turns, angles)
    width = _WIDTH
    for _ in range(_GENERATIONS):
        best = misfits.argsort()[:_KEPT]
        kept, kept_angles, kept_misfits = turns[best], angles[best], misfits[best]
        more, by = turning.drawn(len(best) * _EACH, width, dice)
        more = more @ kept.repeat(_EACH, 1, 1)
        by = by + kept_angles.repeat(_EACH, 1)
        turns, angles = torch.cat([kept, more]), torch.cat([kept_angles, by])
        misfits = torch.cat([kept_misfits, turning.misfits(more, by)])
        width *= _NARROWER
    best = misfits.argmin()[None]
    return turning.taken(turns[best], angles[best])


class _Turning:
    """The turns of a batch: of its k untold directions (k, k), and of its pairs (p angles)."""

    def __init__(
        self, whole: Subspace, labelled: Tensor, solved: Polished, parts: list[Part]
    ) -> None:
        self.whole, self.parts = whole, parts
        white = solved.a / whole.values
        squares, turn = torch.linalg.eigh(white.T @ white)
        root = squares.clamp(min=_TINY * float(squares[-1])).sqrt()
        self.root = (turn * root) @ turn.T
        self.samples = white @ ((turn / root) @ turn.T)
        weights = white.new_zeros(len(parts), len(labelled))
        for row, part in enumerate(parts):
            weights[row, list(part.places)] = weights.new_tensor(part.weights)
        _, sizes, directions = torch.linalg.svd(weights.T @ self.samples)
        self.untold = directions[int((sizes > _TOLD * sizes[0]).sum()) :]
        shares = self.samples @ self.untold.T
        loose = shares.norm(dim=1) > _TOLD
        self.loose = loose.nonzero()[:, 0].tolist()
        self.shares = shares[loose]
        self.told = self.samples[loose] - self.shares @ self.untold
        self.labels = solved.labels.dense()
        self.pairs = self._pairs()
        place = {row: k for k, row in enumerate(self.loose)}
        self.first = [place[i] for i, _ in self.pairs]
        self.second = [place[j] for _, j in self.pairs]
        sizes_of_pairs = [[parts[i].weights[0], parts[j].weights[0]] for i, j in self.pairs]
        both = white.new_tensor(sizes_of_pairs).view(-1, 2)
        self.size = both.norm(dim=1)  # (p,)
        self.angles = torch.atan2(both[:, 1], both[:, 0])
        self.classes = labelled[[parts[i].places[0] for i, _ in self.pairs]]
        fixed = solved.deltas[~loose]
        self.basis = torch.linalg.qr(fixed.T).Q
        weakest = whole.left[:, whole.size - len(self.untold) :]
        self.goal = weakest - self.basis @ (self.basis.T @ weakest)

    @property
    def open(self) -> bool:
        """Whether anything can be turned."""
        return len(self.untold) > 0 and len(self.loose) > 0

    def _pairs(self) -> list[tuple[int, int]]:
        """Return the rows of each two labels that rest on one class alone."""
        rows: dict[int, list[int]] = {}
        for row in self.loose:
            if len(self.parts[row].places) == 1:
                rows.setdefault(self.parts[row].places[0], []).append(row)
        return [(each[0], each[1]) for each in rows.values() if len(each) == 2]

    def drawn(self, count: int, width: float, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw turns (count, k, k), and angles (count, p) by which pairs turn."""
        k, like = len(self.untold), self.samples
        skew = torch.randn(count, k, k, generator=dice, dtype=like.dtype).to(like.device)
        angles = torch.randn(count, len(self.pairs), generator=dice, dtype=like.dtype)
        turns: Tensor = torch.linalg.matrix_exp(width * (skew - skew.mT))
        return turns, width * angles.to(like.device)

    def misfits(self, turns: Tensor, angles: Tensor) -> Tensor:
        """Return (count,) the share of the weakest of U that the deltas do not span."""
        samples, labels, outside = self._turned(turns, angles)
        delta = self.whole.probabilities(samples @ self.root * self.whole.values) - labels
        delta = delta - delta @ self.basis @ self.basis.T
        span = torch.linalg.qr((delta / delta.norm(dim=2, keepdim=True)).mT).Q
        left = self.goal - span @ (span.mT @ self.goal)
        share = left.flatten(1).norm(dim=1) / math.sqrt(len(self.untold))
        misfits: Tensor = share.nan_to_num(torch.inf) + _OUTSIDE * outside
        return misfits

    def _turned(self, turns: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples (count, l, n) and labels (count, l, C), and how far weights are off."""
        samples = self.told + self.shares @ turns @ self.untold
        labels = self.labels[self.loose].expand(len(turns), -1, -1).clone()
        if not self.pairs:
            return samples, labels, samples.new_zeros(len(turns))
        c, s = torch.cos(self.angles)[:, None], torch.sin(self.angles)[:, None]
        one, two = samples[:, self.first], samples[:, self.second]
        along, across = c * one + s * two, s * one - c * two
        angle = (self.angles + angles)[..., None]
        samples[:, self.first] = torch.cos(angle) * along + torch.sin(angle) * across
        samples[:, self.second] = torch.sin(angle) * along - torch.cos(angle) * across
        outside = samples.new_zeros(len(turns))
        for rows, weight in self._weights(angles):
            labels[:, rows] = ((1.0 - weight) / self.whole.classes)[..., None]
            on = self.classes.expand(len(turns), -1)[..., None]
            labels[:, rows] = labels[:, rows].scatter_add(2, on, weight[..., None])
            outside += ((weight - 1.0).clamp(min=0.0) + (_SMALLEST - weight).clamp(min=0.0)).sum(1)
        return samples, labels, outside

    def _weights(self, angles: Tensor) -> list[tuple[list[int], Tensor]]:
        """Return the weights (count, p) of the first and of the second samples of the pairs."""
        angle = self.angles + angles
        first, second = self.size * torch.cos(angle), self.size * torch.sin(angle)
        return [(self.first, first), (self.second, second)]

    def taken(self, turn: Tensor, angles: Tensor) -> tuple[Tensor, list[Part]]:
        """Return all coordinates (N, n) and labels with one ``turn`` (1, k, k)."""
        samples = self.samples.clone()
        samples[self.loose] = self._turned(turn, angles)[0][0]
        parts = list(self.parts)
        for rows, weight in self._weights(angles):
            for row, value in zip(rows, weight[0].clamp(_SMALLEST, 1.0).tolist(), strict=True):
                (place,) = parts[self.loose[row]].places
                parts[self.loose[row]] = alone(place, value)
        return samples @ self.root * self.whole.values, parts
