"""Counting: the equations for the input of every layer beside its unknowns, and how a walk ended.

A tap of a convolution reads some places of its input and never the others: with stride 2, those of
one parity. Places that share no tap share no equation, so the equations fall into groups, and each
group has to have enough of its own (ALGORITHMS §6a).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradleak.calculus.layer import layer_of
from gradleak.calculus.solve import LayerEquations, solve_input
from gradleak.calculus.trace import Operation
from gradleak.calculus.walk import Walk
from gradleak.calculus.window import Window

Verdict = Literal["exact", "exact with its output", "out of reach"]


@dataclass(frozen=True)
class TapGroup:
    """Places of an input that common taps read: ``equations`` for ``unknowns``, of one channel.

    ``taps`` (of all layers) read the group's ``places``. Places that no tap reads make one group,
    without equations.
    """

    taps: int
    places: int
    equations: int
    unknowns: int

    @property
    def slack(self) -> float:
        """Equations an unknown."""
        return self.equations / self.unknowns


@dataclass(frozen=True)
class LayerCount:
    """The layer ``name``: what the gradient says of its input, and whether that is recovered.

    ``equations`` and ``unknowns`` are those of one channel, of all layers that ``readers`` names
    since they read the same input; ``tightest`` is its group of fewest equations an unknown, out of
    ``groups`` (None and 0 for a layer whose taps are not known). ``condition`` and ``residual`` are
    those of the walk, None where it did not solve for the input; ``reason`` says why not.
    """

    name: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    equations: int
    unknowns: int
    groups: int
    tightest: TapGroup | None
    condition: float | None
    residual: float | None
    verdict: Verdict
    reason: str


def count_layers(walk: Walk) -> tuple[LayerCount, ...]:
    """Return one row a layer with a weight, from the head downwards, of a finished ``walk``."""
    weighted = [op for op in reversed(walk.trace.operations) if _weight(op) is not None]
    return tuple(_count(walk, operation) for operation in weighted)


def _count(walk: Walk, operation: Operation) -> LayerCount:
    tensor = operation.inputs[0]
    shape = walk.shapes[tensor]
    readers = [op for op in walk.trace.users(tensor) if walk.gradient(op) is not None]
    windows = [(_window(walk, op), walk.gradient(op)) for op in readers]
    known = [(w, len(g)) for w, g in windows if w is not None and g is not None]
    groups = tap_groups(known, shape[0]) if known else []
    found = _answer(walk, operation, readers)
    verdict: Verdict = "out of reach"
    if found is not None:
        verdict = "exact with its output" if found.with_output else "exact"
    return LayerCount(
        name=operation.name,
        readers=tuple(op.name for op in readers),
        shape=shape,
        equations=sum(group.equations for group in groups),
        unknowns=math.prod(shape) // shape[1],
        groups=len(groups),
        tightest=groups[0] if groups else None,
        condition=None if found is None else found.condition,
        residual=None if found is None else found.residual,
        verdict=verdict,
        reason="" if found is not None else _why_not(walk, operation, groups),
    )


@dataclass(frozen=True)
class _Found:
    """How an input was recovered, without numbers where its reader handed it down."""

    with_output: bool
    condition: float | None = None
    residual: float | None = None


def _answer(walk: Walk, operation: Operation, readers: Sequence[Operation]) -> _Found | None:
    """Return how the input of an operation was recovered, None if it was not."""
    if operation.output == walk.trace.logits:
        return _head(walk, operation)
    if walk.recovered(operation.inputs[0]) is None:
        return None
    names = {op.name for op in readers}
    for found in walk.maps:
        if names.intersection(found.names):
            return _Found(found.with_output, found.condition, found.residual)
    return _Found(with_output=True)


def _head(walk: Walk, operation: Operation) -> _Found | None:
    """Solve for the head's input, which the walk is given: N samples need more than N classes."""
    window, delta = _window(walk, operation), walk.delta(operation.output)
    gradient = walk.gradient(operation)
    if window is None or delta is None or gradient is None:
        return None
    solution = solve_input([LayerEquations(window, delta[..., None], gradient)], walk.precision)
    # Rounded numbers that sum to zero over the classes are independent by their rounding alone.
    if not solution.determined or solution.residual > walk.usual or delta.shape[1] <= len(delta):
        return None
    return _Found(False, solution.condition, solution.residual)


