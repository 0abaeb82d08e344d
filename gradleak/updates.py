"""From a client's weights before and after its local steps to the gradient of those steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InputError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Update:
    """What plain SGD's change of the weights says of the gradient.

    ``gradients`` by parameter name; ``unchanged`` names parameters that stayed as they were, frozen
    or not shared, and have no gradient here; ``buffers`` names what is no parameter; ``precision``
    is the error that the rounding of the weights leaves, of the gradient's size.
    """

    gradients: dict[str, Tensor]
    unchanged: tuple[str, ...]
    buffers: tuple[str, ...]
    precision: float


def is_buffer(name: str, tensor: Tensor) -> bool:
    """Return whether an entry of a state dict is no parameter, by its name or its type."""
    return name.rpartition(".")[2] in _STATISTICS or not tensor.is_floating_point()


def update_gradient(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], lr: float, *, local_steps: int = 1
) -> Update:
    """Return (before − after) / (lr · local_steps) of two state dicts.

    Of one step that is the gradient, of several the mean of the gradients at the weights passed,
    which is best taken for a gradient at :func:`middle_weights`. It is exact but for the rounding
    of the weights: half a unit in the last place of each, divided by ``lr``. Raises
    :class:`InputError` where the state dicts are not of one network, nothing changed, or ``lr`` or
    ``local_steps`` are not positive.
    """
    if not (math.isfinite(lr) and lr > 0.0):
        raise InputError(f"a learning rate of {lr}", "give the client's own, above 0")
    if local_steps < 1:
        raise InputError(f"{local_steps} local steps", "give 1 or more")
    _check_same(before, after)
    gradients, unchanged, buffers = {}, [], []
    error = size = 0.0
    for name, old in before.items():
        new = after[name]
        if is_buffer(name, old):
            buffers.append(name)
            continue
        change = old.double() - new.double()
        if not bool(change.any()):
            unchanged.append(name)
            continue
        gradient = change / (lr * local_steps)
        gradients[name] = gradient.to(torch.promote_types(old.dtype, torch.float32))
        # Uniform in ±½ unit in the last place, which is up to 2·eps·|w| wide.
        unit = torch.finfo(new.dtype).eps / math.sqrt(12.0)
        error += float((unit * new.double()).square().sum()) / (lr * local_steps) ** 2
        size += float(gradient.square().sum())
    if not gradients:
        raise InputError("the weights before and after are the same", "give those of two moments")
    return Update(gradients, tuple(unchanged), tuple(buffers), math.sqrt(error / size))


def middle_weights(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], local_steps: int
) -> dict[str, Tensor]:
    """Return the weights halfway between the first and the last that a gradient was taken at.

    Of K steps the gradients are those at the weights after 0 to K − 1 of them. Their mean is the
    gradient at the mean of those weights up to second order in the learning rate (to first order
    the steps are equal), if every step saw the same samples; at ``before`` it is so to first order
    alone. Of one step these are the weights ``before``; what is no parameter stays.
    """
    share = (local_steps - 1) / (2 * local_steps)
    return {
        name: old
        if is_buffer(name, old) or share == 0.0
        else (old.double() + share * (after[name].double() - old.double())).to(old.dtype)
        for name, old in before.items()
    }


def _check_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        raise InputError(
            f"{odd[0]} is in only one of the two sets of weights", "give two of the same network"
        )
    for name, old in before.items():
        if old.shape != after[name].shape:
            raise InputError(
                f"{name} is {list(old.shape)} before and {list(after[name].shape)} after",
                "give two sets of weights of the same network",
            )
