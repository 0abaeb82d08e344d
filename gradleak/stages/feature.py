"""Stage ``recover-feature``: from the label to the inputs of the Linear layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from gradleak.bundle import (
    FEATURE,
    GRAD,
    LABEL,
    PARAM,
    WEIGHT_DECAY,
    Bundle,
    StageRecord,
    check_finite,
)
from gradleak.calculus.chain import trace_of_chain
from gradleak.calculus.walk import walk_from
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError, InputError
from gradleak.features import PeeledLayer, Peeling, peel_linear_layers
from gradleak.head import (
    Head,
    find_head,
    linear_gradients,
    parameter_name,
    read_head,
    with_weights,
)
from gradleak.labels.batch.features import features_of_labels
from gradleak.labels.bias import scale_from_bias
from gradleak.labels.factorise import Rank, RankOne, as_one_sample, leading_triple, rank_of
from gradleak.labels.known import label_residual, scale_of_label
from gradleak.labels.options import LabelOptions
from gradleak.labels.single import scale_problem
from gradleak.labels.verdict import Verdict
from gradleak.models.spec import LinearLayer
from gradleak.softlabels import FAMILIES

_KINDS = ("weight", "bias")
# The label may miss the gradient by this much, relative, before the two do not belong together.
_CONSISTENT = 1e-2


@dataclass(frozen=True)
class FeatureOutcome:
    """The enriched ``bundle`` and the peeled ``layers``, from the head downwards.

    ``batch_size`` is the number N of samples behind the gradient, of which an incomplete label has
    fewer; ``residual`` is that of the head's gradient; ``stopped`` says why lower Linear layers, if
    there are any, were not reached.
    """

    bundle: Bundle
    verdict: Verdict
    reason: str
    method: str
    batch_size: int
    layers: tuple[PeeledLayer, ...]
    stopped: str | None
    residual: float
    device: str
    seconds: float


def recover_feature(
    bundle: Bundle,
    *,
    head: str | None = None,
    weights: Path | str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> FeatureOutcome:
    """Recover the head's input features, and by peeling those of every Linear layer below it.

    Needs ``label/soft`` from ``recover-label``. Features go to ``feature/<layer>`` (N, D) float64,
    row by row those of the labels. ``progress`` is
    called with each layer's name. Raises :class:`IncompleteError` without a label or where its
    sample is not found, :class:`InputError` for labels that do not belong to the gradient.
    """
    where = resolve_device(device)
    if LABEL not in bundle:
        raise IncompleteError(f"the bundle holds no {LABEL}", "run gradleak recover-label first")
    given = bundle
    if WEIGHT_DECAY in bundle:
        bundle = with_weights(bundle, weights)
    bundle = bundle.plain_loss()
    label = bundle.tensor(LABEL, where).double()
    name = head if head is not None else find_head(bundle)
    layers = _chain(bundle, name)
    names = tuple(parameter_name(x.name, kind) for x in layers for kind in ("weight", "bias"))
    bundle_with_weights = with_weights(bundle, weights, names)
    layer = read_head(bundle_with_weights, name=name, device=where)
    if label.dim() != 2 or label.shape[1] != layer.grad_weight.shape[0]:
        raise InputError(
            f"{LABEL} has shape {list(label.shape)} for a head of {layer.grad_weight.shape[0]} "
            "classes",
            "run gradleak recover-label on this bundle",
        )
    start = time.perf_counter()
    options = _options(bundle)
    leading, rank = _factorise(layer, options)
    read = BundleLayers(bundle_with_weights, where)
    if rank.rank == 1 == options.samples(1) and len(label) == 1:
        samples = 1
        feature, delta, method = _head_feature(layer, label[0], leading, rank)
        peeling = peel_linear_layers(layers, read, feature, delta, progress)
        # NaN or infinity in a gradient cannot but reach the feature, or end the peeling.
        if peeling.stopped or not all(bool(p.features.isfinite().all()) for p in peeling.layers):
            for linear in layers:
                read.check(linear.name)
    else:
        before = FEATURE + layer.name
        known = bundle.tensor(before, where).double() if before in bundle else None
        samples, peeling, method = _batch_features(layer, label, known, rank, options, layers, read)
    seconds = time.perf_counter() - start
    verdict, reason = _verdict(bundle, peeling, len(layers))
    record = StageRecord(
        "recover-feature",
        {"head": layer.name},
        seed=seed,
        device=str(where),
        seconds=seconds,
        verdict=verdict,
    )
    found = {FEATURE + peeled.name: peeled.features for peeled in peeling.layers}
    return FeatureOutcome(
        bundle=given.extended(found, record=record),
        verdict=verdict,
        reason=reason,
        method=method,
        batch_size=samples,
        layers=peeling.layers,
        stopped=peeling.stopped or _unreached(bundle, layers),
        residual=peeling.layers[0].residual,
        device=str(where),
        seconds=seconds,
    )


def _options(bundle: Bundle) -> LabelOptions:
    """Return the options that the labels were recovered with, as far as the bundle records them."""
    stages = [stage for stage in bundle.stages if stage.get("stage") == "recover-label"]
    stage = stages[-1] if stages else {}
    given, seed = stage.get("arguments"), stage.get("seed")
    arguments = given if isinstance(given, dict) else {}
    named = tuple(family for family in FAMILIES if family.name == arguments.get("family"))
    size = arguments.get("batch_size")
    return LabelOptions(
        families=named or FAMILIES,
        method="scale" if arguments.get("method") == "scale" else "auto",
        batch_size=size if isinstance(size, int) and size > 0 else None,
        recorded_size=bundle.batch_size,
        seed=seed if isinstance(seed, int) else 0,
    )


def _factorise(head: Head, options: LabelOptions) -> tuple[RankOne, Rank]:
    """Return the leading triple of the head's gradient and its rank, which is 1 or more."""
    leading = leading_triple(head.grad_weight[None])
    if float(leading.sigma) == 0.0:
        raise IncompleteError("the head gradient is exactly zero", "it determines no feature")
    rank = rank_of(head.grad_weight[None], leading)
    if options.batch_size == 1:
        rank = as_one_sample(rank, leading, 0)
    if rank.rank == 0:
        raise IncompleteError(
            f"no singular value of the head gradient rises above its noise (std {rank.noise:.2g})",
            "it determines no feature",
        )
    return leading, rank


