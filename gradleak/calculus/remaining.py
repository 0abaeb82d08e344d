"""What is left of a network between the image and the maps that a walk recovered (§6f).

Operations below the nearest recovered maps are run on a trial image. A recovered map further up is
taken as it is and not computed, so that every *cut* is as near to the image as can be. What a trial
image misses of a cut is up to the kind of layer: below a rectifier, open units have a value to meet
and closed ones a bound to keep. The weights below the cuts have gradients of their own, known
through the δ at the cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.layer import layer_of
from gradleak.calculus.trace import Operation, Parameter
from gradleak.calculus.walk import Walk
from gradleak.errors import IncompleteError

# Weight of the gradients beside the maps, which say more about each single pixel.
_GRADIENTS = 0.3


@dataclass(frozen=True)
class Cut:
    """A recovered map: what the operation called ``name`` put out.

    ``tensor`` is the one to compare with ``target``; where ``open`` (all, if None) is False, it is
    only known not to exceed that, or zero. ``weight`` makes what is missed relative to the whole,
    entry by entry; ``noise`` is what the errors of the target alone leave of it, squared, summed;
    ``delta`` is ∂loss/∂tensor.
    """

    name: str
    tensor: int
    target: Tensor
    open: Tensor | None
    weight: Tensor
    noise: float
    delta: Tensor | None

    def missed(self, value: Tensor) -> Tensor:
        """Return what ``value`` misses of the target, or of the bound."""
        left = value - self.target
        if self.open is not None:
            left = torch.where(self.open, left, torch.relu(value - self.target.clamp(min=0.0)))
        return left * self.weight


class RemainingNetwork:
    """The operations between the image and the cuts; ``cuts`` are in the order of the network."""

    def __init__(self, walk: Walk, *, dtype: torch.dtype = torch.float64) -> None:
        """Take what a finished ``walk`` did not get past, to be computed in ``dtype``.

        Raises :class:`IncompleteError` where the image reaches the logits past all recovered maps.
        """
        self._walk, self._dtype = walk, dtype
        self._state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in walk.state.items()
        }
        self._fixed: dict[int, Tensor] = {}
        self._operations: list[Operation] = []
        self.cuts: list[Cut] = []
        live = {0}
        for operation in walk.trace.operations:
            if not live.intersection(operation.inputs):
                continue
            if operation.output == walk.trace.logits:
                raise IncompleteError(
                    "no map between the image and the logits was recovered", "use --method match"
                )
            for number in operation.inputs:
                if number not in live:
                    self._fixed[number] = self._known(number).to(dtype)
            cut = self._cut(operation)
            if cut is not None:
                self.cuts.append(cut)
            else:
                live.add(operation.output)
            if cut is None or cut.tensor == operation.output:
                self._operations.append(operation)
        self._gradients = self._own_gradients()

    def equations(self) -> int:
        """Return how many numbers a trial image has to meet, the bounds not counted."""
        return self.map_equations() + sum(g.numel() for g in self._gradients.values())

    def map_equations(self) -> int:
        """Return how many of these numbers are values of the maps."""
        return sum(
            cut.target.numel() if cut.open is None else int(cut.open.sum()) for cut in self.cuts
        )

    def noise(self) -> float:
        """Return the sum of squares that the errors of the maps alone leave."""
        return sum(cut.noise for cut in self.cuts)

    def missed_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what ``image`` (N, C, H, W) misses of each cut, relative to its norm."""
        return self._compared(self._run(image, {}))

    def missed(self, image: Tensor, softness: float = 0.0) -> tuple[Tensor, ...]:
        """Return the same, and what ``image`` misses of the gradients of the weights below.

        Kinks are rounded over ``softness`` times the spread of what meets them: a descent sees then
        that a unit may open or close, which a gradient depends on.
        """
        if not self._gradients:
            return self._compared(self._run(image, {}, softness))

        with torch.enable_grad():
            own = {n: self._state[n].detach().requires_grad_() for n in self._gradients}
            values = self._run(image, own, softness)
            pulls = [
                (cut.delta * value).sum()
                for cut, value in zip(self.cuts, values, strict=True)
                if cut.delta is not None
            ]
            whole = torch.stack(pulls).sum()
            found = torch.autograd.grad(whole, list(own.values()), create_graph=True)
        left = [
            (gradient - given) * (_GRADIENTS / given.norm())
            for gradient, given in zip(found, self._gradients.values(), strict=True)
        ]
        return (*self._compared(values), *left)

    def _run(
        self, image: Tensor, parameters: Mapping[str, Tensor], softness: float = 0.0
    ) -> list[Tensor]:
        """Return the tensors that the cuts compare."""
        state = {**self._state, **parameters}
        values = {**self._fixed, 0: image}
        for operation in self._operations:
            inputs = [values[n] for n in operation.inputs]
            value = self._softened(operation, inputs[0], softness)
            values[operation.output] = operation.run(inputs, state) if value is None else value
        return [values[cut.tensor] for cut in self.cuts]

    def _softened(self, operation: Operation, value: Tensor, softness: float) -> Tensor | None:
        layer = layer_of(operation.kind)
        if softness == 0.0 or layer is None or operation.output in {c.tensor for c in self.cuts}:
            return None
        return layer.softened(operation, value, softness * float(value.detach().std()))

    def _compared(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(cut.missed(value) for cut, value in zip(self.cuts, values, strict=True))

    def _cut(self, operation: Operation) -> Cut | None:
        """Return the cut at the output of ``operation``, if that was recovered entry by entry."""
        layer, estimate = layer_of(operation.kind), self._walk.recovered(operation.output)
        if layer is None or estimate is None or estimate.known is not None:
            return None
        tensor, opened = layer.compared(operation, self._walk)
        sure = (estimate.std.median() / estimate.std).clamp(max=1.0)
        size = (sure * estimate.value).norm().clamp(min=1e-300)
        delta = self._walk.delta(tensor)
        error = sure / size * estimate.std
        if opened is not None:
            error = error * opened
        return Cut(
            name=operation.name,
            tensor=tensor,
            target=estimate.value.to(self._dtype),
            open=opened,
            weight=(sure / size).to(self._dtype),
            noise=float(error.square().sum()),
            delta=None if delta is None else delta.to(self._dtype),
        )

    def _known(self, number: int) -> Tensor:
        """Return a tensor that no trial image changes."""
        estimate = self._walk.recovered(number)
        if estimate is not None and estimate.known is None:
            return estimate.value
        maker = self._walk.trace.producer(number)
        assert maker is not None  # the image itself is never fixed
        return maker.run([self._known(n) for n in maker.inputs], self._walk.state)

    def _own_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the weights below the cuts, none where a cut has no δ."""
        if any(cut.delta is None for cut in self.cuts):
            return {}
        below = Counter(
            value.name
            for operation in self._operations
            for value in (*operation.arguments, *operation.keywords.values())
            if isinstance(value, Parameter)
        )
        # A weight that is used above the cuts too has a gradient that is not only theirs.
        names = {name for name, uses in below.items() if uses == self._walk.trace.uses(name)}
        given = {n: g for n, g in self._walk.gradients.items() if n in names}
        return {name: g.to(self._dtype) for name, g in given.items() if bool((g != 0.0).any())}
