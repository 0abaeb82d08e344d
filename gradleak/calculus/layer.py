"""What a kind of layer has to say to the walker, and the table of the kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gradleak.calculus.trace import Operation, Trace
from gradleak.calculus.window import Window


@dataclass(frozen=True)
class Estimate:
    """A recovered tensor of the forward pass: ``value`` and the standard deviation ``std`` of it.

    Both have the tensor's shape (N, …). ``known`` says which entries are (all, if None).
    """

    value: Tensor
    std: Tensor
    known: Tensor | None = None

    def reshaped(self, shape: tuple[int, ...]) -> Estimate:
        """Return the estimate in another shape."""
        known = None if self.known is None else self.known.view(shape)
        return Estimate(self.value.reshape(shape), self.std.reshape(shape), known)


class Stopped(Exception):
    """Why nothing is passed to what lies below an operation."""


class Walking(Protocol):
    """What an operation may ask of the walk that it is part of."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name, in float64."""

    @property
    def shapes(self) -> Mapping[int, tuple[int, ...]]:
        """Shapes of the tensors of the forward pass, by number."""

    @property
    def trace(self) -> Trace:
        """The operations that the walk goes along."""

    @property
    def usual(self) -> float:
        """The relative residual that the layers solved so far have left."""

    def delta(self, tensor: int) -> Tensor | None:
        """Return ∂loss/∂tensor, None where it was not reached."""

    def gradient(self, operation: Operation) -> Tensor | None:
        """Return the gradient (O, C, T taps) of an operation's weight, None where there is none."""

    @property
    def patience(self) -> float:
        """Seconds that a search for one tensor may take."""

    def guess(self, tensor: int, value: Tensor) -> None:
        """Take down a rough ``value`` of a tensor that was not recovered."""

    def take(
        self,
        operation: Operation,
        estimate: Estimate,
        *,
        residual: float,
        condition: float,
        masks: Mapping[int, Tensor],
    ) -> None:
        """Take down the input of an ``operation`` that another recovered.

        ``masks`` are those of rectifiers in between, by their outputs.
        """

    def value(self, tensor: int) -> Estimate:
        """Return what is recovered of a tensor; raises :class:`Stopped` where nothing is."""

    def mask(self, operation: Operation) -> Tensor:
        """Return which units (N, …) of a rectifier were open, settled by what lies below."""

    def open(self, operation: Operation) -> Tensor:
        """Return the same as far as the recovered output tells, without looking below."""


class Layer:
    """One kind of operation. A new kind overrides what it can do and is registered by name.

    ``elementwise`` says that an entry of the output depends on that entry of the inputs alone.
    """

    elementwise = False

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Return ∂loss/∂input of each input tensor, given that of the output.

        Raises :class:`Stopped` where it cannot be had.
        """
        raise Stopped(f"no delta passes {operation.kind}")

    def value_below(self, operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
        """Return the input of an operation of one input from its output, None if not unique."""
        return None

    def window(self, operation: Operation, walk: Walking) -> Window | None:
        """Return what the layer's weights read of its input, None if that is not known."""
        return None

    def weight(self, operation: Operation) -> str | None:
        """Return the name of the layer's weight, None without one."""
        return None

    def softened(self, operation: Operation, value: Tensor, width: float) -> Tensor | None:
        """Return the output for an input ``value`` with a kink rounded over ``width``.

        None where the layer has no kink, or none that is rounded.
        """
        return None

    def closed_slope(self, operation: Operation) -> float | None:
        """Return the slope of a rectifier's closed units, None for what is no rectifier."""
        return None

    def compared(self, operation: Operation, walk: Walking) -> tuple[int, Tensor | None]:
        """Return which tensor to compare with a recovered output, and where.

        Where the mask is False, the tensor is only known not to exceed zero; None stands for
        values everywhere.
        """
        return operation.output, None


class Affine(Layer):
    """An operation that is affine in its inputs: δ passes by the transposed map."""

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Apply the transposed map; see the base class."""
        return transposed(operation, delta, walk)


def transposed(operation: Operation, delta: Tensor, walk: Walking) -> Mapping[int, Tensor]:
    """Apply the transpose of an affine operation to ``delta``."""
    with torch.enable_grad():
        inputs = [
            torch.zeros(
                walk.shapes[number], dtype=delta.dtype, device=delta.device
            ).requires_grad_()
            for number in operation.inputs
        ]
        found = pulled_back(operation.run(inputs, walk.state), inputs, delta)
    return dict(zip(operation.inputs, found, strict=True))


def unscaled(operation: Operation, value: Estimate, walk: Walking) -> Estimate | None:
    """Return the input of an operation that scales and shifts each entry of its only input."""
    zero = torch.zeros(
        walk.shapes[operation.inputs[0]], dtype=value.value.dtype, device=value.value.device
    )
    shift = operation.run([zero], walk.state)
    scale = operation.run([zero + 1.0], walk.state) - shift
    if scale.shape != zero.shape or bool((scale == 0.0).any()):
        return None
    return Estimate((value.value - shift) / scale, value.std / scale.abs(), value.known)


def pulled_back(output: Tensor, inputs: Sequence[Tensor], delta: Tensor) -> tuple[Tensor, ...]:
    """Return Σ delta · ∂output/∂input for each of ``inputs``; the graph of ``output`` stays.

    It is the gradient of a number, since for that of a tensor torch imports its symbolic shapes,
    which takes longer than some networks.
    """
    with torch.enable_grad():
        number = (output * delta).sum()
    return torch.autograd.grad(number, inputs, retain_graph=True)


Kind = TypeVar("Kind", bound=Layer)
_LAYERS: dict[str, Layer] = {}


def register(*kinds: str) -> Callable[[type[Kind]], type[Kind]]:
    """Enter a class of layer in the table, for operations of these ``kinds``."""

    def enter(layer: type[Kind]) -> type[Kind]:
        _LAYERS.update(dict.fromkeys(kinds, layer()))
        return layer

    return enter


def layer_of(kind: str) -> Layer | None:
    """Return the layer of a kind of operation, None if there is none."""
    import gradleak.calculus.layers  # noqa: F401  enters the built-in kinds

    return _LAYERS.get(kind)
