"""The units of a rectifier settled by the gradient of the layer below it (§6d).

Below a rectifier δ is known up to its mask, and the map above leaves units near zero in doubt. The
layer below has more equations than its input has unknowns, so a wrong unit leaves something of the
gradient: its own δ times what its window reads, in its own channel, and by way of the input, which
it spoils, a little in all others. The worst mistakes spoil most. So they are mended first, and the
input is solved for again before the next are looked for; what a unit gains by changing sides is
weighed against its odds. Channels that leave more than others when nothing gains any more were led
astray by two mistakes that look like a third: they are left out, and begun anew with the input that
the others agree on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.gates import Gate, GatedLayer
from gradleak.calculus.pairs import best_changes
from gradleak.calculus.solve import LayerEquations, Solution, solve_input
from gradleak.linalg import matmul

# Where all odds (nats) are longer, as without noise, only channels that do not fit are looked at.
_DOUBTFUL = 10.0
# Units whose odds are longer are sure; in a channel that fits nowhere, only these are.
_SURE, _SUREST = 16.0, 1000.0
# Changes that gain that share of the best are made together, one a channel.
_TOGETHER = 0.5
_CHANGES, _REPAIRS = 300, 12
# With that share of the equations to spare, every unit leaves that share of its squares. With fewer
# it is reckoned for each; where that cannot be done, it is no less than the other.
_PLENTY, _LEAST_KEPT = 0.5, 0.1
# Changes of one or two units in one channel, and steps towards shares.
_MOST, _SHARING = 200, 400
# After so many changes without a smaller residual there is nothing to be found.
_PATIENCE = 10
# A channel that leaves that many times the squares of the median has a mistake.
_OUTLYING = 2.0
# Or it may be rounding: of the gradient, so many times its variance relative to the spacing, and of
# the arithmetic before, so many roundings of single precision.
_ROUNDING, _MANY, _ROUNDINGS = 1.0 / 12.0, 4.0, 16.0
# Where channels are left out, so many times as many equations as unknowns have to stay.
_DETERMINED = 1.02


@dataclass(frozen=True)
class Settled:
    """A gate's final ``mask`` (N, O, P), the input below it, and how many units ``changed``."""

    mask: Tensor
    solution: Solution
    changed: int


def settle(
    gate: Gate, layer: GatedLayer, others: Sequence[LayerEquations], precision: float
) -> Settled:
    """Settle the units of ``gate`` by the gradient of the ``layer`` below it.

    ``others`` are equations of other layers on the same input; ``precision`` is the relative
    rounding of the gradients.
    """
    units = _Units(gate, layer, others, precision)
    mask = units.odds > 0.0
    solved = units.solve(mask)
    if solved.determined:
        if bool((units.odds.abs() < _DOUBTFUL).any()):
            mask, solved = _changed(units, mask, solved)
        mask, solved = _repaired(units, mask, solved)
    final = units.folded(mask)
    return Settled(final, solved, int((final != gate.mask).sum()))


@dataclass(frozen=True)
class _Look:
    """What an input leaves of each channel, for one mask.

    Of the patches that the units' windows read, ``gram`` (U, U) has the products, and ``along``
    (O, U) those with what is left of each channel, whose squares are ``left`` (O,).
    """

    gram: Tensor
    along: Tensor
    left: Tensor


