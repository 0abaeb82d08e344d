"""The walk from the logits towards the image (ALGORITHMS §6).

Operations are visited in the reverse of the order in which they ran, so δ of a tensor is complete
before what made it is visited. A tensor's value is recovered when an operation asks for it, from
the gradients of all layers that read it. Where an operation cannot pass δ on, all that lies below
it on that path is out of reach, and the walk says which it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradleak.calculus.gates import Gate, GatedLayer, read_gate, read_sign
from gradleak.calculus.joint import solve_jointly, too_many
from gradleak.calculus.layer import Estimate, Layer, Stopped, layer_of
from gradleak.calculus.logits import rounded_delta
from gradleak.calculus.pooled import pooled_gate
from gradleak.calculus.readers import (
    closed_slope,
    forward_equations,
    gated_layer,
    gradient_equations,
    planes,
    weight_of,
)
from gradleak.calculus.record import Barrier, PeeledMap
from gradleak.calculus.settle import settle
from gradleak.calculus.solve import LayerEquations, Solution, solve_input
from gradleak.calculus.trace import Operation, Trace, trace
from gradleak.calculus.widened import Widened
from gradleak.errors import IncompleteError
from gradleak.linalg import outer_residual
from gradleak.progress import Progress, Step

# Residual beyond which a map is not taken for recovered at all.
_LOST = 0.05
# A residual of so many roundings of the gradient tells of no mistake, nor does one of so many times
# the largest so far.
_ROUNDINGS, _JUMP = 80.0, 2.0
# Halves are rounded once, when sent; the arithmetic before is single precision.
_SINGLE = torch.finfo(torch.float32).eps
# Roundings of the gradient that every residual may have.
_USUAL = 4.0
# A unit with odds beyond this (nats) is clear of the errors of its map.
_CLEAR = 10.0
# After so many maps, a gated layer has a wrong mask if it leaves that many times what is allowed.
_SURE, _TORN = 3, 4.0


def walk_down(
    model: nn.Module,
    example: Tensor,
    gradients: Mapping[str, Tensor],
    labels: Tensor,
    feature: Tensor,
    *,
    thorough: bool = True,
    patience: float = math.inf,
    progress: Progress | None = None,
) -> Walk:
    """Walk from the logits towards the images behind a gradient of the mean cross-entropy.

    ``example`` (N, C, H, W) has the shape of the network's input; ``labels`` (N, classes) and the
    head's input ``feature`` (N, D) are what the earlier stages recovered. Unless it is ``thorough``
    the walk stops at maps whose equations take tens of seconds to solve, and after ``patience``
    seconds a search for one map is given up. ``progress`` is called with every recovered map.
    """
    steps = trace(model, example)
    state = model.state_dict()
    return walk_from(
        steps,
        state,
        gradients,
        labels,
        feature,
        thorough=thorough,
        patience=patience,
        progress=progress,
    )


def walk_from(
    steps: Trace,
    state: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    labels: Tensor,
    feature: Tensor,
    *,
    thorough: bool = True,
    patience: float = math.inf,
    progress: Progress | None = None,
) -> Walk:
    """Walk as :func:`walk_down` does, given the trace and the ``state`` instead of a network."""
    head = steps.producer(steps.logits)
    if head is None or head.kind != "linear":
        raise IncompleteError("the network does not end in a Linear layer", "give a classifier")
    logits = head.run([feature.double()], Widened(state))
    delta = (torch.softmax(logits, 1) - labels.double()) / len(labels)
    name = weight_of(head)
    if name is not None and name in gradients:
        delta = rounded_delta(delta, feature.double(), gradients[name])
    walk = Walk(
        steps,
        state,
        gradients,
        delta,
        feature,
        thorough=thorough,
        patience=patience,
        progress=progress,
    )
    walk.run()
    return walk


class Walk:
    """One walk through a :class:`Trace`; ``maps`` and ``barriers`` say how far it got."""

    def __init__(
        self,
        steps: Trace,
        state: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        delta: Tensor,
        feature: Tensor,
        *,
        thorough: bool = True,
        patience: float = math.inf,
        progress: Progress | None = None,
    ) -> None:
        """Begin at the logits of ``steps``.

        ``state`` are parameters and buffers and ``gradients`` those of the loss, by name and of
        any dtype; ``delta`` (N, C) is ∂loss/∂logits, ``feature`` (N, D) the head's input.
        """
        self.trace = steps
        self.shapes = steps.shapes
        self.state = Widened(state)
        self.gradients = Widened(gradients)
        unit = max(torch.finfo(tensor.dtype).eps for tensor in gradients.values())
        self._thorough, self.patience = thorough, patience
        self._progress = progress
        self._guesses: dict[int, Tensor] = {}
        self._unit = unit
        self._noise = min(
            unit, _SINGLE
        )  # the relative error of the gradients, as the residuals show it
        self._deltas = {steps.logits: delta.double()}
        self._values: dict[int, Estimate] = {}
        self._masks: dict[int, Tensor] = {}
        self._settling: set[int] = set()
        self.maps: list[PeeledMap] = []
        self.barriers: list[Barrier] = []
        head = steps.producer(steps.logits)
        if head is not None:
            wide = feature.double()
            name = weight_of(head)
            if name is not None and name in gradients:
                left = outer_residual(gradients[name], self._deltas[steps.logits].mT, wide)
                self._noise = max(self._noise, min(left, _LOST))
            std = torch.full_like(wide, float(unit * wide.abs().amax()))
            self._values[head.inputs[0]] = Estimate(wide, std)

    def run(self) -> None:
        """Visit every operation."""
        received: dict[int, int] = {}
        for operation in reversed(self.trace.operations):
            output = operation.output
            complete = received.get(output, 0) == len(self.trace.users(output))
            if output not in self._deltas or not complete:
                self._deltas.pop(output, None)
                continue
            try:
                below = self._layer(operation).delta_below(operation, self._deltas[output], self)
            except Stopped as why:
                self.barriers.append(Barrier(operation.name, str(why)))
                continue
            for number, delta in below.items():
                self._deltas[number] = self._deltas.get(number, 0.0) + delta
                received[number] = received.get(number, 0) + 1
        for operation in reversed(self.trace.operations):
            # Nobody below may have asked for what a layer read.
            if weight_of(operation) is not None and operation.output in self._deltas:
                with contextlib.suppress(Stopped):
                    self.value(operation.inputs[0])
        try:
            self.value(0)
        except Stopped as why:
            self.barriers.append(Barrier("image", str(why)))

    @property
    def image(self) -> Tensor | None:
        """The network's input (N, C, H, W), None where it was not reached."""
        return self._values[0].value if 0 in self._values else None

    @property
    def usual(self) -> float:
        """The relative residual that the gradient's own noise leaves."""
        return max(_USUAL * min(self._unit, _SINGLE), self._noise)

    @property
    def precision(self) -> float:
        """The relative rounding of the gradients."""
        return self._unit

    @property
    def guessed(self) -> Tensor | None:
        """A rough input (N, C, H, W), None where there is none."""
        return self._guesses.get(0)

    def guess(self, tensor: int, value: Tensor) -> None:
        """Take down a rough ``value`` of a tensor that was not recovered."""
        self._guesses[tensor] = value.reshape(self.shapes[tensor])

    def delta(self, tensor: int) -> Tensor | None:
        """Return ∂loss/∂tensor, None where it was not reached."""
        return self._deltas.get(tensor)

    def recovered(self, tensor: int) -> Estimate | None:
        """Return what has been recovered of a tensor so far."""
        return self._values.get(tensor)

    def value(self, tensor: int) -> Estimate:
        """Return what is recovered of a tensor; raises :class:`Stopped` where nothing is."""
        if tensor not in self._values:
            found = self._handed_down(tensor)
            self._values[tensor] = self._solved(tensor) if found is None else found
        return self._values[tensor]

    def mask(self, operation: Operation) -> Tensor:
        """Return which units (N, …) of a rectifier were open."""
        number = operation.output
        if number not in self._masks:
            if number in self._settling:
                raise Stopped("its mask is needed to settle its mask")
            self._settling.add(number)
            try:
                self._masks[number] = self._settled(operation).view(self.shapes[number])
            finally:
                self._settling.discard(number)
        return self._masks[number]

    def _settled(self, operation: Operation) -> Tensor:
        """Settle the mask of a rectifier by the layer below it, and keep what that layer reads."""
        below = gated_layer(operation, self)
        gate = self._read(operation, None if below is None else below[1][1])
        if below is None:
            return gate.mask
        tensor, (maker, layer), readers = below
        others = gradient_equations([r for r in readers if r is not maker], self)
        allowed = max(_ROUNDINGS * min(self._unit, _SINGLE), _JUMP * self._noise)
        settled = settle(gate, layer, others, self._unit)
        if settled.solution.determined:
            if settled.solution.residual > _TORN * allowed and len(self.maps) >= _SURE:
                raise Stopped(
                    f"its mask is not settled: the best leaves {settled.solution.residual:.1e} "
                    f"of the gradient, layers above {self._noise:.1e}"
                )
            equations = [layer.equations(settled.mask), *others]
            self._keep(tensor, readers, equations, settled.solution, settled.changed)
        return settled.mask

    def open(self, operation: Operation) -> Tensor:
        """Return which units (N, …) of a rectifier were open, as far as its output tells.

        Units near zero are not among them, whatever the layer below showed: their values are hardly
        more than errors, and all wrong where it was mistaken.
        """
        gate = _gate(operation, self.value(operation.output))
        return (gate.odds > _CLEAR).view(self.shapes[operation.output])

    def _read(self, operation: Operation, below: GatedLayer | None) -> Gate:
        """Read the gate of a rectifier off its output or, under pooling, off the layer below."""
        try:
            value = self.value(operation.output)
        except Stopped:
            gate = None if below is None else pooled_gate(below)
            if gate is None:
                raise
            return gate
        return _gate(operation, value)

    def _layer(self, operation: Operation) -> Layer:
        layer = layer_of(operation.kind)
        if layer is None:
            raise Stopped(f"no layer of the kind {operation.kind} is known")
        return layer

    def _handed_down(self, tensor: int) -> Estimate | None:
        """Return the value that a reader of ``tensor`` hands down from its own output."""
        for reader in self.trace.users(tensor):
            layer = layer_of(reader.kind)
            if layer is None or len(reader.inputs) != 1 or weight_of(reader) is not None:
                continue
            try:
                found = layer.value_below(reader, self.value(reader.output), self)
            except Stopped:
                continue
            if found is not None:
                return found
        return None

    def gradient(self, operation: Operation) -> Tensor | None:
        """Return the gradient (O, C, T) of an operation's weight, None where there is none.

        That of a Linear layer may be large, and is in its own precision.
        """
        name = weight_of(operation)
        if name is None or name not in self.gradients or self.trace.uses(name) > 1:
            return None
        gradient = self.gradients.unwidened(name)
        gradient = gradient if gradient.dim() == 2 else gradient.double()
        return gradient.reshape(*gradient.shape[:2], -1)

    def _solved(self, tensor: int) -> Estimate:
        """Recover a tensor from what the layers that read it know: their gradients and outputs."""
        readers = self.trace.users(tensor)
        equations = gradient_equations(readers, self)
        forward = forward_equations(readers, self)
        if not equations and not forward:
            shared = [r.name for r in readers if self.trace.uses(weight_of(r)) > 1]
            raise Stopped(
                f"the weights of {shared[0]} are used more than once"
                if shared
                else "no gradient says what its output was"
            )
        shape = self.shapes[tensor]
        rows = sum(e.delta.shape[1] * e.window.taps for e in equations)
        unknowns = math.prod(shape) // shape[1]
        solution = solve_input(equations, self._unit) if equations else None
        if solution is not None and solution.determined:
            return self._keep(tensor, readers, equations, solution, 0)
        count = rows * shape[1] + sum(part.count() for part in forward)
        if forward and count >= math.prod(shape):
            if too_many(forward, shape, thorough=self._thorough):
                raise Stopped(
                    f"{rows} equations for {unknowns} unknowns a channel, and with those of its "
                    f"output {math.prod(shape)} unknowns, too many to be solved for together"
                )
            solution = solve_jointly(equations, forward, shape, self._noise)
            if solution.determined:
                return self._keep(tensor, readers, equations, solution, 0, with_output=True)
        beside = sum(part.count() for part in forward)
        raise Stopped(
            f"{rows} equations for {unknowns} unknowns a channel"
            + (f" and {beside} from its output" if beside else "")
            + ("" if count < math.prod(shape) else ", not independent")
        )

    def _keep(
        self,
        tensor: int,
        readers: Sequence[Operation],
        equations: Sequence[LayerEquations],
        solution: Solution,
        changed: int,
        *,
        with_output: bool = False,
    ) -> Estimate:
        """Take down a solved tensor; raises :class:`Stopped` where it does not fit at all."""
        if solution.residual > _LOST:
            raise Stopped(f"its equations leave {solution.residual:.0%} of the gradient")
        shape = self.shapes[tensor]
        read = solution.std.isfinite().reshape(shape)
        known = None if bool(read.all()) else read
        estimate = Estimate(solution.x.reshape(shape), solution.std.reshape(shape), known)
        weighted = [r for r in readers if weight_of(r) is not None]
        seen = [r for r in weighted if self.gradient(r) is not None]
        self._values[tensor] = estimate
        self._noise = max(self._noise, solution.residual)
        self._note(
            PeeledMap(
                names=tuple(r.name for r in seen or weighted),
                estimate=estimate,
                equations=sum(e.delta.shape[1] * e.window.taps for e in equations),
                unknowns=solution.x.shape[0] * solution.x.shape[2],
                condition=solution.condition,
                residual=solution.residual,
                changed=changed,
                with_output=with_output,
            )
        )
        return estimate

    def take(
        self,
        operation: Operation,
        estimate: Estimate,
        *,
        residual: float,
        condition: float,
        masks: Mapping[int, Tensor],
    ) -> None:
        """Take down the input of an ``operation`` that another recovered, and ``masks`` between."""
        tensor, gradient = operation.inputs[0], self.gradient(operation)
        self._values[tensor] = estimate
        self._masks.update(masks)
        shape = self.shapes[tensor]
        rows = 0 if gradient is None else gradient[:, 0].numel()
        unknowns = math.prod(shape) // shape[1]
        names = (operation.name,)
        self._note(PeeledMap(names, estimate, rows, unknowns, condition, residual, 0, True))

    def _note(self, found: PeeledMap) -> None:
        """Take down a recovered map."""
        self.maps.append(found)
        if self._progress is not None:
            phase = f"walk: {found.names[0] if found.names else 'image'}"
            self._progress(Step(phase, len(self.maps), None, found.residual))


def _gate(operation: Operation, output: Estimate) -> Gate:
    """Read the gate of a rectifier off its recovered output."""
    read = read_sign if closed_slope(operation) > 0.0 else read_gate
    return read(planes(output.value), planes(output.std))
