"""A chain of Linear layers as a trace, from a bundle's metadata instead of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.trace import Operation, Parameter, Place, Trace
from gradleak.models.spec import LinearLayer

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}


def trace_of_chain(
    layers: Sequence[LinearLayer], state: Mapping[str, Tensor], samples: int
) -> Trace:
    """Return the trace of ``samples`` through ``layers``, in forward order and ending in the head.

    ``state`` holds their weights, and biases where there are any, by parameter name. A layer whose
    activation is not recorded is followed by an operation that no walk gets past.
    """
    first = _parameter(layers[0], "weight")
    shapes: dict[int, tuple[int, ...]] = {0: (samples, state[first].shape[1])}
    operations: list[Operation] = []
    for layer in layers:
        weight, bias = _parameter(layer, "weight"), _parameter(layer, "bias")
        given = (Parameter(weight), Parameter(bias) if bias in state else None)
        shape = (samples, state[weight].shape[0])
        _append(operations, shapes, "linear", layer.name, F.linear, given, shape)
        if layer is layers[-1] or layer.activation == "identity":
            continue
        kind, _, slope = (layer.activation or "unknown activation").partition(":")
        arguments = (float(slope),) if slope else ()
        name = f"the activation after {layer.name}"
        _append(operations, shapes, kind, name, _ACTIVATIONS.get(kind, F.relu), arguments, shape)
    return Trace(tuple(operations), len(operations), shapes)


def _append(
    operations: list[Operation],
    shapes: dict[int, tuple[int, ...]],
    kind: str,
    name: str,
    function: Callable[..., Tensor],
    arguments: tuple[object, ...],
    shape: tuple[int, ...],
) -> None:
    number = len(operations)
    shapes[number + 1] = shape
    operations.append(
        Operation(
            kind=kind,
            name=name,
            function=function,
            arguments=(Place(number), *arguments),
            keywords={},
            inputs=(number,),
            output=number + 1,
            shape=shape,
        )
    )


def _parameter(layer: LinearLayer, kind: str) -> str:
    return f"{layer.name}.{kind}" if layer.name else kind