def _head_feature(
    head: Head, label: Tensor, leading: RankOne, rank: Rank
) -> tuple[Tensor, Tensor, str]:
    """Return one sample's input (D,) of the head, its delta (C,), and how the scale was found."""
    noise = rank.noise if rank.noisy else 0.0
    problem = scale_problem(leading, head.weight, head.bias, noise=noise)
    if head.grad_bias is not None and not rank.noisy:
        scale, method = float(scale_from_bias(leading, head.grad_bias)), "bias"
        residual = label_residual(problem, label, scale)
    else:
        with torch.inference_mode():  # of hundreds of small operations, bookkeeping is a fifth
            known = scale_of_label(problem, label)
        scale, residual, method = known.scale, known.residual, "label"
    if residual > _CONSISTENT and not rank.noisy:
        raise InputError(
            f"the label misses the head gradient by {residual:.1%}",
            "recover the label from this bundle, or give the weights of this gradient",
        )
    feature = scale * leading.v[0]
    delta = leading.sigma / scale * leading.u[0]
    return feature, delta, method


def _batch_features(
    head: Head,
    labels: Tensor,
    known: Tensor | None,
    rank: Rank,
    options: LabelOptions,
    layers: tuple[LinearLayer, ...],
    read: BundleLayers,
) -> tuple[int, Peeling, str]:
    """Return the number of samples behind a batch's gradient, the layers' inputs, and how found.

    ``known`` are the head's inputs as the bundle has them, which go if they fit.
    """
    found = features_of_labels(
        head.grad_weight,
        head.weight,
        labels,
        rank=rank,
        bias=head.bias,
        grad_bias=head.grad_bias,
        options=options,
        found_with=known,
    )
    peeled = PeeledLayer(head.name, found.features, found.residual)
    if len(layers) == 1:
        return found.samples, Peeling((peeled,), None), found.method
    if len(labels) < found.samples:
        short = f"{layers[-2].name}: samples are missing"
        return found.samples, Peeling((peeled,), short), found.method
    below = _below(layers, read, labels, found.features)
    return found.samples, Peeling((peeled, *below.layers), below.stopped), found.method


