"""The image of one sample below a parameter that is added, as position embeddings are.

For z = u + P with a parameter P of z's own shape, ∂loss/∂P = ∂loss/∂z: of one sample, the gradient
of P is the δ that the walk would have brought down, whatever stands above. Transformers add their
position embedding to the patches of the image, and between the two stand rearrangements alone. So
the δ of the patch projection is known, and its weight gradient G = Σ δ_t x_tᵀ is a set of linear
equations for the patches x_t: as many as the embedding is wide for as many unknowns as there are
patches. (APRIL, arXiv 2112.14087, reads the patches from the first attention layer instead.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.layers.convolution import Convolution
from gradleak.calculus.trace import Operation, Parameter, Trace
from gradleak.calculus.widened import Widened
from gradleak.calculus.window import Window

# A condition number beyond this leaves nothing of a float32 gradient.
_SINGULAR = 1e6
# Of a linear map's derivative, by which it may differ between two places.
_LINEAR = 1e-9


@dataclass(frozen=True)
class Added:
    """The image (1, C, H, W) as the network takes it, from the gradients of the named parameters.

    ``equations`` stand for ``unknowns`` of each tap and channel, ``residual`` is what is left of
    them and ``condition`` their condition number.
    """

    image: Tensor
    embedding: str
    projection: str
    equations: int
    unknowns: int
    residual: float
    condition: float


def image_below_added(
    steps: Trace, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Added | None:
    """Read the image off the gradients of an added parameter and of the projection below it.

    ``steps`` and ``state`` are those of a network, traced with one sample. None where the network
    is not built so, the sample is not alone, or one of the two gradients is not there.
    """
    if steps.shapes[0][0] != 1:
        return None
    wide = Widened(state)
    first = [op for op in steps.operations if op.inputs == (0,) and op.kind == "conv2d"]
    for addition in steps.operations:
        name = _added(addition, state)
        if name is None or name not in gradients or steps.uses(name) != 1:
            continue
        above = gradients[name].double().reshape(addition.shape)
        for projection in first:
            delta = _pulled_back(steps, projection, addition, above, wide)
            found = None if delta is None else _solve(projection, steps, delta, state, gradients)
            if found is not None:
                image, residual, condition = found
                weight = str(Convolution().weight(projection))
                return Added(
                    image,
                    name,
                    weight,
                    equations=projection.shape[1],
                    unknowns=math.prod(projection.shape[2:]),
                    residual=residual,
                    condition=condition,
                )
    return None


def _added(operation: Operation, state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the parameter that an addition adds to the whole of its input, if any."""
    plain = operation.kind == "add" and len(operation.inputs) == 1 and not operation.keywords
    names = [value.name for value in operation.arguments if isinstance(value, Parameter)]
    if not plain or len(names) != 1 or len(operation.arguments) != 2:
        return None
    return names[0] if state[names[0]].numel() == math.prod(operation.shape) else None


def _pulled_back(
    steps: Trace,
    below: Operation,
    addition: Operation,
    above: Tensor,
    state: Mapping[str, Tensor],
) -> Tensor | None:
    """Return ∂loss/∂(output of ``below``), given that of ``addition``, if all between is linear."""
    pulled = []
    for seed in (0, 1):  # a linear map has the same derivative everywhere
        dice = torch.Generator().manual_seed(seed)
        start = torch.randn(below.shape, generator=dice, dtype=torch.float64).to(above.device)
        values = {below.output: start.requires_grad_()}
        with torch.enable_grad():
            for operation in steps.operations:
                if operation.inputs and all(number in values for number in operation.inputs):
                    given = [values[number] for number in operation.inputs]
                    values[operation.output] = operation.run(given, state)
                if operation is addition:
                    break
            if addition.output not in values:
                return None
            (delta,) = torch.autograd.grad(values[addition.output], start, above)
        pulled.append(delta)
    gap = float(torch.linalg.vector_norm(pulled[0] - pulled[1]))
    return pulled[0] if gap <= _LINEAR * float(torch.linalg.vector_norm(pulled[0])) else None


def _solve(
    projection: Operation,
    steps: Trace,
    delta: Tensor,
    state: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> tuple[Tensor, float, float] | None:
    """Return what a projection of separate patches reads (1, C, H, W), residual and condition."""
    rule = Convolution()
    weight = rule.weight(projection)
    if weight is None or weight not in gradients or steps.uses(weight) != 1:
        return None
    window = _windows(projection, steps, state)
    if window is None:
        return None
    channels, height, width = steps.shapes[0][1:]
    outputs, patches = projection.shape[1], window.index.shape[1]
    matrix = delta.reshape(outputs, patches)
    sizes = torch.linalg.svdvals(matrix)
    if outputs < patches or not float(sizes[0]) < _SINGULAR * float(sizes[-1]):
        return None
    # G[o, c, t] = Σ_p δ[o, p] x[c, i(t, p)]: the same matrix for every channel and tap.
    target = gradients[weight].double().reshape(outputs, channels * window.taps)
    inverse = torch.linalg.pinv(matrix)
    read = inverse @ target
    read = read + inverse @ (target - matrix @ read)
    left = torch.linalg.vector_norm(target - matrix @ read)
    image = target.new_zeros(channels, height * width)
    parts = read.view(patches, channels, window.taps).permute(1, 2, 0).flatten(1)
    image[:, window.index.to(image.device).flatten()] = parts
    residual = float(left / torch.linalg.vector_norm(target))
    return image.view(1, channels, height, width), residual, float(sizes[0] / sizes[-1])


def _windows(projection: Operation, steps: Trace, state: Mapping[str, Tensor]) -> Window | None:
    """Return the windows of a convolution that reads every place exactly once, else None."""
    window = Convolution().places(projection, steps.shapes, state)
    if window is None:
        return None
    seen = torch.bincount(window.index.flatten(), minlength=window.places)
    return window if bool((seen == 1).all()) else None
