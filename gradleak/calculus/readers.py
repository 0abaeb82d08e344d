"""What the layers that read a tensor say of it: their gradients, and their outputs where known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.calculus.gates import GatedLayer
from gradleak.calculus.layer import Stopped, Walking, layer_of
from gradleak.calculus.solve import LayerEquations
from gradleak.calculus.trace import Operation
from gradleak.calculus.weighted import ForwardEquations, Taps


def planes(tensor: Tensor) -> Tensor:
    """Return a tensor (N, C, …) as (N, C, places)."""
    return tensor.reshape(*tensor.shape[:2], -1)


def weight_of(operation: Operation) -> str | None:
    """Return the name of an operation's weight, None without one."""
    layer = layer_of(operation.kind)
    return None if layer is None else layer.weight(operation)


def closed_slope(operation: Operation) -> float:
    """Return the slope of a rectifier's closed units; raises :class:`Stopped` for others."""
    layer = layer_of(operation.kind)
    slope = None if layer is None else layer.closed_slope(operation)
    if slope is None:
        raise Stopped(f"{operation.kind} has no mask")
    return slope


def gradient_equations(readers: Sequence[Operation], walk: Walking) -> list[LayerEquations]:
    """Return the equations of those ``readers`` whose δ and gradient are there."""
    found = []
    for reader in readers:
        layer, delta = layer_of(reader.kind), walk.delta(reader.output)
        gradient = walk.gradient(reader)
        window = None if layer is None else layer.window(reader, walk)
        if delta is not None and gradient is not None and window is not None:
            found.append(LayerEquations(window, planes(delta), gradient))
    return found


def forward_equations(readers: Sequence[Operation], walk: Walking) -> list[ForwardEquations]:
    """Return what is known of the outputs of those ``readers`` that have weights."""
    found = []
    for reader in readers:
        if weight_of(reader) is None:
            continue
        try:
            output = walk.value(reader.output)
        except Stopped:
            continue
        known = output.known
        if known is None:
            known = torch.ones_like(output.value, dtype=torch.bool)
        if not bool(known.any()):
            continue

        def apply(x: Tensor, reader: Operation = reader) -> Tensor:
            return reader.run([x], walk.state)

        taps = _taps(reader, walk)
        found.append(ForwardEquations(apply, output.value, output.std, known, taps))
    return found


def _taps(reader: Operation, walk: Walking) -> Taps | None:
    """Return the windows and the weight of a reader, None where they are not known."""
    layer, name = layer_of(reader.kind), weight_of(reader)
    window = None if layer is None else layer.window(reader, walk)
    if name is None or window is None:
        return None
    weight = walk.state[name]
    return Taps(window, weight.reshape(*weight.shape[:2], -1))


def gated_layer(
    operation: Operation, walk: Walking
) -> tuple[int, tuple[Operation, GatedLayer], list[Operation]] | None:
    """Find the layer below a rectifier whose gradient settles its mask, the best counted one.

    Returns the tensor that it reads, the layer and its equations, and all readers of it; None
    where there is no such layer.
    """
    above = walk.delta(operation.output)
    closed = closed_slope(operation)
    found = []
    waiting = [] if above is None else [(operation.inputs[0], above)]
    while waiting:
        tensor, delta = waiting.pop()
        maker = walk.trace.producer(tensor)
        # What others read besides has a δ of its own, which is not gated.
        if maker is None or len(walk.trace.users(tensor)) > 1:
            continue
        layer, gradient = layer_of(maker.kind), walk.gradient(maker)
        if layer is not None and gradient is not None:
            window = layer.window(maker, walk)
            if window is not None:
                found.append((maker, GatedLayer(window, planes(delta), gradient, closed)))
        elif layer is not None and layer.elementwise and maker.kind != operation.kind:
            try:
                waiting += layer.delta_below(maker, delta, walk).items()
            except Stopped:
                continue
    if not found:
        return None
    best = max(found, key=lambda item: item[1].coefficient.shape[1] * item[1].window.taps)
    tensor = best[0].inputs[0]
    return tensor, best, walk.trace.users(tensor)
