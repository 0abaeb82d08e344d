"""Stage ``reconstruct``: from label and features to the image."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gradleak.bundle import FEATURE, GRAD, IMAGE, LABEL, Bundle, StageRecord
from gradleak.calculus.fit import Fitted
from gradleak.calculus.record import PeeledMap
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError, InputError, UsageError
from gradleak.head import parameter_name, with_weights
from gradleak.models.training import drops_units
from gradleak.normalisation import normalise
from gradleak.progress import Progress
from gradleak.reconstruction.matching import MatchResult
from gradleak.reconstruction.mlp import check_mlp, images_of_features
from gradleak.reconstruction.options import MatchSettings
from gradleak.reconstruction.relabel import labels_of_images
from gradleak.reconstruction.resimulate import GradientResidual
from gradleak.stages.answers import Answer, Given, nearest, with_eight_bits
from gradleak.stages.attack import find_images, null_control, twice_differentiable
from gradleak.stages.feature import BundleLayers
from gradleak.stages.levels import between_levels
from gradleak.stages.network import head_feature, input_shape, network_of, normalisation_of
from gradleak.stages.unmixing import unmixed_by_levels

Verdict = Literal["unique", "ambiguous", "approximate"]
# Dtypes whose rounding, and noise that a walk met, from which 8-bit values are off.
_COARSE = {"BF16": "bfloat16", "F16": "float16"}
_NOISY = 5e-5
# Labels that the images lead to may differ by this much from those that led to the images.
_SAME_LABEL = 0.1
# Pictures that all lie on levels of 8 bits and miss the gradient by no more have nothing to gain.
_CLOSE = 1e-3
_UNMIXED = "set to levels of 8 bits, which tell how much of each other the samples had"
METHODS = ("auto", "mlp", "embedding", "peel", "fit", "match")


@dataclass(frozen=True)
class ImageOutcome:
    """The enriched ``bundle`` and the ``images`` (N, 3, H, W) float32 in [0, 1].

    ``verdict`` is ``approximate`` unless the gradient re-simulated from the finished image agrees
    with the given one to its own precision (``certificate``); then ``unique``, or ``ambiguous``
    where pixels have no part in the gradient, there are more values than equations, or the
    gradient is of half precision. ``maps`` are
    those that the walk recovered, from the head downwards, and ``barriers`` say what it did not get
    past; ``fitted`` and ``match`` tell how a fit and gradient matching went, where they were used.
    ``estimated`` is between which PSNRs (dB) an image is that is not exact, None if nothing tells.
    ``warning`` says why the gradient's precision cannot support an exact image, None if it can.
    ``control`` is the same attack's answer to noise, if it was asked for.
    """

    bundle: Bundle
    images: Tensor
    verdict: Verdict
    reason: str
    method: str
    certificate: GradientResidual
    maps: tuple[PeeledMap, ...]
    barriers: tuple[str, ...]
    fitted: Fitted | None
    match: MatchResult | None
    estimated: tuple[float, float] | None
    warning: str | None
    control: Answer | None
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
    control: bool = False,
    progress: Progress | None = None,
) -> ImageOutcome:
    """Reconstruct the image behind a gradient bundle whose label has been recovered.

    ``method`` ``mlp`` reads the image off the first Linear layer's feature (exact; where the
    features stop above it, ``auto`` goes on to the others); ``embedding``
    off the gradient of a transformer's position embedding (exact for one sample); ``peel`` walks
    down through the layers' gradients (exact where it gets through); ``fit`` fits the image to the
    lowest maps that the walk recovered; ``match`` optimises the image until its gradient matches;
    ``auto`` takes the first that applies. ``settings`` are those of the matching, and their time
    limit that of a fit. With ``control`` the attack is also run on noise gradients of the same
    norms and the same label and feature. ``progress`` is called with every step of what takes long.
    ``model`` is needed for a network that is not built in: the module itself, or ``module:factory``
    repeated by the user, since a bundle's word for it imports nothing. The image goes to
    ``image/reconstructed``, and labels that a batch's images made better to ``label/soft``.

    Raises :class:`IncompleteError` when an earlier stage's answer or the weights are missing,
    :class:`UsageError` for a method that does not apply.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"choose one of {', '.join(METHODS)}")
    where = resolve_device(device)
    if LABEL not in bundle:
        raise IncompleteError(f"the bundle holds no {LABEL}", "run gradleak recover-label first")
    full = with_weights(bundle, weights).plain_loss()
    labels = full.tensor(LABEL, where).double()
    spec = full.model
    if method == "mlp" and not spec.from_image:
        raise UsageError(
            "method 'mlp' needs a network whose first Linear layer reads the image",
            "use --method match",
        )
    start = time.perf_counter()
    chosen, sought = settings or MatchSettings(), None
    answer = _from_features(full, labels, method, where)
    if answer is None:
        sought = _given(full, model, labels, where)
        with twice_differentiable():
            answer = find_images(method, sought, chosen, seed, progress)
    seconds = time.perf_counter() - start
    certificate, match = answer.certificate, answer.match
    sought = sought or (_given(full, model, labels, where) if control else None)
    coarse = _coarse(full)
    verdict, reason = _judge(answer, sought, coarse)
    reason = "; ".join([reason, *answer.after])
    noise = None
    if control:
        assert sought is not None
        likewise = "auto" if method == "mlp" else method
        with twice_differentiable():
            noise = null_control(likewise, sought, chosen, seed, progress)
    found = {IMAGE: answer.images.cpu()}
    if answer.labels is not None:
        found[LABEL] = answer.labels.cpu()
        reason += f"; labels refined by up to {float((answer.labels - labels).abs().max()):.0e}"
    record = StageRecord(
        "reconstruct",
        {"method": answer.method, "matching": None if match is None else asdict(match.options)},
        seed=seed,
        device=str(where),
        seconds=seconds,
        verdict=verdict,
    )
    return ImageOutcome(
        bundle=bundle.extended(found, record=record),
        images=answer.images,
        verdict=verdict,
        reason=reason,
        method=answer.method,
        certificate=certificate,
        maps=() if answer.walk is None else tuple(answer.walk.maps),
        barriers=() if answer.walk is None else tuple(map(str, answer.walk.barriers)),
        fitted=answer.fitted,
        match=match,
        estimated=None if certificate.exact else answer.estimated,
        warning=_dropout_warning(full, sought) or _precision_warning(coarse, answer),
        control=noise,
        device=str(where),
        seconds=seconds,
    )


