"""What a file of another program holds: tensors with names, or in an order, in many wrappings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradleak.errors import InputError
from gradleak.models.weights import plain_names, read_saved

# The keys under which training scripts keep gradients and weights beside other things.
_GRADIENTS = ("gradients", "gradient", "grads", "grad")
_WEIGHTS = ("state_dict", "model_state_dict", "weights", "parameters", "params", "model")
_BUNDLE = ("grad/", "param/", "buffer/")


@dataclass(frozen=True)
class Saved:
    """Tensors in a file's order; ``names`` is None where they have none, and a tensor None where a
    parameter has no gradient."""

    tensors: tuple[Tensor | None, ...]
    names: tuple[str, ...] | None

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that are None; empty without names."""
        pairs = zip(self.names or (), self.tensors, strict=False)
        return {name: tensor for name, tensor in pairs if tensor is not None}


@dataclass(frozen=True)
class SavedStep:
    """What a file tells of a step: gradients, the weights beside them, or weights before and after;
    None for what it does not hold."""

    gradients: Saved | None = None
    weights: Saved | None = None
    before: Saved | None = None
    after: Saved | None = None


def read_step(path: Path | str) -> SavedStep:
    """Read a file of gradients (.pt, .pth, .bin, .npz or .safetensors).

    It may hold a mapping by parameter name, a list in parameter order, either of them under a key
    such as ``gradients`` with weights beside it, or two state dicts under ``before`` and ``after``.
    Raises :class:`InputError` for anything else, and for pickled code.
    """
    content = read_saved(path)
    if isinstance(content, Mapping):
        if "before" in content and "after" in content:
            before, after = (_saved(content[key], path) for key in ("before", "after"))
            return SavedStep(before=before, after=after)
        inner = _first(content, _GRADIENTS)
        if inner is not None:
            weights = _first(content, _WEIGHTS)
            kept = None if weights is None else _saved(weights, path)
            return SavedStep(_saved(inner, path), kept)
        if any(str(key).startswith("grad/") for key in content):
            parts = [_stripped(content, prefix) for prefix in _BUNDLE]
            state = {**parts[1], **parts[2]}
            return SavedStep(_saved(parts[0], path), _saved(state, path) if state else None)
    return SavedStep(_saved(content, path))


def read_state(path: Path | str) -> Saved:
    """Read a file of weights, as :func:`read_step` does one of gradients."""
    content = read_saved(path)
    if isinstance(content, Mapping):
        inner = _first(content, _WEIGHTS)
        content = content if inner is None else inner
    return _saved(content, path)


def _first(content: Mapping[object, object], keys: Sequence[str]) -> object | None:
    """Return what stands under the first key that holds a collection of tensors."""
    for key in keys:
        if isinstance(content.get(key), Mapping | list | tuple):
            return content[key]
    return None


def _stripped(content: Mapping[object, object], prefix: str) -> dict[str, object]:
    return {str(k)[len(prefix) :]: v for k, v in content.items() if str(k).startswith(prefix)}


def _saved(content: object, path: Path | str) -> Saved:
    if isinstance(content, Tensor):
        return Saved((content,), None)
    if isinstance(content, Mapping):
        named = plain_names(dict(_flattened(content, path)))
        order = _order(list(named))
        if order is not None:
            return Saved(tuple(named[name] for name in order), None)
        return Saved(tuple(named.values()), tuple(named))
    if isinstance(content, Sequence) and not isinstance(content, str):
        if content and all(_is_pair(item) for item in content):
            return _saved(dict(content), path)
        if all(item is None or isinstance(item, Tensor) for item in content):
            return Saved(tuple(content), None)
    raise InputError(
        f"{path} holds no tensors by name or in a list ({type(content).__name__})",
        "save a dict {parameter: gradient}, or a list in parameter order",
    )


def _flattened(
    content: Mapping[object, object], path: Path | str, prefix: str = ""
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the tensors of nested mappings, their keys joined by dots."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if value is None or isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flattened(value, path, f"{name}.")
        else:
            raise InputError(
                f"{path} holds {name}, which is no tensor but {type(value).__name__}",
                "save a dict {parameter: gradient}, or a list in parameter order",
            )


def _order(names: Sequence[str]) -> list[str] | None:
    """Return names that only count (0, 1 … or NumPy's arr_0, arr_1 …) in their order, else None."""
    places = [re.fullmatch(r"(?:arr_)?(\d+)", name) for name in names]
    if not names or not all(places):
        return None
    numbers = {name: int(place[1]) for name, place in zip(names, places, strict=True) if place}
    return sorted(names, key=numbers.__getitem__)


def _is_pair(item: object) -> bool:
    return (
        isinstance(item, tuple | list)
        and len(item) == 2
        and isinstance(item[0], str)
        and (item[1] is None or isinstance(item[1], Tensor))
    )
