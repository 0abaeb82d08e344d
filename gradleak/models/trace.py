"""Reading a network's classifier off its autograd graph: the head and the layers below it."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradleak.errors import InputError, UsageError
from gradleak.models.spec import LinearLayer

# A node of the autograd graph; torch exports no type with the attributes that are read here.
Node = Any

LINEAR = {"AddmmBackward0", "MmBackward0", "LinearBackward0"}
# Views that keep the order of a sample's entries, and copies; a transposition is none of them.
VIEWS = {
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
ACTIVATIONS = {
    "ReluBackward0": "relu",
    "SigmoidBackward0": "sigmoid",
    "TanhBackward0": "tanh",
    "SiluBackward0": "silu",
}


def describe(model: nn.Module, example: Tensor) -> tuple[str, tuple[LinearLayer, ...], bool]:
    """Find the classifier head, the Linear layers that lead to it, and what the first one reads.

    ``example`` is a normalised image or batch (N, C, H, W); one forward pass in eval mode is
    recorded. The head is the ``nn.Linear`` executed last. From its output the autograd graph is
    followed down through Linear layers, single known activations and views, and no further than
    the first thing that is none of them or that a second path shares. Returns the head's name,
    the layers in forward order ending with the head, and whether the first of them reads the
    flattened image itself. The model is left as it was. Raises ``InputError`` when the network
    runs no ``nn.Linear``, ``UsageError`` when it refuses the example.
    """
    calls: list[tuple[str, Tensor, Node]] = []
    with seeded(0), _probed(model), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(_recorder(name, calls)).remove)
        image = example[:1].detach().clone().requires_grad_()
        try:
            output = model(image)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"the network refused an image of shape {tuple(example.shape[1:])} ({reason})",
                "use the size that it takes",
            ) from error
        if not calls:
            raise InputError("the network runs no Linear layer", "use a network with a Linear head")
        head, weight, node = calls[-1]
        names = {id(p): n for n, p in model.named_parameters()}
        users = _count_users([node, *(t.grad_fn for t in _tensors(output))])
        layers = [LinearLayer(head)]
        while lower := _step_down(node, weight, users):
            name = names.get(id(lower.weight), "")
            if not name.endswith(".weight"):
                break
            layers.insert(0, LinearLayer(name.removesuffix(".weight"), lower.activation))
            node, weight = lower.node, lower.weight
        source = _skip_views(_input_of(node))[-1]
        from_image = getattr(source, "variable", None) is image
        return head, tuple(layers), from_image and weight.shape[1] == image.numel()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own random state, drawn from ``seed``; the global one is restored."""
    # torch.manual_seed would also wake CUDA up, or disturb it where the fork does not reach.
    awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if awake else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if awake:
            torch.cuda.manual_seed_all(seed)
        yield


@contextlib.contextmanager
def _probed(model: nn.Module) -> Iterator[None]:
    """Record gradients of every parameter, in eval mode, and restore all flags afterwards."""
    training = {module: module.training for module in model.modules()}
    # A frozen parameter leaves no trace in the graph.
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, flag in training.items():
            module.training = flag


def _recorder(name: str, calls: list[tuple[str, Tensor, Node]]) -> Any:
    def record(module: nn.Linear, _: object, output: Tensor) -> None:
        # The node is taken now: an in-place activation replaces it in the tensor.
        calls.append((name, module.weight, output.grad_fn))

    return record


class _Lower(NamedTuple):
    """The Linear layer below another, and the activation between the two."""

    node: Node
    weight: Tensor
    activation: str


def _step_down(node: Node, weight: Tensor, users: Mapping[Node, int]) -> _Lower | None:
    """Find the Linear layer whose output, activated, is the whole input of the one at ``node``."""
    path = _skip_views(_input_of(node))
    activation = _activation(path[-1])
    if activation:
        path += _skip_views(path[-1].next_functions[0][0])
    below = path[-1]
    trail = _weight_trail(below)
    if trail is None or any(users[passed] > 1 for passed in [*path, trail]):
        return None
    # A layer applied along a dimension that is flattened later has more rows than samples.
    if trail.variable.shape[0] != weight.shape[1]:
        return None
    return _Lower(below, trail.variable, activation or "identity")


def _skip_views(node: Node) -> list[Node]:
    path = [node]
    while path[-1] is not None and path[-1].name() in VIEWS:
        path.append(path[-1].next_functions[0][0])
    return path


def _activation(node: Node) -> str | None:
    name = node.name() if node is not None else ""
    if name in ("LeakyReluBackward0", "LeakyReluBackward1"):  # 1: in place
        return f"leaky_relu:{node._saved_negative_slope!r}"
    if name == "GeluBackward0":
        return "gelu" if node._saved_approximate == "none" else None
    return ACTIVATIONS.get(name)


def _weight_trail(node: Node) -> Node | None:
    """Return the graph's leaf for the weight when ``node`` is ``x Wᵀ (+ b)``, else ``None``."""
    if node is None or node.name() not in LINEAR:
        return None
    if node.name() == "LinearBackward0":
        leaf = node.next_functions[1][0]
    else:
        transposed = node.next_functions[-1][0]
        if transposed is None or transposed.name() not in ("TBackward0", "TransposeBackward0"):
            return None
        leaf = transposed.next_functions[0][0]
    return leaf if hasattr(leaf, "variable") else None


def _input_of(node: Node) -> Node | None:
    """Return the node that computed the input of a Linear layer (addmm's first is the bias)."""
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]  # the output of a layer on (N, T, D) is viewed back
    if node is None or node.name() not in LINEAR:
        return None
    place = 1 if node.name() == "AddmmBackward0" else 0
    return node.next_functions[place][0]


def _count_users(roots: Iterable[Node]) -> Counter[Node]:
    """Count, for every node below ``roots``, the nodes that read it."""
    users: Counter[Node] = Counter()
    seen = {root for root in roots if root is not None}
    waiting = list(seen)
    while waiting:
        for child, _ in waiting.pop().next_functions:
            if child is not None:
                users[child] += 1
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
    return users


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
