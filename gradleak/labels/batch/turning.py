"""Samples of one class turned against one another: what their moments leave open (ALGORITHMS §4).

Two labels of class k add w_1 a_1 + w_2 a_2 to its row and a_1 a_1ᵀ + a_2 a_2ᵀ to the second moment.
Both stay as they are when the pair turns in its plane, with weights that are its projections on the
row; or when all directions that no row tells are turned; or when a pair becomes one sample and
another sample two. To first order nothing else tells these apart; the gradient itself does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Polished
from gradleak.labels.batch.structures import Part, alone
from gradleak.labels.batch.subspace import Subspace

_ANGLES, _SPINS = 48, 64
# A weight of a pair is no less than this, and how much more than one rounding makes it.
_SMALLEST, _FULL = 0.05, 1.02
# A direction of the samples is told by the rows if they have this part of the largest along it.
_TOLD, _TINY = 1e-6, 1e-14
# Of the turns of one kind, so many are kept.
_KEPT = 2


@dataclass(frozen=True)
class Turn:
    """Another choice of a few samples: ``rows``, their coordinates ``a`` (k, n), their labels.

    ``misfit`` is what the whole batch then leaves of the gradient.
    """

    misfit: float
    rows: list[int]
    a: Tensor
    parts: list[Part]


@dataclass(frozen=True)
class _Pair:
    """Two samples (rows) of class ``place``: the direction ``along`` its row and that ``across``.

    ``size`` is √(w_1² + w_2²).
    """

    place: int
    rows: list[int]
    along: Tensor
    across: Tensor
    size: float


class Turner:
    """The turns of one state of a batch: its samples' coordinates, and what they leave."""

    def __init__(
        self,
        whole: Subspace,
        labelled: Tensor,
        solved: Polished,
        parts: list[Part],
        dice: torch.Generator,
    ) -> None:
        """Take the samples as they are ``solved`` and described by ``parts``."""
        self.whole, self.labelled, self.parts, self.dice = whole, labelled, parts, dice
        self.labels = solved.labels.dense()
        white = solved.a / whole.values
        squares, turn = torch.linalg.eigh(white.T @ white)
        root = squares.clamp(min=_TINY * float(squares[-1])).sqrt()
        self.root = (turn * root) @ turn.T
        self.samples = white @ ((turn / root) @ turn.T)
        self.each = self._added(solved.a, self.labels)
        self.left = self.each.sum(0) - whole.left * whole.values
        self.turns: list[Turn] = []

    def best(self) -> list[Turn]:
        """Return the turns, those that leave least of the gradient first."""
        rows: dict[int, list[int]] = {}
        for row, part in enumerate(self.parts):
            if len(part.places) == 1:
                rows.setdefault(part.places[0], []).append(row)
        pairs = [self._pair(k, each) for k, each in rows.items() if len(each) == 2]
        others = [(k, each[0]) for k, each in rows.items() if len(each) == 1]
        for pair in pairs:
            self._keep(pair.rows, self._turned(pair.place, pair.along, pair.across, pair.size))
            for k, row in others:
                self._keep([*pair.rows, row], self._moved(pair, k, row))
        self._spun()
        return sorted(self.turns, key=lambda turn: turn.misfit)

    def _added(self, a: Tensor, labels: Tensor) -> Tensor:
        """Return (..., C, n) what samples (..., n) with ``labels`` (..., C) add to U S."""
        delta = self.whole.probabilities(a) - labels
        return delta[..., :, None] * a[..., None, :] / self.whole.mass

    def _pair(self, place: int, rows: list[int]) -> _Pair:
        w = [self.parts[row].weights[0] for row in rows]
        size = math.hypot(*w)
        first, second = self.samples[rows[0]], self.samples[rows[1]]
        along = (w[0] * first + w[1] * second) / size
        across = (w[1] * first - w[0] * second) / size
        return _Pair(place, rows, along, across, size)

    def _turned(
        self, place: int, along: Tensor, across: Tensor, size: float
    ) -> list[tuple[Tensor, list[Part]]]:
        """Return pairs in the plane of ``along`` and ``across``, with the row ``size`` · along."""
        found = []
        angles = [(math.pi * (step / _ANGLES - 0.5), False) for step in range(_ANGLES)]
        if size > 1.0:  # one of them may be hard
            angles += [(sign * math.acos(1.0 / size), True) for sign in (1.0, -1.0)]
        for angle, hard in angles:
            other = angle - math.copysign(math.pi / 2.0, angle)
            weights = (size * math.cos(angle), size * math.cos(other))
            if min(weights) < _SMALLEST or max(weights) > _FULL:
                continue
            samples = [math.cos(t) * along + math.sin(t) * across for t in (angle, other)]
            parts = [
                alone(place, w) if hard else Part((place,), (min(w, 1.0),), True) for w in weights
            ]
            found.append((torch.stack(samples), parts))
        return found

    def _moved(self, pair: _Pair, place: int, row: int) -> list[tuple[Tensor, list[Part]]]:
        """Return the pair as one sample, and the sample ``row`` of class ``place`` as a pair."""
        if pair.size > _FULL:
            return []
        one = alone(pair.place, pair.size)
        pairs = self._turned(place, self.samples[row], pair.across, self.parts[row].weights[0])
        return [(torch.cat([two, pair.along[None]]), [*parts, one]) for two, parts in pairs]

    def _spun(self) -> None:
        """Keep the best of some draws of all directions that no class's row tells, turned."""
        weights = self.samples.new_zeros(len(self.samples), len(self.labelled))
        for row, part in enumerate(self.parts):
            weights[row, list(part.places)] = weights.new_tensor(part.weights)
        _, sizes, directions = torch.linalg.svd(weights.T @ self.samples)
        told = int((sizes > _TOLD * sizes[0]).sum())
        untold = directions[told:]
        if len(untold) < 2:
            return
        shares = self.samples @ untold.T
        rows = (shares.norm(dim=1) > _TOLD).nonzero()[:, 0].tolist()
        skew = torch.randn(_SPINS, *[len(untold)] * 2, generator=self.dice, dtype=weights.dtype)
        size = torch.rand(_SPINS, 1, 1, generator=self.dice, dtype=weights.dtype) * math.pi
        spins = torch.linalg.matrix_exp(size * (skew - skew.mT)).to(weights.device)
        spins[::2, :, 0] *= -1.0
        samples = self.samples[rows] + shares[rows] @ (spins @ untold - untold)
        parts = [self.parts[row] for row in rows]
        self._keep(rows, [(choice, parts) for choice in samples])

    def _keep(self, rows: list[int], choices: list[tuple[Tensor, list[Part]]]) -> None:
        """Keep the best of the choices for the samples in ``rows``."""
        if not choices:
            return
        a = torch.stack([samples for samples, _ in choices]) @ self.root * self.whole.values
        labels = torch.stack([self._dense(parts, rows) for _, parts in choices])
        without = self.left - self.each[rows].sum(0)
        misfits = (without + self._added(a, labels).sum(1)).flatten(1).norm(dim=1)
        for choice in misfits.argsort()[:_KEPT].tolist():
            self.turns.append(Turn(float(misfits[choice]), rows, a[choice], choices[choice][1]))

    def _dense(self, parts: list[Part], rows: list[int]) -> Tensor:
        """Return (k, C) labels of ``parts``; one that is as it was keeps its own."""
        dense = self.labels[rows].clone()
        for k, (part, row) in enumerate(zip(parts, rows, strict=True)):
            if part is not self.parts[row]:
                weight = part.weights[0] if part.smoothed else 1.0
                dense[k] = (1.0 - weight) / self.whole.classes
                dense[k, self.labelled[part.places[0]]] += weight
        return dense
