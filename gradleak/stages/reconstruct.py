"""Stage ``reconstruct``: from label and features to the image."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gradleak.bundle import BUFFER, FEATURE, GRAD, IMAGE, LABEL, PARAM, Bundle, StageRecord
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError, InputError, UsageError
from gradleak.head import parameter_name, with_weights
from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.reconstruction.matching import MatchResult, match_gradients
from gradleak.reconstruction.mlp import check_mlp, image_of_feature
from gradleak.reconstruction.options import MatchSettings
from gradleak.reconstruction.resimulate import GradientResidual, check_reconstruction
from gradleak.stages.feature import BundleLayers

Verdict = Literal["unique", "approximate"]
METHODS = ("auto", "mlp", "match")


@dataclass(frozen=True)
class ImageOutcome:
    """The enriched ``bundle`` and the ``images`` (N, 3, H, W) float32 in [0, 1].

    ``verdict`` is ``unique`` only where the gradient re-simulated from the finished image agrees
    with the given one to its own precision (``certificate``), else ``approximate``. ``match`` tells
    how gradient matching went, where it was used.
    """

    bundle: Bundle
    images: Tensor
    verdict: Verdict
    reason: str
    method: str
    certificate: GradientResidual
    match: MatchResult | None
    device: str
    seconds: float


def reconstruct(
    bundle: Bundle,
    *,
    method: str = "auto",
    settings: MatchSettings | None = None,
    model: nn.Module | str | None = None,
    weights: Path | str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> ImageOutcome:
    """Reconstruct the image behind a gradient bundle whose label has been recovered.

    ``method`` ``mlp`` reads the image off the first Linear layer's feature (exact); ``match``
    optimises it until its gradient matches (``settings``); ``auto`` takes the first that applies.
    ``model`` is needed for a network that is not built in: the module itself, or ``module:factory``
    repeated by the user, since a bundle's word for it imports nothing. The image goes to
    ``image/reconstructed``.

    Raises :class:`IncompleteError` when an earlier stage's answer or the weights are missing,
    :class:`UsageError` for a method that does not apply.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"choose one of {', '.join(METHODS)}")
    where = resolve_device(device)
    if LABEL not in bundle:
        raise IncompleteError(f"the bundle holds no {LABEL}", "run gradleak recover-label first")
    full = with_weights(bundle.without_loss_scale(), weights)
    labels = full.tensor(LABEL, where).double()
    spec = full.model
    if method == "mlp" and not spec.from_image:
        raise UsageError(
            "method 'mlp' needs a network whose first Linear layer reads the image",
            "use --method match",
        )
    start = time.perf_counter()
    if spec.from_image and method != "match":
        images, certificate = _from_features(full, labels, where)
        chosen, match = "mlp", None
    else:
        network = _network(full, model, where)
        shape = _input_shape(spec)
        mean, std = _normalisation(spec)
        gradients = full.tensors(GRAD, where)
        generator = torch.Generator(device=where).manual_seed(seed)
        match = match_gradients(
            network,
            gradients,
            labels,
            shape=shape,
            mean=mean,
            std=std,
            head=spec.head,
            features=_head_feature(full, where),
            options=(settings or MatchSettings()).options(network, shape),
            generator=generator,
            progress=progress,
        )
        images, chosen = match.images, "match"
        certificate = check_reconstruction(network, gradients, images, labels, mean, std)
    seconds = time.perf_counter() - start
    verdict: Verdict = "unique" if certificate.exact else "approximate"
    reason = (
        "exact: the finished image's own gradient is the given one to its precision"
        if certificate.exact
        else f"not exact: the finished image's gradient misses the given one by "
        f"{certificate.relative:.1e}, its precision is {certificate.precision:.1e}"
    )
    record = StageRecord(
        "reconstruct",
        {"method": chosen, "matching": None if match is None else asdict(match.options)},
        seed=seed,
        device=str(where),
        seconds=seconds,
        verdict=verdict,
    )
    return ImageOutcome(
        bundle=bundle.extended({IMAGE: images.cpu()}, record=record),
        images=images,
        verdict=verdict,
        reason=reason,
        method=chosen,
        certificate=certificate,
        match=match,
        device=str(where),
        seconds=seconds,
    )


def _from_features(
    bundle: Bundle, labels: Tensor, device: torch.device
) -> tuple[Tensor, GradientResidual]:
    """Read the image off the first layer's feature, and certify it along the chain."""
    spec = bundle.model
    first = spec.layers[0].name
    if FEATURE + first not in bundle:
        raise IncompleteError(
            f"the bundle holds no {FEATURE}{first}", "run gradleak recover-feature first"
        )
    mean, std = _normalisation(spec)
    feature = bundle.tensor(FEATURE + first, device).double()
    shape = _input_shape(spec)
    if feature.numel() != shape[0] * shape[1] * shape[2] or len(labels) != 1:
        raise InputError(
            f"{FEATURE}{first} has shape {list(feature.shape)} for one image of {list(shape)}",
            "recover label and feature from this bundle",
        )
    image = image_of_feature(feature[0], shape, mean, std)

    head = GRAD + parameter_name(spec.layers[-1].name, "weight")
    if head in bundle and labels.shape[1] != bundle.info(head).shape[0]:
        raise InputError(
            f"{LABEL} has shape {list(labels.shape)} for a head of {bundle.info(head).shape[0]} "
            "classes",
            "run gradleak recover-label on this bundle",
        )
    read = BundleLayers(bundle, device)
    certificate = check_mlp(spec.layers, read, image, labels[0], mean, std)
    if not math.isfinite(certificate.relative + certificate.precision):
        for layer in spec.layers:  # a NaN or an infinity somewhere: name it
            read.check(layer.name)
    return image, certificate


def _network(bundle: Bundle, model: nn.Module | str | None, device: torch.device) -> nn.Module:
    """Build or take the network and give it the bundle's parameters and buffers."""
    spec = bundle.model
    if isinstance(model, nn.Module):
        network = copy.deepcopy(model)  # the caller's stays as it is
    else:
        name = model or spec.name
        if name is None:
            raise IncompleteError(
                "the bundle does not say which network it is of", "name it with --model"
            )
        if ":" in name and model is None:
            raise UsageError(
                f"the bundle names the network {name}, and a file's word imports no code",
                f"repeat it if you trust it: --model {name}",
            )
        size = spec.input_shape[-1] if spec.input_shape else None
        network = build_model(name, classes=spec.classes, size=size, options=spec.options)
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
    return network.to(device).eval()


def _head_feature(bundle: Bundle, device: torch.device) -> Tensor | None:
    name = f"{FEATURE}{bundle.model.head}"
    return bundle.tensor(name, device) if name in bundle else None


def _input_shape(spec: ModelSpec) -> tuple[int, int, int]:
    if spec.input_shape is None:
        raise IncompleteError(
            "the bundle does not record the network's input shape",
            "add input_shape to the metadata's model (docs/bundle-format.md)",
        )
    return spec.input_shape


def _normalisation(spec: ModelSpec) -> tuple[Sequence[float], Sequence[float]]:
    channels = _input_shape(spec)[0]
    plain = (registry.NO_MEAN, registry.NO_STD) if channels == 3 else ((0.0,), (1.0,))
    return spec.mean or plain[0], spec.std or plain[1]
