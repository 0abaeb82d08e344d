"""What is known of the network a gradient came from, as a bundle's metadata records it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradleak.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class LinearLayer:
    """A Linear layer of the classifier.

    ``name`` is the module's qualified name (the parameter's without ``.weight``), ``activation``
    what stands between its output and the next Linear layer: ``relu``, ``sigmoid``, ``tanh``,
    ``leaky_relu:SLOPE``, ``gelu``, ``silu`` or ``identity``; ``None`` when unknown, and for the
    head, which no Linear layer follows.
    """

    name: str
    activation: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The network of a gradient; whatever is not known is ``None`` or empty.

    ``name`` is a registry name or ``module:factory``; ``input_shape`` is (channels, height,
    width); ``mean`` and ``std`` normalise an image in [0, 1] per channel; ``head`` names the
    classifier's last Linear layer; ``layers`` are the Linear layers that lead to it, in forward
    order and ending with it; ``from_image`` says that the first of them reads the normalised
    image itself, flattened; ``options`` are what the factory was given; ``extra`` holds the keys
    this version does not know, which are written back.
    """

    name: str | None = None
    classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    head: str | None = None
    layers: tuple[LinearLayer, ...] = ()
    from_image: bool = False
    options: dict[str, object] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write one JSON object with every known key, and the extra ones behind them."""
        known = {
            "name": self.name,
            "classes": self.classes,
            "input_shape": self.input_shape,
            "mean": self.mean,
            "std": self.std,
            "head": self.head,
            "layers": [{"name": x.name, "activation": x.activation} for x in self.layers],
            "from_image": self.from_image,
            "options": self.options,
        }
        return json.dumps(known | {k: v for k, v in self.extra.items() if k not in known})

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Read what ``to_json`` wrote, or less: missing and null keys take their defaults.

        Raises ``InputError`` when ``text`` is not a JSON object or a known key has a value of
        the wrong type, naming the key.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the model's metadata is not JSON ({error})", MEND) from error
        if not isinstance(found, dict):
            raise InputError("the model's metadata is not a JSON object", MEND)
        known: dict[str, Any] = {}
        for key, (parse, kind) in FIELDS.items():
            value = found.pop(key, None)
            if value is None:
                continue
            try:
                known[key] = parse(value)
            except (_WrongTypeError, OverflowError) as error:
                raise InputError(
                    f"the model's metadata has {key} = {json.dumps(value):.60}, not {kind}", MEND
                ) from error
        return cls(**known, extra=found)


class _WrongTypeError(Exception):
    pass


def _only(kind: type[T], holds: Callable[[T], bool] = lambda _: True) -> Callable[[object], T]:
    def parse(value: object) -> T:
        # bool is an int to Python, but not to whoever writes "classes".
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
            raise _WrongTypeError
        if not holds(value):
            raise _WrongTypeError
        return value

    return parse


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _WrongTypeError
    return float(value)


def _each(parse: Callable[[Any], T]) -> Callable[[object], tuple[T, ...]]:
    return lambda value: tuple(parse(item) for item in _list(value))


def _shape(value: object) -> tuple[int, ...]:
    sizes = _each(_positive)(value)
    if len(sizes) != 3:
        raise _WrongTypeError
    return sizes


def _stds(value: object) -> tuple[float, ...]:
    stds = _each(_number)(value)
    if any(std <= 0 for std in stds):
        raise _WrongTypeError
    return stds


def _layer(value: object) -> LinearLayer:
    layer = _object(value)
    activation = layer.get("activation")
    return LinearLayer(_text(layer.get("name")), None if activation is None else _text(activation))


_text = _only(str)
_list: Callable[[object], list[Any]] = _only(list)
_object: Callable[[object], dict[str, Any]] = _only(dict)
_positive = _only(int, lambda value: value > 0)

MEND = "correct it, or leave the key out"
FIELDS: dict[str, tuple[Callable[[object], object], str]] = {
    "name": (_text, "a string"),
    "classes": (_positive, "a positive integer"),
    "input_shape": (_shape, "three positive integers"),
    "mean": (_each(_number), "a list of numbers"),
    "std": (_stds, "a list of positive numbers"),
    "head": (_text, "a string"),
    "layers": (_each(_layer), 'a list of {"name", "activation"}'),
    "from_image": (_only(bool), "true or false"),
    "options": (_object, "an object"),
}
