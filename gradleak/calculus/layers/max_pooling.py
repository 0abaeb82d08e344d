"""Max-pooling over a convolution: which entries it took is settled by the convolution's gradient.

The pool, the rectifier and BatchNorm around it, and the convolution below are one step, since
nothing in between can be known before the convolution's input is (ALGORITHMS §6e).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.layer import Estimate, Layer, Stopped, Walking, layer_of, register
from gradleak.calculus.layers.convolution import pair
from gradleak.calculus.maxpool.recover import recover_input
from gradleak.calculus.maxpool.stem import PooledConvolution
from gradleak.calculus.trace import Operation
from gradleak.calculus.window import Window

# Windows of the convolution, over all samples, beyond which products of them all are too large.
_LARGEST = 4200


@dataclass(frozen=True)
class _Below:
    """What lies under a pool: a ``convolution``, BatchNorms ``scaling``, maybe a ``rectifier``."""

    convolution: Operation
    scaling: tuple[Operation, ...]
    rectifier: Operation | None


@register("max_pool2d")
class MaxPool(Layer):
    """The largest entry of each window of a map (N, C, H, W)."""

    def delta_below(
        self, operation: Operation, delta: Tensor, walk: Walking
    ) -> Mapping[int, Tensor]:
        """Recover the input of the convolution below, and give δ to the entries that were taken.

        The input and the rectifier's mask are taken down in the walk.
        """
        below = _below(operation, walk)
        stem = _stem(operation, below, delta, walk)
        found = recover_input(stem, walk.usual, seconds=walk.patience)
        if not found.solved:
            if math.isfinite(found.residual):
                walk.guess(below.convolution.inputs[0], found.x)
            raise Stopped(
                "the entries that it took were not settled, the gradient of "
                f"{below.convolution.name} is missed by {found.residual:.0e}"
            )
        entries = stem.output(stem.patches(stem.joined(found.x.flatten(2))))
        inside = found.delta.reshape(walk.shapes[operation.inputs[0]])
        masks: dict[int, Tensor] = {}
        if below.rectifier is not None:
            open_ = entries.view(len(entries), stem.samples, -1).transpose(0, 1) > 0.0
            masks[below.rectifier.output] = open_.reshape(inside.shape) | (inside != 0.0)
        walk.take(
            below.convolution,
            Estimate(found.x, found.std),
            residual=found.residual,
            condition=found.condition,
            masks=masks,
        )
        slope = _slope(below, delta, walk)
        return {operation.inputs[0]: inside / slope[:, None, None]}


def _below(operation: Operation, walk: Walking) -> _Below:
    """Find the convolution under a pool; raises :class:`Stopped` for other arrangements."""
    rectifier: Operation | None = None
    scaling: list[Operation] = []
    tensor = operation.inputs[0]
    while True:
        maker = walk.trace.producer(tensor)
        if maker is None:
            raise Stopped("there is no convolution below it")
        if len(walk.trace.users(tensor)) > 1:
            raise Stopped("what it reads is read elsewhere too")
        if maker.kind == "conv2d":
            return _Below(maker, tuple(scaling), rectifier)
        if maker.kind == "relu" and rectifier is None and not scaling:
            rectifier = maker
        elif maker.kind == "batch_norm" and not maker.argument(5, "training", False):
            scaling.append(maker)
        else:
            raise Stopped(f"{maker.name} lies between it and the convolution")
        tensor = maker.inputs[0]


def _stem(operation: Operation, below: _Below, delta: Tensor, walk: Walking) -> PooledConvolution:
    """Gather what is known of a pool and what lies below; raises :class:`Stopped` if too little."""
    layer, gradient = layer_of("conv2d"), walk.gradient(below.convolution)
    window = None if layer is None else layer.window(below.convolution, walk)
    name = None if layer is None else layer.weight(below.convolution)
    if window is None or name is None or gradient is None:
        raise Stopped(f"{below.convolution.name} has no gradient, or is in groups")
    size = walk.shapes[operation.inputs[0]][2:]
    pool = _windows(operation, (size[0], size[1]))
    samples = len(delta)
    if pool.index.shape[1] != delta[0, 0].numel():
        raise Stopped("its last windows reach beyond the map")
    if samples * pool.places > _LARGEST:
        raise Stopped(f"{samples * pool.places} windows below it are too many to be settled")
    read = walk.shapes[below.convolution.inputs[0]]
    value = walk.value(operation.output)
    seen, rectified = value.value, below.rectifier is not None
    if value.known is not None:
        above = walk.trace.users(operation.output)
        if [reader.kind for reader in above] != ["relu"]:
            raise Stopped("its output is known in parts")
        seen, rectified = torch.where(value.known, seen, 0.0), True
    equations = gradient.numel() + int((seen > value.std).sum() if rectified else seen.numel())
    unknowns = samples * gradient.shape[1] * window.places
    if equations < unknowns:
        raise Stopped(f"{equations} equations for {unknowns} unknowns below it")
    slope = _slope(below, delta, walk)
    if bool((slope == 0.0).any()):
        raise Stopped("a BatchNorm below it scales a channel by zero")
    nothing = delta.new_zeros(1, *read[1:])
    return PooledConvolution(
        convolution=window,
        pool=pool,
        size=(read[2], read[3]),
        weight=walk.state[name].flatten(1) * slope[:, None],
        shift=_through(below, below.convolution.run([nothing], walk.state), walk),
        gradient=gradient.flatten(1),
        value=seen.flatten(2),
        std=value.std.flatten(2),
        delta=delta.flatten(2) * slope[:, None],
        rectified=rectified,
    )


def _windows(operation: Operation, size: tuple[int, int]) -> Window:
    """Return the windows of a pool over a map of ``size``."""
    kernel = pair(operation.argument(1, "kernel_size"))
    stride = operation.argument(2, "stride")
    padding = pair(operation.argument(3, "padding", 0))
    dilation = pair(operation.argument(4, "dilation", 1))
    return Window.of_convolution(
        size, kernel, pair(stride) if stride else kernel, padding, dilation
    )


def _slope(below: _Below, delta: Tensor, walk: Walking) -> Tensor:
    """Return the factor (O,) of the BatchNorms."""
    zero = delta.new_zeros(1, delta.shape[1], 1, 1)
    return _through(below, zero + 1.0, walk) - _through(below, zero, walk)


def _through(below: _Below, output: Tensor, walk: Walking) -> Tensor:
    """Return what BatchNorms make of a convolution's ``output``, of one place of each channel."""
    for operation in reversed(below.scaling):
        output = operation.run([output], walk.state)
    return output[0, :, 0, 0]
