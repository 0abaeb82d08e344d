"""Finding the classifier head in a bundle, by name and shape, and reading no more than that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradleak.bundle import GRAD, PARAM, Bundle
from gradleak.errors import IncompleteError, InputError
from gradleak.models import registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of the gradient's size: far above rounding, far below what the columns of other layers sum to.
_ZERO_SUM = 1e-3


@dataclass(frozen=True)
class Head:
    """The classifier's last Linear layer.

    ``weight`` and ``grad_weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None.
    """

    name: str
    weight: Tensor
    grad_weight: Tensor
    bias: Tensor | None
    grad_bias: Tensor | None


def read_head(
    bundle: Bundle,
    *,
    name: str | None = None,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    scaled: bool = False,
) -> Head:
    """Find the head and read its tensors onto ``device``.

    ``name`` overrides the search; ``weights`` is a file of model weights for a bundle without its
    own; ``scaled`` accepts a scaled loss. Raises :class:`InputError` when no or several candidates
    are found, or shapes disagree, and :class:`IncompleteError` when its gradient or weights are
    missing.
    """
    bundle.require_softmax_loss(scaled=scaled)
    layer = name if name is not None else find_head(bundle)
    weight_name, bias_name = parameter_name(layer, "weight"), parameter_name(layer, "bias")
    if GRAD + weight_name not in bundle:
        raise IncompleteError(
            f"the bundle holds no gradient of the head's weight ({GRAD}{weight_name})",
            f"choose another layer with --head; it holds {_listed(linear_gradients(bundle))}",
        )
    state = with_weights(bundle, weights, (weight_name, bias_name))
    if PARAM + weight_name not in state:
        if weights is not None:
            raise InputError(
                f"{weights} holds no {weight_name}", "give the weights of the gradient's network"
            )
        raise IncompleteError(
            f"the bundle holds no {PARAM}{weight_name}",
            "give the model's weights with --weights FILE",
        )
    grad_weight = state.tensor(GRAD + weight_name, device)
    if grad_weight.dim() != 2 or grad_weight.shape[0] < 2 or not grad_weight.shape[1]:
        raise InputError(
            f"{GRAD}{weight_name} has shape {list(grad_weight.shape)}, not (classes, features)",
            "name the classifier, a Linear layer of 2 classes or more, with --head",
        )
    head = Head(
        name=layer,
        weight=state.tensor(PARAM + weight_name, device),
        grad_weight=grad_weight,
        bias=_optional(state, PARAM + bias_name, device),
        grad_bias=_optional(state, GRAD + bias_name, device),
    )
    for bias_tensor, kind in ((head.bias, PARAM), (head.grad_bias, GRAD)):
        if bias_tensor is not None and bias_tensor.shape != grad_weight.shape[:1]:
            raise InputError(
                f"{kind}{bias_name} has shape {list(bias_tensor.shape)} for a head of "
                f"{grad_weight.shape[0]} classes",
                "use the bias that belongs to the head",
            )
    return head


def find_head(bundle: Bundle) -> str:
    """Return the name of the head: the metadata's, the model's last Linear, or the only candidate.

    Of several matrices the head's gradient is the one whose columns sum to zero (Theorem 1). Raises
    :class:`InputError` when there is none, or several that nothing tells apart.
    """
    model = bundle.model
    if model.head is not None:
        return model.head
    if model.layers:
        return model.layers[-1].name
    if model.name in registry.names():
        return _head_of_registered(model.name)
    candidates = linear_gradients(bundle)
    if len(candidates) > 1:
        candidates = _with_zero_sums(bundle, candidates) or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(
            "the bundle holds no gradient of a Linear layer (a 2-D grad/….weight)",
            "save the gradient of the classifier's weight",
        )
    raise InputError(
        f"the head could be any of {_listed(candidates)}", "name the classifier with --head NAME"
    )


def linear_gradients(bundle: Bundle) -> list[str]:
    """Return the layers whose weight gradient in the bundle is a matrix."""
    names = [n for n in bundle.names(GRAD) if n == "weight" or n.endswith(".weight")]
    return [
        n.removesuffix("weight").removesuffix(".")
        for n in names
        if len(bundle.info(GRAD + n).shape) == 2
    ]


def _with_zero_sums(bundle: Bundle, layers: list[str]) -> list[str]:
    """Return the layers whose gradient's columns sum to zero, as softmax cross-entropy's do."""
    found = []
    for layer in layers:
        gradient = bundle.unchecked(GRAD + parameter_name(layer, "weight")).double()
        size = float(gradient.norm())
        if size > 0.0 and float(gradient.sum(0).norm()) < _ZERO_SUM * size:
            found.append(layer)
    return found


def parameter_name(layer: str, kind: str) -> str:
    """Return the parameter's qualified name; a bare layer (name '') has none to prefix."""
    return f"{layer}.{kind}" if layer else kind


def with_weights(
    bundle: Bundle, path: Path | str | None, names: tuple[str, ...] | None = None
) -> Bundle:
    """Return the bundle with the parameters of a weights file, only ``names`` if given.

    The file's parameters come before the bundle's own; shapes are checked against the gradients.
    """
    if path is None:
        return bundle
    from gradleak.models.weights import read_weights

    state = read_weights(path)
    wanted = state if names is None else {n: state[n] for n in names if n in state}
    return bundle.extended({PARAM + name: tensor for name, tensor in wanted.items()})


def _head_of_registered(name: str) -> str:
    import torch

    from gradleak.models.build import build_model, describe

    # At its default size: what the metadata claims of classes and pixels could fill any memory.
    size = registry.entry(name).size
    return describe(build_model(name), torch.zeros(1, 3, size, size))[0]


def _optional(bundle: Bundle, name: str, device: torch.device | str) -> Tensor | None:
    return bundle.tensor(name, device) if name in bundle else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if names else "none"