class _Units:
    """The units of a rectifier by channel (O, U), U the places of all samples."""

    def __init__(
        self,
        gate: Gate,
        layer: GatedLayer,
        others: Sequence[LayerEquations],
        precision: float,
    ) -> None:
        self._layer, self._others, self._precision = layer, others, precision
        self._shape = layer.coefficient.shape
        self.odds = self._flat(gate.odds.to(layer.coefficient))
        self.step = self._flat(layer.step)
        self._base = layer.closed * self._flat(layer.coefficient)
        self._matrix = layer.gradient.flatten(1)
        self._size = torch.linalg.vector_norm(self._matrix)
        self.sizes = layer.equations(gate.mask).sizes().square()
        self.entries = self._matrix.shape[1]
        rows = sum(e.delta.shape[1] * e.window.taps for e in (layer.equations(gate.mask), *others))
        unknowns = self._shape[0] * layer.window.places
        self._kept = 1.0 - unknowns / rows
        # Channels that can be left out, half of them at most.
        spare = (rows - _DETERMINED * unknowns) / layer.window.taps
        self.spare = max(min(int(spare), self._shape[1] // 2), 1)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).flatten(1)

    def folded(self, mask: Tensor) -> Tensor:
        """Return a mask (O, U) as (N, O, P)."""
        samples, channels, places = self._shape
        return mask.view(channels, samples, places).transpose(0, 1)

    def solve(self, mask: Tensor, without: Tensor | None = None) -> Solution:
        """Solve for the input, of all channels or ``without`` some (O,)."""
        equations = self._layer.equations(self.folded(mask))
        if without is not None:
            equations = equations.without(without)
        return solve_input([equations, *self._others], self._precision)

    def look(self, mask: Tensor, x: Tensor) -> _Look:
        """Look at what the input ``x`` (N, C, places) leaves."""
        patches = self._layer.window.patches(x).movedim(3, 1).flatten(2).flatten(0, 1)
        gram = patches @ patches.mT
        along = matmul(self._matrix, patches.mT) - (self.step * mask + self._base) @ gram
        return _Look(gram, along, self.left(mask, x))

    def left(self, mask: Tensor, x: Tensor) -> Tensor:
        """Return (O,) the squares of what the input ``x`` leaves of each channel."""
        return self._layer.equations(self.folded(mask)).misfits(x).square()

    def noise(self, left: Tensor) -> float:
        """Return the variance of an entry of the gradient, by what is ``left`` of channels."""
        rounding = _ROUNDING * self._precision**2 * self.sizes.mean()
        return max(float(left.median()), float(rounding), 1e-300) / self.entries

    def kept(self, mask: Tensor, x: Tensor) -> Tensor | float:
        """Return (O, U) the share that remains of what a wrong unit leaves, at an input ``x``.

        The input takes up some of it, as of all: where equations are few, more of some than of
        others, and otherwise a share that is the same for all.
        """
        if self._kept > _PLENTY:
            return self._kept
        outputs, taps = self._shape[1], self._layer.window.taps
        matrix = self._layer.equations(self.folded(mask)).matrix()
        normal = matrix.mT @ matrix
        for other in self._others:
            own, weight = other.matrix(), self._size / other.sizes().norm()  # as they are solved
            normal = normal + weight.square() * (own.mT @ own)
        factor, singular = torch.linalg.cholesky_ex(normal)
        if bool(singular):
            return max(self._kept, _LEAST_KEPT)
        half = torch.linalg.solve_triangular(factor, matrix.mT, upper=False)
        half = half.mT.reshape(outputs, taps, -1)
        taken = half @ half.mT  # (O, T, T)
        patches = self._layer.window.patches(x).movedim(3, 1).flatten(0, 1)  # (U, C, T)
        squares = patches.mT @ patches
        whole = squares.diagonal(dim1=1, dim2=2).sum(1)
        share = taken.flatten(1) @ squares.flatten(1).mT / whole.clamp(min=1e-300)
        kept: Tensor = (1.0 - share).clamp(min=0.0)
        return kept

    def rounding(self) -> Tensor:
        """Return (O,) the squares that rounding may leave of each channel."""
        single = _ROUNDINGS * min(self._precision, torch.finfo(torch.float32).eps)
        sent = (_MANY * _ROUNDING) ** 0.5 * self._precision
        squares: Tensor = max(single, sent) ** 2 * self.sizes.clamp(min=float(self.sizes.mean()))
        return squares

    def gains(self, mask: Tensor, look: _Look, noise: float, kept: Tensor | float) -> Tensor:
        """Return (O, U) half the squares that units take away by changing sides, with odds."""
        side = 1.0 - 2.0 * mask.to(self.step)
        fits = side * self.step * look.along
        size = 0.5 * kept * self.step.square() * look.gram.diagonal()
        gains: Tensor = fits - size + side * noise * self.odds
        return gains


def _changed(units: _Units, mask: Tensor, solved: Solution) -> tuple[Tensor, Solution]:
    """Change the units that gain most, and solve again, until none gains."""
    plausible = units.odds.abs() < _SURE
    best, best_solved, waited = mask, solved, 0
    kept = units.kept(mask, solved.x)
    for _ in range(_CHANGES):
        look = units.look(mask, solved.x)
        noise = units.noise(look.left)
        gains = units.gains(mask, look, noise, kept).masked_fill(~plausible, -torch.inf)
        most, which = gains.max(1)
        threshold = max(_TOGETHER * float(most.max()), noise)
        rows = (most >= threshold).nonzero().flatten()
        if not len(rows):
            break
        mask = mask.clone()
        mask[rows, which[rows]] ^= True
        solved = units.solve(mask)
        if not solved.determined:
            break
        waited = 0 if solved.residual < best_solved.residual else waited + 1
        if waited == 0:
            best, best_solved = mask, solved
        elif waited > _PATIENCE:
            break
    return best, best_solved


def _repaired(units: _Units, mask: Tensor, solved: Solution) -> tuple[Tensor, Solution]:
    """Begin the channels that do not fit anew, with the input on which the others agree."""
    for _ in range(_REPAIRS):
        left = units.left(mask, solved.x)
        noise = units.noise(left)
        bad = left > (_OUTLYING * noise * units.entries + units.rounding())
        if not bool(bad.any()):
            break
        bad, agreed = _without_worst(units, mask, left, min(int(bad.sum()), units.spare))
        if not agreed.determined:
            break
        mended = _begun_anew(units, mask, bad, agreed.x)
        if bool((mended == mask).all()):
            break
        again = units.solve(mended)
        if not again.determined or again.residual >= solved.residual:
            break
        mask, solved = mended, again
    return mask, solved


def _without_worst(
    units: _Units, mask: Tensor, left: Tensor, count: int
) -> tuple[Tensor, Solution]:
    """Leave out the ``count`` channels that leave most (O,), or as many as can be done without."""
    while True:
        bad = torch.zeros_like(left, dtype=torch.bool)
        bad[left.topk(count).indices] = True
        agreed = units.solve(mask, bad)
        if agreed.determined or count == 1:
            return bad, agreed
        count //= 2


def _begun_anew(units: _Units, mask: Tensor, bad: Tensor, x: Tensor) -> Tensor:
    """Settle the ``bad`` channels (O,) one by one for the input ``x``, and keep what fits better.

    Each begins from its odds, from where it is, from shares between open and closed, and where
    none of them does, with more units in doubt.
    """
    given = units.odds > 0.0
    here, odd = units.look(mask, x), units.look(given, x)
    noise, rounding = units.noise(here.left[~bad]), units.rounding()
    mended = mask.clone()
    for channel in bad.nonzero().flatten().tolist():
        fewest = float(here.left[channel])
        for sure in (_SURE, _SUREST):
            starts = [
                _Channel(units, channel, given, odd, sure),
                _Channel(units, channel, mask, here, sure),
                _Channel(units, channel, given, odd, sure).shared(noise),
            ]
            for start in starts:
                found = start.descended(noise)
                if found.left < fewest:
                    fewest, mended[channel] = found.left, found.mask
            if fewest <= _OUTLYING * noise * units.entries + float(rounding[channel]):
                break
    return mended


class _Channel:
    """The units of one channel that are in doubt, for one input: their ``mask`` (U,) as it goes.

    ``left`` are the squares of what it leaves of the channel's gradient.
    """

    def __init__(
        self, units: _Units, channel: int, start: Tensor, look: _Look, sure: float
    ) -> None:
        self.mask, self.left = start[channel].clone(), float(look.left[channel])
        self._free = (units.odds[channel].abs() < sure).nonzero().flatten()
        self._step = units.step[channel, self._free]
        self._odds = units.odds[channel, self._free]
        self._gram = look.gram[self._free][:, self._free]
        self._along = look.along[channel, self._free].clone()

    def descended(self, noise: float) -> _Channel:
        """Change one or two units at a time, as long as it gains."""
        size = self._step.square() * self._gram.diagonal()
        for _ in range(_MOST):
            side = 1.0 - 2.0 * self.mask[self._free].to(self._step)
            ways = side * self._step
            single = ways * self._along - 0.5 * size + side * noise * self._odds
            changes = best_changes(single, ways[:, None] * ways * self._gram, noise)
            if not changes:
                break
            self._change(torch.tensor(changes, device=ways.device))
        return self

    def shared(self, noise: float) -> _Channel:
        """Let every unit be open by a share, which is a convex problem, and round the answer."""
        normal = self._step[:, None] * self._step * self._gram
        if len(normal) and float(normal.trace()) > 0.0:
            begun = self.mask[self._free].to(self._step)
            pull = self._step * self._along + noise * self._odds + normal @ begun
            length = 1.0 / torch.linalg.matrix_norm(normal, 2)
            share, ahead = begun, begun
            for number in range(_SHARING):  # Beck and Teboulle 2009: accelerated, projected
                now = (ahead + length * (pull - normal @ ahead)).clamp(0.0, 1.0)
                ahead, share = now + number / (number + 3.0) * (now - share), now
            self._change(((share > 0.5) != (begun > 0.5)).nonzero().flatten())
        return self

    def _change(self, which: Tensor) -> None:
        own = self._free[which]
        ways = (1.0 - 2.0 * self.mask[own].to(self._step)) * self._step[which]
        seen = self._gram[which]
        self.left += float(ways @ seen[:, which] @ ways - 2.0 * ways @ self._along[which])
        self._along -= ways @ seen
        self.mask[own] ^= True