def _below(
    layers: tuple[LinearLayer, ...], read: BundleLayers, labels: Tensor, features: Tensor
) -> Peeling:
    """Recover the inputs (N, in) of all layers below the head from those of the head."""
    names = [parameter_name(x.name, "weight") for x in layers]
    state = {parameter_name(x.name, k): read.parameter(x.name, k) for x in layers for k in _KINDS}
    given = {name: tensor for name, tensor in state.items() if tensor is not None}
    for layer, name in zip(layers, names, strict=True):
        if name not in given:
            return Peeling((), f"{layer.name}: no weight of it")
    own = {name: read.gradient(x.name) for x, name in zip(layers, names, strict=True)}
    gradients = {name: tensor for name, tensor in own.items() if tensor is not None}
    steps = trace_of_chain(layers, given, len(labels))
    walk = walk_from(steps, given, gradients, labels, features)
    peeled = tuple(
        PeeledLayer(found.names[0], found.estimate.value, found.residual) for found in walk.maps
    )
    return Peeling(peeled, str(walk.barriers[0]) if walk.barriers else None)


def _chain(bundle: Bundle, head: str) -> tuple[LinearLayer, ...]:
    """Return the Linear layers that end with ``head``; it alone if the metadata knows no more."""
    layers = bundle.model.layers
    if layers and layers[-1].name == head:
        return layers
    return (LinearLayer(head),)


class BundleLayers:
    """Reads the Linear layers of a bundle onto a device, each tensor when it is needed.

    The tensors are not searched for NaN: that would be one more pass over each. Whoever finds one
    in a result calls ``check``.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        """Read from ``bundle`` onto ``device``."""
        self._bundle, self._device = bundle, device

    def gradient(self, layer: str, kind: str = "weight") -> Tensor | None:
        """Return the gradient of the layer's ``kind``, or None."""
        return self._read(GRAD, layer, kind)

    def parameter(self, layer: str, kind: str = "weight") -> Tensor | None:
        """Return the layer's ``kind``, or None."""
        return self._read(PARAM, layer, kind)

    def check(self, layer: str) -> None:
        """Raise :class:`InputError` naming the tensor of the layer that holds NaN or infinity."""
        for prefix in (GRAD, PARAM):
            for kind in ("weight", "bias"):
                tensor = self._read(prefix, layer, kind)
                if tensor is not None:
                    check_finite(prefix + parameter_name(layer, kind), tensor)

    def _read(self, prefix: str, layer: str, kind: str) -> Tensor | None:
        name = prefix + parameter_name(layer, kind)
        return self._bundle.unchecked(name, self._device) if name in self._bundle else None


def _unreached(bundle: Bundle, layers: tuple[LinearLayer, ...]) -> str | None:
    """Say which Linear layers have a gradient in the bundle and no known way to them."""
    names = {layer.name for layer in layers}
    others = [name for name in linear_gradients(bundle) if name not in names]
    if not others:
        return None
    listed = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    return f"{len(others)} more Linear layers ({listed}) lie behind other than known activations"


def _verdict(bundle: Bundle, peeling: Peeling, layers: int) -> tuple[Verdict, str]:
    """Judge by the label's own verdict, and by whether every Linear layer was reached."""
    labels = [stage for stage in bundle.stages if stage.get("stage") == "recover-label"]
    said = labels[-1].get("verdict") if labels else "unique"
    for verdict in get_args(Verdict):
        if said == verdict != "unique":
            return verdict, f"the label they rest on is {verdict}"
    if peeling.stopped is not None:
        reached = len(peeling.layers)
        return "failed", f"{reached} of {layers} Linear layers were reached ({peeling.stopped})"
    worst = max(peeling.layers, key=lambda peeled: peeled.residual)
    if worst.residual > _CONSISTENT:
        return "failed", (
            f"the gradient of {worst.name} misses δxᵀ by {worst.residual:.1%}: noise, or more "
            "samples than there are labels"
        )
    return "unique", f"largest residual {worst.residual:.1e}, in {worst.name}"