def _judge(answer: Answer, given: Given | None, coarse: str | None) -> tuple[Verdict, str]:
    """Judge by the certificate, and by whether other images would have passed it as well.

    ``given`` is None for an image that was read off a feature, which has all of it; ``coarse`` is
    the dtype of gradients whose rounding hides 8-bit values.
    """
    certificate = answer.certificate
    if not certificate.exact:
        return "approximate", (
            f"not exact: the finished image's gradient misses the given one by "
            f"{certificate.relative:.1e}, its precision is {certificate.precision:.1e}"
        )
    if given is not None and answer.method != "mlp":
        pixels = answer.images[:, 0].numel()
        lacking = answer.missing(sum(gradient.numel() for gradient in given.gradients.values()))
        free = 0 if lacking else given.without_part(answer.images)
        if lacking:
            return "ambiguous", (
                f"one of many: {answer.images.numel()} values had "
                f"{answer.images.numel() - lacking} equations to meet"
            )
        if free:
            return "ambiguous", f"one of many: {free} of {pixels} pixels are not in the gradient"
    unsettled = between_levels(answer.images) if answer.after else 0
    if unsettled:
        return "ambiguous", (
            f"one of many: {unsettled} of {answer.images.numel()} values lie between the levels of "
            "8 bits on which the others lie"
        )
    if coarse is not None:
        return "ambiguous", (
            f"one of many: it meets the gradient to {coarse}'s rounding, and so may images with "
            "other 8-bit values"
        )
    return "unique", "exact: the finished image's own gradient is the given one to its precision"


def _coarse(bundle: Bundle) -> str | None:
    """Return the dtype of gradients that are too coarse to tell 8-bit values apart, None if none.

    Their rounding moves pixels by more than an 8-bit step (docs/results/images_noise.md).
    """
    found = {bundle.info(GRAD + name).dtype for name in bundle.names(GRAD)}
    return next((name for dtype, name in _COARSE.items() if dtype in found), None)


def _dropout_warning(bundle: Bundle, given: Given | None) -> str | None:
    """Say that units were dropped of which nobody knows which."""
    if given is None or bundle.metadata.get("mode") != "train" or not drops_units(given.network):
        return None
    return "the gradient is of train mode with dropout, whose masks cannot be known or repeated"


