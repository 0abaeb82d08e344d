"""Counting before solving: what a gradient of a network would give away, without any gradient.

The gradient of smooth synthetic pictures is computed and attacked by the real walk, which is told
their labels and the head's feature; the equations of every layer are counted beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gradleak.bundle import BUFFER, GRAD, PARAM, Bundle
from gradleak.calculus.added import image_below_added
from gradleak.calculus.counting import LayerCount, count_layers
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.calculus.walk import Walk, walk_from
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError, UsageError
from gradleak.head import with_weights
from gradleak.models import registry
from gradleak.models.build import is_own, load_weights
from gradleak.models.providers import expected_of
from gradleak.models.recording import channels_of
from gradleak.models.spec import ModelSpec
from gradleak.progress import Progress
from gradleak.stages.network import bare_network, input_shape, network_of
from gradleak.stages.simulation import Simulated

ImageVerdict = Literal["exact", "open", "out of reach"]
# Precisions of floating-point tensors in a bundle, the coarsest first.
_PRECISIONS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class LeakCount:
    """What a gradient of ``samples`` images (``shape`` each) of a network gives away.

    ``layers`` are the layers with weights from the head downwards; ``maps`` counts the inputs that
    the walk recovered, of ``inputs`` in all, and ``barriers`` say what it did not get past.
    ``image`` is ``exact`` where the walk recovered the simulated pictures in all 8-bit pixels,
    ``open`` where it ended above, and what it found has, with the gradients below, at least as many
    equations as there are pixels. ``precision`` is that of the gradient.
    """

    model: str | None
    layers: tuple[LayerCount, ...]
    samples: int
    shape: tuple[int, int, int]
    maps: int
    inputs: int
    barriers: tuple[str, ...]
    image: ImageVerdict
    reason: str
    weights: Literal["given", "random"]
    precision: str
    device: str
    seconds: float


def count_leak(
    bundle: Bundle | None = None,
    *,
    model: nn.Module | str | None = None,
    classes: int | None = None,
    size: int | None = None,
    samples: int | None = None,
    weights: Path | str | None = None,
    options: Mapping[str, object] | None = None,
    patience: float = math.inf,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> LeakCount:
    """Count what can be recovered of ``samples`` images from their gradient (default: 1).

    A ``bundle`` gives the network, its weights if it holds them all, which gradients are shared and
    in which precision; its gradients themselves are not looked at. Without one ``model`` names the
    network, of ``classes`` and for images of ``size`` pixels, built with ``options``. Weights that
    are nowhere given are drawn from ``seed``, and so are the simulated pictures and labels.
    ``patience`` seconds are spent on each search. Raises :class:`UsageError` and
    :class:`IncompleteError` where the network is not known, :class:`InputError` for weights of
    another one.
    """
    where = resolve_device(device)
    if bundle is not None:
        network, spec, drawn = _network_of_bundle(bundle, model, weights, where, seed)
        samples = samples or bundle.batch_size
        shared = bundle.names(GRAD)
        dtypes = {bundle.info(GRAD + name).dtype for name in shared}
    else:
        network, spec, drawn = _network_by_name(
            model, classes, size, options or {}, weights, where, seed
        )
        shared, dtypes = [], set()
    start = time.perf_counter()
    simulated = Simulated(network, spec, samples or 1, where, seed)
    dtype = _coarsest(dtypes)
    walk = walk_from(
        simulated.trace,
        simulated.state,
        simulated.gradients(dtype, shared),
        simulated.labels,
        simulated.feature,
        thorough=False,
        patience=patience,
        progress=progress,
    )
    layers = count_layers(walk)
    if layers[0].verdict == "out of reach":  # the walk was told what nobody could know
        why = f"what {layers[0].name} reads is not determined"
        rest = [replace(row, verdict="out of reach", reason=why) for row in layers[1:]]
        layers = (layers[0], *rest)
    image, reason = _image(walk, layers, simulated)
    return LeakCount(
        model=model if isinstance(model, str) else spec.name,
        layers=layers,
        samples=samples or 1,
        shape=input_shape(spec),
        maps=len(_inputs(row for row in layers if row.verdict != "out of reach")),
        inputs=len(_inputs(layers)),
        barriers=tuple(str(barrier) for barrier in walk.barriers),
        image=image,
        reason=reason,
        weights="random" if drawn else "given",
        precision=str(dtype).removeprefix("torch."),
        device=str(where),
        seconds=time.perf_counter() - start,
    )


def _inputs(layers: Iterable[LayerCount]) -> set[tuple[str, ...]]:
    """Return what layers read, by the names of all that read it."""
    return {layer.readers or (layer.name,) for layer in layers}


def _image(
    walk: Walk, layers: Sequence[LayerCount], simulated: Simulated
) -> tuple[ImageVerdict, str]:
    """Return whether the image can be recovered, and why."""
    if layers[0].verdict == "out of reach":
        return "out of reach", f"the head's input is not determined: {layers[0].reason}"
    if walk.image is not None:
        if simulated.recovers(walk.image):
            return "exact", "every pixel follows from the gradient, layer by layer"
        return "out of reach", "the walk arrives, but not at the pictures: rounding has grown"
    added = image_below_added(simulated.trace, simulated.state, walk.gradients)
    if added is not None and simulated.recovers(added.image):
        return "exact", (
            f"the gradient of {added.embedding} is the δ of the patches, {added.equations} "
            f"equations for {added.unknowns} unknowns, condition {added.condition:.0e}"
        )
    try:
        rest = RemainingNetwork(walk)
    except IncompleteError as error:
        return "out of reach", error.wrong
    equations, unknowns = rest.equations(), math.prod(walk.shapes[0])
    lowest = ", ".join(cut.name for cut in rest.cuts)
    text = f"a fit to the output of {lowest} has {equations} equations for {unknowns} pixels"
    return ("open" if equations >= unknowns else "out of reach"), text


def _network_of_bundle(
    bundle: Bundle,
    model: nn.Module | str | None,
    weights: Path | str | None,
    device: torch.device,
    seed: int,
) -> tuple[nn.Module, ModelSpec, bool]:
    """Return the network of a bundle, its spec, and whether its weights had to be drawn."""
    full = with_weights(bundle, weights)
    drawn = bare_network(full.model, model, seed)
    held = {*full.names(PARAM), *full.names(BUFFER)}
    if weights is None and not all(name in held for name, _ in drawn.named_parameters()):
        return drawn.to(device), full.model, not isinstance(model, nn.Module)
    return network_of(full, model, device), full.model, False


def _network_by_name(
    model: nn.Module | str | None,
    classes: int | None,
    size: int | None,
    options: Mapping[str, object],
    weights: Path | str | None,
    device: torch.device,
    seed: int,
) -> tuple[nn.Module, ModelSpec, bool]:
    """Return a network, what is known of it, and whether its weights had to be drawn."""
    if model is None:
        raise UsageError("neither a bundle nor a network is given", "name one with --model")
    name = model if isinstance(model, str) else None
    chosen = dict(options)
    if name is not None and is_own(name) and classes is not None:
        chosen["classes"] = classes
    spec = ModelSpec(name=name, classes=classes, options=chosen)
    entry = registry.entry(name) if name is not None and ":" not in name else None
    if entry is not None and size is not None:
        spec = replace(spec, input_shape=(3, size, size))
    network = bare_network(spec, model, seed)
    expected = entry or expected_of(network)
    pixels = size or (expected.size if expected else None)
    if pixels is None:
        raise UsageError(f"the input size of {model} is not known", "give it with --size")
    spec = replace(
        spec,
        input_shape=(channels_of(network), pixels, pixels),
        mean=expected.mean if expected else None,
        std=expected.std if expected else None,
    )
    if weights is not None:
        load_weights(network, weights)
    drawn = weights is None and isinstance(model, str)
    return network.to(device), spec, drawn


def _coarsest(dtypes: Collection[str]) -> torch.dtype:
    """Return the coarsest of the precisions in a bundle, float32 without any."""
    return next((kind for name, kind in _PRECISIONS.items() if name in dtypes), torch.float32)
