"""The network behind a bundle, as the attack stages need it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradleak.bundle import BUFFER, FEATURE, PARAM, Bundle
from gradleak.errors import IncompleteError, InputError, UsageError
from gradleak.models import registry
from gradleak.models.build import build_model, is_own
from gradleak.models.output import giving_logits
from gradleak.models.spec import ModelSpec
from gradleak.models.training import use_batch_statistics


def network_of(bundle: Bundle, model: nn.Module | str | None, device: torch.device) -> nn.Module:
    """Build or take the network and give it the bundle's parameters and buffers.

    It is in eval mode; of a bundle from train mode its BatchNorms normalise by the batch.
    """
    network = bare_network(bundle.model, model)
    state = {**bundle.tensors(BUFFER), **bundle.tensors(PARAM)}
    if not any(name in state for name, _ in network.named_parameters()):
        raise IncompleteError("the bundle holds no weights", "give them with --weights FILE")
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in state and not name.endswith("num_batches_tracked"):
            raise IncompleteError(
                f"the bundle holds no weights for {name}", "give them with --weights FILE"
            )
        if name in state and state[name].shape != tensor.shape:
            raise InputError(
                f"{name} is {list(state[name].shape)} in the bundle and {list(tensor.shape)} in "
                "the network",
                "name the network that the gradient was taken of",
            )
    network.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
    if bundle.metadata.get("mode") == "train":
        use_batch_statistics(network)
    return network.to(device).eval()


def bare_network(spec: ModelSpec, model: nn.Module | str | None, seed: int = 0) -> nn.Module:
    """Build or take the network that ``spec`` tells of, its weights drawn from ``seed``.

    ``model`` is the module itself or a name that comes before the recorded one. Raises
    :class:`IncompleteError` where no network is named, :class:`UsageError` for one that cannot be
    built, or whose import the user has not asked for.
    """
    if isinstance(model, nn.Module):
        return giving_logits(copy.deepcopy(model))  # the caller's stays as it is
    name = model or spec.name
    if name is None:
        raise IncompleteError(
            "the bundle does not say which network it is of", "name it with --model"
        )
    if is_own(name) and model is None:
        raise UsageError(
            f"the bundle names the network {name}, and a file's word imports no code",
            f"repeat it if you trust it: --model {name}",
        )
    size = spec.input_shape[-1] if spec.input_shape else None
    # A factory of one's own decides on its classes, unless its options say them.
    classes = None if is_own(name) else spec.classes
    return build_model(name, classes=classes, size=size, options=spec.options, seed=seed)


def head_feature(bundle: Bundle, device: torch.device) -> Tensor | None:
    """Return the recovered input (N, D) of the head, None if the bundle holds none."""
    name = f"{FEATURE}{bundle.model.head}"
    if name not in bundle:
        return None
    feature = bundle.tensor(name, device)
    if feature.dim() != 2:
        raise InputError(
            f"{name} has shape {list(feature.shape)}, and the head reads (N, D)",
            "run gradleak recover-feature again",
        )
    return feature


def input_shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images; raises :class:`IncompleteError`."""
    if spec.input_shape is None:
        raise IncompleteError(
            "the bundle does not record the network's input shape",
            "add input_shape to the metadata's model (docs/bundle-format.md)",
        )
    return spec.input_shape


def normalisation_of(spec: ModelSpec) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of each channel, none if the bundle says nothing."""
    channels = input_shape(spec)[0]
    plain = (registry.NO_MEAN, registry.NO_STD) if channels == 3 else ((0.0,), (1.0,))
    return spec.mean or plain[0], spec.std or plain[1]
