"""The walk from the logits towards the image (ALGORITHMS §6).

Operations are visited in the reverse of the order in which they ran, so δ of a tensor is complete
before what made it is visited. A tensor's value is recovered when an operation asks for it, from
the gradients of all layers that read it. Where an operation cannot pass δ on, all that lies below
it on that path is out of reach, and the walk says which it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.calculus.gates import Gate, GatedLayer, read_gate, settle
from gradleak.calculus.joint import solve_jointly, too_many
from gradleak.calculus.layer import Estimate, Layer, Stopped, layer_of
from gradleak.calculus.pooled import pooled_gate
from gradleak.calculus.solve import LayerEquations, Solution, solve_input
from gradleak.calculus.trace import Operation, Trace, trace
from gradleak.calculus.weighted import ForwardEquations, Taps
from gradleak.errors import IncompleteError
from gradleak.progress import Progress, Step

# Residual beyond which a map is not taken for recovered at all.
_LOST = 0.05
# A residual of so many roundings of the gradient tells of no mistake, nor does one of so many times
# the largest so far.
_ROUNDINGS, _JUMP = 80.0, 2.0
# Roundings of the gradient that every residual may have.
_USUAL = 4.0


class Widened(Mapping[str, Tensor]):
    """Tensors by name, in float64 while somebody looks at them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Wrap ``tensors`` of any dtype."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.double() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class PeeledMap:
    """The input (N, …) of the layers ``names``, with what its equations say of it.

    ``equations`` and ``unknowns`` are those of one channel; ``changed`` counts the units of the
    rectifier above that were settled against their first reading. ``with_output`` says that what is
    known of the layers' outputs was needed besides.
    """

    names: tuple[str, ...]
    estimate: Estimate
    equations: int
    unknowns: int
    condition: float
    residual: float
    changed: int
    with_output: bool = False


