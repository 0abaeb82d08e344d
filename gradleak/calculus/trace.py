"""A network as the operations that it runs, recorded from one forward pass in eval mode.

Every call of a torch function on the way from the image to the logits is taken down with its
arguments, by what it computes and not by which module made it: ``nn.ReLU``, ``F.relu`` and
``x.relu_()`` are one operation. What the network decides in Python is decided as it was for the
example.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradleak.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a recorded argument was a tensor of the forward pass: its ``number``."""

    number: int


@dataclass(frozen=True)
class Parameter:
    """Where a recorded argument was a parameter or buffer of the network, by its ``name``."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One call: tensor ``output`` = ``function`` of tensors ``inputs`` and fixed arguments.

    ``kind`` is the function's name without marks of being in place; ``name`` the module's for an
    operation with parameters (``conv@2`` for the second use of ``conv``), and the kind with a
    running number for the others; ``shape`` that of
    the output with the batch first.
    """

    kind: str
    name: str
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    inputs: tuple[int, ...]
    output: int
    shape: tuple[int, ...]

    def run(self, inputs: Sequence[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """Compute the operation again from its ``inputs`` and the network's ``state``.

        It gets copies: it may have been one in place.
        """
        copies = [tensor.clone() for tensor in inputs]
        given = dict(zip(self.inputs, copies, strict=True))

        def fill(value: Any) -> Any:
            if isinstance(value, Place):
                return given[value.number]
            if isinstance(value, Parameter):
                return state[value.name]
            if isinstance(value, list | tuple):
                return type(value)(fill(item) for item in value)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(copies[0])  # one that the network computed from its weights
            return value

        arguments = [fill(value) for value in self.arguments]
        keywords = {key: fill(value) for key, value in self.keywords.items()}
        return self.function(*arguments, **keywords)

    def argument(self, place: int, key: str, default: Any = None) -> Any:
        """Return the argument called ``key``, which may have been given by its ``place``."""
        if key in self.keywords:
            return self.keywords[key]
        return self.arguments[place] if place < len(self.arguments) else default


@dataclass(frozen=True)
class Trace:
    """The operations in the order they ran, tensor 0 being the image and ``logits`` the result."""

    operations: tuple[Operation, ...]
    logits: int
    shapes: Mapping[int, tuple[int, ...]]

    def producer(self, tensor: int) -> Operation | None:
        """Return the operation that made a tensor, None for the image."""
        return self._producers.get(tensor)

    def users(self, tensor: int) -> list[Operation]:
        """Return the operations that read a tensor."""
        return [op for op in self.operations if tensor in op.inputs]

    def uses(self, parameter: str | None) -> int:
        """Return how many operations take a parameter; the gradient is the sum over all of them."""
        return 0 if parameter is None else self._uses[parameter]

    @functools.cached_property
    def _uses(self) -> Counter[str]:
        given = (v for op in self.operations for v in (*op.arguments, *op.keywords.values()))
        return Counter(value.name for value in given if isinstance(value, Parameter))

    @functools.cached_property
    def _producers(self) -> dict[int, Operation]:
        return {op.output: op for op in self.operations}


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run ``model`` on an ``example`` (N, C, H, W) and return what it did.

    Only what the logits depend on is kept. The model's flags are as before. Raises
    :class:`UsageError` when it refuses the example or returns no tensor.
    """
    own = next((t.dtype for t in model.parameters() if t.is_floating_point()), example.dtype)
    example = example.to(own)
    training = {module: module.training for module in model.modules()}
    model.eval()
    recorder = _Recorder(model, example)
    try:
        with torch.no_grad(), recorder:
            logits = model(example)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the network refused an image of shape {tuple(example.shape[1:])} ({reason})",
            "use the size that it takes",
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    if not isinstance(logits, Tensor) or recorder.number(logits) is None:
        raise UsageError("the network returns no tensor of logits", "give a classifier")
    return recorder.trace(logits)


# Functions that tell about a tensor without computing one that gradients flow through.
_SILENT = {"detach", "size", "dim", "numel", "is_floating_point"}
# Names under which one operation is called: in place, as an operator, by its older name.
_ALIASES = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul",
    "__sub__": "sub",
    "__isub__": "sub",
    "__rsub__": "rsub",
    "__neg__": "neg",
    "__itruediv__": "div",
    "__truediv__": "div",
    "__matmul__": "matmul",
    "feature_dropout": "dropout",
    "dropout2d": "dropout",
    "reshape": "view",
    "unsqueeze": "view",
    "squeeze": "view",
    "flatten": "view",
    "contiguous": "view",
    "clone": "view",
}


class _Part:
    """One tensor of those that a function returns."""

    def __init__(self, function: Callable[..., Any], place: int) -> None:
        self.__name__ = getattr(function, "__name__", str(function))
        self._function, self._place = function, place

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Compute all and return that one."""
        part: Tensor = self._function(*arguments, **keywords)[self._place]
        return part


def _assigned(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return ``tensor`` after an assignment to some of its entries."""
    tensor[index] = value
    return tensor


def kind_of(function: Callable[..., Any]) -> str:
    """Return the kind of operation that a torch function computes."""
    name = getattr(function, "__name__", str(function))
    if name not in _ALIASES:
        name = name.removeprefix("_").removesuffix("_")
    return _ALIASES.get(name, name)


class _Recorder(TorchFunctionMode):
    """Takes down the torch functions called while it is active."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        named = [*model.named_parameters(), *model.named_buffers()]
        self._state = {id(tensor): name for name, tensor in named}
        self._numbers = {id(example): 0}
        self._shapes = {0: tuple(example.shape)}
        self._operations: list[Operation] = []
        self._named: Counter[str] = Counter()
        self._alive: list[object] = [example]  # an id is only good while its tensor lives

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor of the forward pass, None for any other."""
        return self._numbers.get(id(tensor))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        inputs: list[int] = []
        arguments = tuple(self._written(value, inputs) for value in args)
        written = {key: self._written(value, inputs) for key, value in keywords.items()}
        result = func(*args, **keywords)
        if not inputs or kind_of(func) in _SILENT:
            return result
        if func is Tensor.__setitem__:
            self._record(_assigned, arguments, written, inputs, args[0])
        elif isinstance(result, Tensor):
            self._record(func, arguments, written, inputs, result)
        elif isinstance(result, list | tuple):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._record(_Part(func, place), arguments, written, inputs, part)
        return result

    def _written(self, value: Any, inputs: list[int]) -> Any:
        """Return an argument with its tensors replaced by what they are."""
        if isinstance(value, Tensor):
            number = self.number(value)
            if number is not None:
                inputs.append(number)
                return Place(number)
            name = self._state.get(id(value))
            return value if name is None else Parameter(name)
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(self._written(item, inputs) for item in value)
        return value

    def _record(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        inputs: list[int],
        result: Tensor,
    ) -> None:
        kind, number = kind_of(function), len(self._shapes)
        own = [v.name for v in (*arguments, *keywords.values()) if isinstance(v, Parameter)]
        name = own[0].rpartition(".")[0] if own else f"{kind} {len(self._operations)}"
        self._named[name] += 1
        if self._named[name] > 1:
            name = f"{name}@{self._named[name]}"
        # An operation in place gives its tensor a new number: what it held before is gone.
        self._numbers[id(result)] = number
        self._shapes[number] = tuple(result.shape)
        self._alive.append(result)
        self._operations.append(
            Operation(
                kind,
                name,
                function,
                arguments,
                keywords,
                tuple(dict.fromkeys(inputs)),
                number,
                tuple(result.shape),
            )
        )

    def trace(self, logits: Tensor) -> Trace:
        """Return the operations that ``logits`` depend on."""
        last = self._numbers[id(logits)]
        needed, kept = {last}, []
        for operation in reversed(self._operations):
            if operation.output in needed:
                needed.update(operation.inputs)
                kept.append(operation)
        shapes = {n: s for n, s in self._shapes.items() if n in needed or n == last}
        return Trace(tuple(reversed(kept)), last, shapes)
