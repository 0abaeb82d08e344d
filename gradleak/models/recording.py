"""What a bundle records of a network: its head, the Linear layers below it, the images it takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradleak.errors import InputError
from gradleak.models.output import giving_logits
from gradleak.models.providers import expected_of
from gradleak.models.spec import ModelSpec
from gradleak.models.trace import describe

# Heights and widths that networks are made for.
_SIZES = (28, 32, 48, 64, 84, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 336, 384, 448)


def recorded(model: nn.Module, spec: ModelSpec, example: Tensor | None = None) -> ModelSpec:
    """Return ``spec`` with what ``model`` itself tells: classes, head, layers and input shape.

    ``example`` (N, C, H, W) is a batch as the model takes it; its shape alone is kept. Without one
    the shape is the spec's; without that the model is tried with the usual sizes, and the shape
    is recorded only if it takes no more than one of them (the head is the same at any). Raises
    :class:`InputError` for a network without a Linear head or that takes none of those sizes, and
    what :func:`describe` raises for an example.
    """
    shape = tuple(example.shape[1:]) if example is not None else spec.input_shape
    known = shape is not None
    if shape is None:
        shapes = list(taken_shapes(model))
        if not shapes:
            raise InputError(
                "the network takes no picture of a usual size", "give the size (--size, example=)"
            )
        expected = expected_of(model)
        usual = (channels_of(model), expected.size, expected.size) if expected else shapes[0]
        shape, known = usual, len(shapes) == 1 or expected is not None
    first = next(model.parameters())
    dtype = first.dtype if first.is_floating_point() else torch.float32
    if example is None:
        example = torch.zeros((1, *shape))
    head, layers, from_image = describe(model, example.to(first.device, dtype))
    linear = model.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    return replace(
        spec,
        classes=spec.classes or linear.out_features,
        input_shape=(int(shape[0]), int(shape[1]), int(shape[2])) if known else None,
        head=head,
        layers=layers,
        from_image=from_image and known,
    )


def channels_of(model: nn.Module) -> int:
    """Return the channels of the pictures that the first convolution reads, 3 without one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def taken_shapes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Try pictures of the usual sizes, and those that an MLP's width allows, without computing."""
    candidates = [(channels_of(model), size, size) for size in _SIZES]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        sides = [(c, math.isqrt(first.in_features // c)) for c in (3, 1)]
        candidates = [(c, n, n) for c, n in sides if c * n * n == first.in_features]
    hollow = giving_logits(copy.deepcopy(model)).to("meta").eval()
    for shape in candidates:
        try:
            with torch.no_grad():
                logits = hollow(torch.zeros((1, *shape), device="meta"))
        except Exception:  # any network refuses a wrong size in its own way
            continue
        if isinstance(logits, Tensor) and logits.dim() == 2:
            yield shape


def gradients_of(
    model: nn.Module, given: Mapping[str, Tensor | None] | Sequence[Tensor | None] | None
) -> dict[str, Tensor]:
    """Return gradients by parameter name: those of a mapping, of a sequence in parameter order, or
    the parameters' own.

    None stands for a parameter without one. Raises :class:`InputError` where there is none at all,
    or names or shapes are not those of the model.
    """
    parameters = dict(model.named_parameters())
    pairs: Mapping[str, Tensor | None]
    if given is None:
        pairs = {name: parameter.grad for name, parameter in parameters.items()}
    elif isinstance(given, Mapping):
        pairs = given
    elif len(given) == len(parameters):
        pairs = dict(zip(parameters, given, strict=True))
    else:
        raise InputError(
            f"{len(given)} gradients were given for {len(parameters)} parameters",
            "give one for each, None for those without, or a mapping by name",
        )
    found = {name: gradient.detach() for name, gradient in pairs.items() if gradient is not None}
    if not found:
        raise InputError("the model holds no gradient", "call this after loss.backward()")
    for name, gradient in found.items():
        if name not in parameters:
            raise InputError(f"the model has no parameter {name}", "name gradients as it does")
        if gradient.shape != parameters[name].shape:
            raise InputError(
                f"the gradient of {name} has shape {list(gradient.shape)}, the parameter "
                f"{list(parameters[name].shape)}",
                "give the gradients of this model",
            )
    return found