@dataclass(frozen=True)
class Barrier:
    """An operation that the walk did not get past, and ``why``."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


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
        self._noise = unit  # the relative error of the gradients, as the residuals show it
        self._deltas = {steps.logits: delta.double()}
        self._values: dict[int, Estimate] = {}
        self._masks: dict[int, Tensor] = {}
        self.maps: list[PeeledMap] = []
        self.barriers: list[Barrier] = []
        head = steps.producer(steps.logits)
        if head is not None:
            wide = feature.double()
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
        return max(_USUAL * self._unit, self._noise)

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
        if operation.output not in self._masks:
            below = self._gated(operation)
            gate = self._read(operation, None if below is None else below[1][1])
            mask = gate.mask
            if below is not None:
                tensor, (maker, layer), readers = below
                others = self._equations([r for r in readers if r is not maker])
                allowed = max(_ROUNDINGS * self._unit, _JUMP * self._noise)
                settled = settle(gate, layer, others, allowed)
                mask = settled.mask
                if settled.solution.determined:
                    equations = [layer.equations(mask), *others]
                    self._keep(tensor, readers, equations, settled.solution, settled.changed)
            self._masks[operation.output] = mask.view(self.shapes[operation.output])
        return self._masks[operation.output]

    def open(self, operation: Operation) -> Tensor:
        """Return which units (N, …) of a rectifier were open, as far as its output tells."""
        settled = self._masks.get(operation.output)
        if settled is not None:
            return settled
        value = self.value(operation.output)
        gate = read_gate(_planes(value.value), _planes(value.std))
        return gate.mask.view(self.shapes[operation.output])

    def _read(self, operation: Operation, below: GatedLayer | None) -> Gate:
        """Read the gate of a rectifier off its output or, under pooling, off the layer below."""
        try:
            value = self.value(operation.output)
        except Stopped:
            gate = None if below is None else pooled_gate(below)
            if gate is None:
                raise
            return gate
        return read_gate(_planes(value.value), _planes(value.std))

    def _layer(self, operation: Operation) -> Layer:
        layer = layer_of(operation.kind)
        if layer is None:
            raise Stopped(f"no layer of the kind {operation.kind} is known")
        return layer

    def _handed_down(self, tensor: int) -> Estimate | None:
        """Return the value that a reader of ``tensor`` hands down from its own output."""
        for reader in self.trace.users(tensor):
            layer = layer_of(reader.kind)
            if layer is None or len(reader.inputs) != 1 or self._weight(reader) is not None:
                continue
            try:
                found = layer.value_below(reader, self.value(reader.output), self)
            except Stopped:
                continue
            if found is not None:
                return found
        return None

    def _weight(self, operation: Operation) -> str | None:
        """Return the name of an operation's weight, None without one."""
        layer = layer_of(operation.kind)
        return None if layer is None else layer.weight(operation)

    def _equations(self, readers: Sequence[Operation]) -> list[LayerEquations]:
        """Return the equations of those ``readers`` whose δ and gradient are there."""
        found = []
        for reader in readers:
            layer, delta = layer_of(reader.kind), self._deltas.get(reader.output)
            gradient = self.gradient(reader)
            window = None if layer is None else layer.window(reader, self)
            if delta is not None and gradient is not None and window is not None:
                found.append(LayerEquations(window, _planes(delta), gradient))
        return found

    def gradient(self, operation: Operation) -> Tensor | None:
        """Return the gradient (O, C, T) of an operation's weight, None where there is none."""
        name = self._weight(operation)
        if name is None or name not in self.gradients:
            return None
        gradient = self.gradients[name]
        return gradient.reshape(*gradient.shape[:2], -1)

    def _solved(self, tensor: int) -> Estimate:
        """Recover a tensor from what the layers that read it know: their gradients and outputs."""
        readers = self.trace.users(tensor)
        equations = self._equations(readers)
        forward = self._forward(readers)
        if not equations and not forward:
            raise Stopped("no gradient says what its output was")
        shape = self.shapes[tensor]
        rows = sum(e.delta.shape[1] * e.window.taps for e in equations)
        unknowns = math.prod(shape) // shape[1]
        solution = solve_input(equations) if equations else None
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

    def _forward(self, readers: Sequence[Operation]) -> list[ForwardEquations]:
        """Return what is known of the outputs of those ``readers`` that have weights."""
        found = []
        for reader in readers:
            if self._weight(reader) is None:
                continue
            try:
                output = self.value(reader.output)
            except Stopped:
                continue
            known = output.known
            if known is None:
                known = torch.ones_like(output.value, dtype=torch.bool)

            def apply(x: Tensor, reader: Operation = reader) -> Tensor:
                return reader.run([x], self.state)

            taps = self._taps(reader)
            found.append(ForwardEquations(apply, output.value, output.std, known, taps))
        return found

    def _taps(self, reader: Operation) -> Taps | None:
        """Return the windows and the weight of a reader, None where they are not known."""
        layer, name = layer_of(reader.kind), self._weight(reader)
        window = None if layer is None else layer.window(reader, self)
        if name is None or window is None:
            return None
        weight = self.state[name]
        return Taps(window, weight.reshape(*weight.shape[:2], -1))

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
        estimate = Estimate(solution.x.reshape(shape), solution.std.reshape(shape))
        self._values[tensor] = estimate
        self._noise = max(self._noise, solution.residual)
        self._note(
            PeeledMap(
                names=tuple(r.name for r in readers if self.gradient(r) is not None),
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

    def _gated(
        self, operation: Operation
    ) -> tuple[int, tuple[Operation, GatedLayer], list[Operation]] | None:
        """Find the layer below a rectifier whose gradient settles its mask, the best counted one.

        Returns the tensor that it reads, the layer and its equations, and all readers of it.
        """
        found = []
        waiting = [(operation.inputs[0], self._deltas[operation.output])]
        while waiting:
            tensor, delta = waiting.pop()
            maker = self.trace.producer(tensor)
            # What others read besides has a δ of its own, which is not gated.
            if maker is None or len(self.trace.users(tensor)) > 1:
                continue
            layer = layer_of(maker.kind)
            gradient = self.gradient(maker)
            if layer is not None and gradient is not None:
                window = layer.window(maker, self)
                if window is not None:
                    found.append((maker, GatedLayer(window, _planes(delta), gradient)))
            elif layer is not None and layer.elementwise and not isinstance(layer, type(self)):
                try:
                    waiting += layer.delta_below(maker, delta, self).items()
                except Stopped:
                    continue
        if not found:
            return None
        best = max(found, key=lambda item: item[1].coefficient.shape[1] * item[1].window.taps)
        tensor = best[0].inputs[0]
        return tensor, best, self.trace.users(tensor)


def _planes(tensor: Tensor) -> Tensor:
    """Return a tensor (N, C, …) as (N, C, places)."""
    return tensor.reshape(*tensor.shape[:2], -1)