def _precision_warning(coarse: str | None, answer: Answer) -> str | None:
    """Say that the gradient is too coarse, or too noisy, for an image that is exact."""
    if coarse is not None:
        return f"the gradient is of {coarse}, which cannot support an exact image"
    noise = 0.0 if answer.walk is None else answer.walk.usual
    if noise <= _NOISY:
        return None
    return (
        f"the layers' own equations leave {noise:.0e} of the gradient: noise of that size cannot "
        "support an exact image"
    )


def _given(
    bundle: Bundle, model: nn.Module | str | None, labels: Tensor, device: torch.device
) -> Given:
    """Gather what the attacks on a whole network take."""
    spec = bundle.model
    return Given(
        network=network_of(bundle, model, device),
        gradients=bundle.tensors(GRAD, device),
        labels=labels,
        feature=head_feature(bundle, device),
        shape=input_shape(spec),
        normalisation=normalisation_of(spec),
        head=spec.head,
    )


def _from_features(
    bundle: Bundle, labels: Tensor, method: str, device: torch.device
) -> Answer | None:
    """Read the images off the first layer's features, None where another method is to find them.

    One sample's are as they are, unless the features stop above. Those of a batch that are not
    exact can be refined, by the way that ``auto`` goes on.
    """
    one = len(labels) == 1
    if not bundle.model.from_image or method not in ("auto", "mlp"):
        return None
    if method == "mlp" or (one and not _stopped_above(bundle)):
        return _read_off(bundle, labels, device)
    if one:
        return None
    try:
        answer = _read_off(bundle, labels, device)
    except IncompleteError:
        return None
    settled = with_eight_bits(answer.images) is not None
    close = settled and answer.certificate.relative <= _CLOSE
    return answer if answer.certificate.exact or close else None


def _stopped_above(bundle: Bundle) -> bool:
    """Return whether features were recovered, and not down to the first layer's."""
    layers = bundle.model.layers
    held = [FEATURE + layer.name in bundle for layer in layers]
    return bool(held) and held[-1] and not held[0]


def _read_off(bundle: Bundle, labels: Tensor, device: torch.device) -> Answer:
    """Read the images off the first layer's features, and certify them along the chain.

    Images of a batch that all but have 8 bits are tried with exactly those: an error of the labels
    has passed to them, which they are rid of then, and from them the labels are.
    """
    spec = bundle.model
    first = spec.layers[0].name
    if FEATURE + first not in bundle:
        raise IncompleteError(
            f"the bundle holds no {FEATURE}{first}", "run gradleak recover-feature first"
        )
    mean, std = normalisation_of(spec)
    features = bundle.tensor(FEATURE + first, device).double()
    shape = input_shape(spec)
    if tuple(features.shape) != (len(labels), math.prod(shape)):
        raise InputError(
            f"{FEATURE}{first} has shape {list(features.shape)} for {len(labels)} images of "
            f"{list(shape)}",
            "recover label and feature from this bundle",
        )
    head = GRAD + parameter_name(spec.layers[-1].name, "weight")
    if head in bundle and labels.shape[1] != bundle.info(head).shape[0]:
        raise InputError(
            f"{LABEL} has shape {list(labels.shape)} for a head of {bundle.info(head).shape[0]} "
            "classes",
            "run gradleak recover-label on this bundle",
        )
    read = BundleLayers(bundle, device)

    def certify(images: Tensor) -> GradientResidual:
        return check_mlp(spec.layers, read, images, labels, mean, std)

    images = images_of_features(features, shape, mean, std)
    rounded, after = None, tuple[str, ...]()
    if len(labels) > 1:
        pixels = features.reshape(-1, *shape)
        rounded = with_eight_bits(images)
        if rounded is None:
            rounded = unmixed_by_levels(pixels, labels, (mean, std))
            after = (_UNMIXED,)
    if rounded is None:
        answer = Answer("mlp", images.float(), certify(images.float()))
    else:
        answer = Answer("mlp", rounded, certify(rounded), after=after)
        if not answer.certificate.exact:
            inputs = normalise(rounded.double(), mean, std).flatten(1)
            better = labels_of_images(spec.layers, read, inputs, labels)
            again = check_mlp(spec.layers, read, rounded, better, mean, std)
            if again.exact and float((better - labels).abs().max()) <= _SAME_LABEL:
                answer = Answer("mlp", rounded, again, labels=better, after=after)
            elif answer.certificate.relative > _CLOSE:
                answer = nearest("mlp", images, certify)
    if not math.isfinite(answer.certificate.relative + answer.certificate.precision):
        for layer in spec.layers:  # a NaN or an infinity somewhere: name it
            read.check(layer.name)
    return answer
