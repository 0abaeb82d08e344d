"""Matching saved tensors to a network's parameters: by name, then by shape, every guess told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradleak.errors import InputError, UsageError
from gradleak.foreign.saved import Saved

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Guess:
    """One parameter that was not found by its own name: ``saved`` is what was taken, and why."""

    parameter: str
    saved: str
    reason: str


@dataclass(frozen=True)
class Match:
    """Saved tensors by parameter name; ``guesses`` tells of those matched by more than the name."""

    tensors: dict[str, Tensor]
    guesses: tuple[Guess, ...]
    missing: tuple[str, ...]


def match(
    saved: Saved,
    wanted: Mapping[str, Shape],
    *,
    given: Mapping[str, str] | None = None,
    ordered: bool = False,
    what: str = "gradient",
) -> Match:
    """Match saved tensors to the parameters ``wanted``, named in order with their shapes.

    ``given`` maps saved names (or places in a list, from 0) to parameters and comes first. Then
    count equal names, names of which one ends like the other (``module.fc.weight`` and
    ``fc.weight``), the order of a list that has one entry a parameter, and shapes that occur once.
    ``ordered`` takes the saved order for the parameters' where shapes leave several. Raises
    :class:`InputError` where that is ambiguous, where shapes disagree, or a tensor fits nothing.
    """
    names = saved.names or tuple(map(str, range(len(saved.tensors))))
    tensors = {n: t for n, t in zip(names, saved.tensors, strict=True) if t is not None}
    left = dict(wanted)
    found: dict[str, str] = {}  # parameter: saved name
    guesses: list[Guess] = []

    def take(parameter: str, name: str, reason: str = "") -> None:
        _check_shape(name, tensors[name], parameter, wanted[parameter], what)
        found[parameter] = name
        left.pop(parameter)
        if reason:
            guesses.append(Guess(parameter, name, reason))

    for name, parameter in (given or {}).items():
        if name not in tensors:
            raise UsageError(f"there is no saved {name}", f"it holds {_few(list(tensors))}")
        if parameter not in left:
            known = "is given twice" if parameter in wanted else "is none of the network"
            raise UsageError(f"the parameter {parameter} {known}", f"name one of {_few(left)}")
        take(parameter, name, "as told")
    if saved.names is None and len(saved.tensors) == len(wanted) and not given:
        for parameter, name in zip(wanted, names, strict=True):
            if name in tensors:
                take(parameter, name)
        return _result(found, tensors, guesses, left)
    rest = [name for name in tensors if name not in found.values()]
    if saved.names is not None:
        for name in [n for n in rest if n in left]:
            take(name, name)
        rest = [name for name in rest if name not in found.values()]
        for name, parameter in _by_ending(rest, left).items():
            take(parameter, name, "by the name's end")
        rest = [name for name in rest if name not in found.values()]
    for name, parameter, reason in _by_shape(rest, tensors, left, ordered=ordered):
        take(parameter, name, reason)
    return _result(found, tensors, guesses, left)


def names_by_place(saved: Saved) -> Saved:
    """Name the tensors of a nameless list after what their shapes make them: ``0.weight`` …

    A tensor of one dimension is the bias of the matrix or kernel before it where the sizes agree.
    """
    names: list[str] = []
    before: tuple[str, int] | None = None
    for place, tensor in enumerate(saved.tensors):
        shape = () if tensor is None else tuple(tensor.shape)
        if len(shape) == 1 and before is not None and shape[0] == before[1]:
            names.append(f"{before[0]}.bias")
            before = None
        else:
            names.append(f"{place}.weight" if shape else str(place))
            before = (str(place), shape[0]) if len(shape) > 1 else None
    return Saved(saved.tensors, tuple(names))


def _result(
    found: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    guesses: Sequence[Guess],
    left: Mapping[str, Shape],
) -> Match:
    matched = {parameter: tensors[name] for parameter, name in found.items()}
    return Match(matched, tuple(guesses), tuple(left))


def _by_ending(rest: Sequence[str], left: Mapping[str, Shape]) -> dict[str, str]:
    """Return saved name: parameter, where one is the other with something in front, and alone."""
    bare = {name: name.removesuffix(".grad").removesuffix("_grad") for name in rest}
    pairs = [
        (name, parameter)
        for name, end in bare.items()
        for parameter in left
        if end == parameter or end.endswith(f".{parameter}") or parameter.endswith(f".{end}")
    ]
    # The longest common end wins: layer1.0.conv.weight is not conv.weight's.
    best: dict[str, str] = {}
    for name, parameter in sorted(pairs, key=lambda pair: -min(map(len, pair))):
        if name not in best and parameter not in best.values():
            best[name] = parameter
    return best


def _by_shape(
    rest: Sequence[str],
    tensors: Mapping[str, Tensor],
    left: Mapping[str, Shape],
    *,
    ordered: bool,
) -> list[tuple[str, str, str]]:
    """Return (saved name, parameter, reason) for the shapes that leave no choice."""
    parameters: dict[Shape, list[str]] = defaultdict(list)
    for parameter, shape in left.items():
        parameters[shape].append(parameter)
    saved: dict[Shape, list[str]] = defaultdict(list)
    for name in rest:
        saved[tuple(tensors[name].shape)].append(name)
    pairs = []
    for shape, names in saved.items():
        size = "×".join(map(str, shape))
        fitting = parameters.get(shape, [])
        if not fitting:
            raise InputError(
                f"the saved {names[0]} has shape {size}, and no parameter that is left has",
                "give the network that it is of, or --map SAVED=PARAMETER",
            )
        if len(names) == len(fitting) and (len(names) == 1 or ordered):
            reason = f"by shape {size}" if len(names) == 1 else f"by order among shape {size}"
            pairs += [(n, p, reason) for n, p in zip(names, fitting, strict=True)]
            continue
        raise InputError(
            f"the saved {_few(names)} of shape {size} could be any of {_few(fitting)}",
            "say which with --map SAVED=PARAMETER, or --in-order where the saved order is the "
            "network's",
        )
    return pairs


def _check_shape(name: str, tensor: Tensor, parameter: str, shape: Shape, what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"the saved {what} {name} has shape {list(tensor.shape)}, and {parameter} has "
            f"{list(shape)}",
            "give the network and weights that it was taken at",
        )


def _few(names: Mapping[str, object] | Sequence[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "") if listed else "nothing"