def _why_not(walk: Walk, operation: Operation, groups: Sequence[TapGroup]) -> str:
    """Say why the input of an operation was not recovered, in the walk's own words if it has any.

    Nothing arrives where the walk ended above; else it gave up at what the input was needed for.
    """
    if walk.gradient(operation) is None:
        return "its gradient is not there"
    if operation.output == walk.trace.logits:
        return f"{walk.shapes[operation.output][1]} classes for {walk.shapes[0][0]} samples"
    barriers = {barrier.name: barrier for barrier in walk.barriers}
    if walk.delta(operation.output) is None:
        above = _nearest(walk, [operation.output], barriers, _above)
        return f"the walk ended at {above or 'what reads it'}"
    tensor = operation.inputs[0]
    below = _nearest(walk, [tensor], barriers, _below)
    if tensor == 0 and "image" in barriers:
        below = "image"
    if below is not None:
        return str(barriers[below]) if below != "image" else barriers[below].why
    if groups and groups[0].slack < 1.0:
        tight = groups[0]
        return f"{tight.equations} equations for {tight.unknowns} unknowns in one group of places"
    return "nothing below asks for it"


Step = Callable[[Walk, int], list[tuple[Operation, list[int]]]]


def _nearest(walk: Walk, tensors: Sequence[int], names: Container[str], step: Step) -> str | None:
    """Return the first of ``names`` among the operations that ``step`` meets from ``tensors``."""
    waiting, seen = list(tensors), set(tensors)
    while waiting:
        for operation, further in step(walk, waiting.pop(0)):
            if operation.name in names:
                return operation.name
            waiting += [number for number in further if number not in seen]
            seen.update(further)
    return None


def _above(walk: Walk, tensor: int) -> list[tuple[Operation, list[int]]]:
    return [(op, [op.output]) for op in walk.trace.users(tensor)]


def _below(walk: Walk, tensor: int) -> list[tuple[Operation, list[int]]]:
    """Return what made a tensor, no further than the next layer with a weight."""
    maker = walk.trace.producer(tensor)
    if maker is None or _weight(maker) is not None:
        return []
    return [(maker, list(maker.inputs))]


def _weight(operation: Operation) -> str | None:
    layer = layer_of(operation.kind)
    return None if layer is None else layer.weight(operation)


def _window(walk: Walk, operation: Operation) -> Window | None:
    layer = layer_of(operation.kind)
    return None if layer is None else layer.window(operation, walk)


def tap_groups(readers: Sequence[tuple[Window, int]], samples: int) -> list[TapGroup]:
    """Return the groups of an input that ``readers`` read, the tightest first.

    A reader is a layer's window and its number of output channels O; each of its taps gives O
    equations for the ``samples`` unknowns of every place it reads. What a tap reads of the padding
    alone counts for nothing.
    """
    places = readers[0][0].places
    indices = [window.index for window, _ in readers]
    labels = _connected(indices, places)
    taken = [_lowest(labels, index) for index in indices]
    seen = torch.zeros(places + 1, dtype=torch.bool)
    for index in indices:
        seen[index.flatten()] = True
    groups = []
    for label in torch.unique(labels[seen[:-1]]).tolist():
        size = int((labels == label).sum())
        taps = [int((found == label).sum()) for found in taken]
        equations = sum(n * outputs for n, (_, outputs) in zip(taps, readers, strict=True))
        groups.append(TapGroup(sum(taps), size, equations, samples * size))
    unseen = int((~seen[:-1]).sum())
    if unseen:
        groups.append(TapGroup(0, unseen, 0, samples * unseen))
    return sorted(groups, key=lambda group: group.slack)


def _connected(indices: Sequence[Tensor], places: int) -> Tensor:
    """Return a label (places,) that places have in common where a chain of taps joins them."""
    labels = torch.arange(places)
    while True:
        before = labels
        for index in indices:
            spread = _lowest(labels, index)[:, None].expand_as(index).flatten()
            padded = torch.cat([labels, labels.new_full((1,), places)])
            labels = padded.scatter_reduce(0, index.flatten(), spread, "amin")[:-1]
        if bool((labels == before).all()):
            return labels


def _lowest(labels: Tensor, index: Tensor) -> Tensor:
    """Return the lowest label (T,) that each tap reads, the number of places for padding alone."""
    padded = torch.cat([labels, labels.new_full((1,), len(labels))])
    return padded[index].amin(1)
