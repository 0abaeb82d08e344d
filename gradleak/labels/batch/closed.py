"""A batch solved from the closed form of its moments, where the softmax hardly bends (§4).

The moments say which labels there may be; the samples follow as the orthonormal set that is nearest
to them, and all are polished together. Where samples share a class they are turned against one
another, and polished again, as long as that leaves less of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.judge import excess
from gradleak.labels.batch.moments import Moments, moments_of
from gradleak.labels.batch.polish import Labels, Polished, labels_of, polish
from gradleak.labels.batch.structures import Part, structures
from gradleak.labels.batch.subspace import Subspace
from gradleak.labels.batch.turning import turned

_FIRST_STEPS, _STEPS = 40, 25
# What the samples may leave of the gradient, in what its precision explains: to be taken at once,
# to be taken at all, and to be turned no further; and what a turn must gain.
_SURE, _NEAR, _FINE, _GAIN = 0.45, 10.0, 0.2, 0.9
_TURNS = 8
# Directions in which nothing is known are drawn: the size of the draw.
_DRAWN = 0.01
# Operations that all polishes together may take, and how many polishes at least and at most.
_OPERATIONS, _FEWEST, _MOST = 2e12, 3, 400

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _State:
    """A batch that was polished: what it leaves, relative to what is explained, and its labels."""

    excess: float
    solved: Polished
    parts: list[Part]


def solve_closed(
    whole: Subspace, dice: torch.Generator, progress: Progress | None = None
) -> tuple[Tensor, Labels] | None:
    """Return coordinates (N, n) and labels of all samples as their moments tell them, or None.

    Needs a known loss scale, and as many samples as the gradient's rank. What comes back explains
    the gradient, or nearly: :func:`gradleak.labels.batch.judge.judge` says. ``progress`` is told
    how many of the polishes are done.
    """
    if not whole.mass_known or whole.size != whole.samples:
        return None
    moments = moments_of(whole)
    if moments is None:
        return None
    search = _Search(whole, moments, dice, progress)
    for parts in structures(moments.gram, whole.size, dice):
        search.climb(parts)
        if search.over:
            break
    best = search.best
    if best is None or best.excess > _NEAR:
        return None
    return best.solved.a, best.solved.labels


class _Search:
    """The best state so far, and what there is left to spend."""

    def __init__(
        self,
        whole: Subspace,
        moments: Moments,
        dice: torch.Generator,
        progress: Progress | None,
    ) -> None:
        self.whole, self.moments, self.dice, self.progress = whole, moments, dice, progress
        self.best: _State | None = None
        unknowns = whole.size * (whole.size + 2)
        self.budget = int(min(_MOST, max(_FEWEST, _OPERATIONS / (_STEPS * unknowns**3))))
        self.spent = 0

    @property
    def over(self) -> bool:
        """Whether the best is good enough, or the budget spent."""
        sure = self.best is not None and self.best.excess < _SURE
        return sure or self.spent >= self.budget

    def climb(self, parts: list[Part]) -> None:
        """Polish a batch of these labels, then turn its samples while that helps."""
        state = self._polished(self._placed(parts), parts, _FIRST_STEPS)
        for _ in range(_TURNS):
            if self.spent >= self.budget or state.excess < _FINE:
                return
            labelled = self.moments.labelled
            turn = turned(self.whole, labelled, state.solved, state.parts, self.dice)
            if turn is None:
                return
            after = self._polished(*turn, _STEPS)
            if not after.excess < _GAIN * state.excess:
                return
            state = after

    def _placed(self, parts: list[Part]) -> Tensor:
        """Return (N, n) the coordinates nearest to the moments' rows; some are drawn."""
        rows = self.moments.rows
        weights = rows.new_zeros(len(parts), len(rows))
        for n, part in enumerate(parts):
            weights[n, list(part.places)] = weights.new_tensor(part.weights)
        draw = torch.randn(len(parts), rows.shape[1], generator=self.dice, dtype=rows.dtype)
        left, _, right = torch.linalg.svd(weights @ rows + _DRAWN * draw.to(rows.device))
        placed: Tensor = left @ right @ self.moments.root * self.whole.values
        return placed

    def _polished(self, a: Tensor, parts: list[Part], steps: int) -> _State:
        labelled = self.moments.labelled
        labels = labels_of(
            self.whole.classes,
            [labelled[list(part.places)] for part in parts],
            [a.new_tensor(part.weights) for part in parts],
            torch.tensor([part.smoothed for part in parts]),
        )
        solved = polish(self.whole, a, labels, steps=steps)
        state = _State(excess(self.whole, solved), solved, self._read_off(solved, parts))
        if self.best is None or state.excess < self.best.excess:
            self.best = state
        self.spent += 1
        if self.progress is not None:
            self.progress(self.spent, self.budget)
        return state

    def _read_off(self, solved: Polished, parts: list[Part]) -> list[Part]:
        """Return the parts with the weights that were solved for."""
        dense, base = solved.labels.dense(), solved.labels.weights[:, -1] / self.whole.classes
        return [
            part._replace(
                weights=tuple(
                    (dense[n, self.moments.labelled[list(part.places)]] - base[n]).tolist()
                )
            )
            for n, part in enumerate(parts)
        ]
