"""Stage ``reconstruct``: from label and features to the image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gradleak.bundle import FEATURE, GRAD, IMAGE, LABEL, Bundle, StageRecord
from gradleak.calculus.fit import fit_image
from gradleak.calculus.walk import walk_down
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError, InputError, UsageError
from gradleak.head import parameter_name, with_weights
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.matching import MatchResult, match_gradients
from gradleak.reconstruction.mlp import check_mlp, image_of_feature
from gradleak.reconstruction.options import MatchSettings
from gradleak.reconstruction.resimulate import GradientResidual, check_reconstruction
from gradleak.stages.feature import BundleLayers
from gradleak.stages.network import head_feature, input_shape, network_of, normalisation_of

Verdict = Literal["unique", "approximate"]
METHODS = ("auto", "mlp", "peel", "fit", "match")
# An image whose gradient misses the given one by more is worth a try of matching.
_FAR = 1e-2
# Levels of an 8-bit picture, and how far from one a pixel may be to count as being there.
_LEVELS, _OFF_LEVEL = 255.0, 0.3
# The picture that a fit starts from: so many smooth blots a side, of this mean and spread.
_START_GRID, _START_GREY, _START_SPREAD = 4, 0.5, 0.15


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

    ``method`` ``mlp`` reads the image off the first Linear layer's feature (exact); ``peel`` walks
    down through the layers' gradients (exact where it gets through); ``fit`` fits the image to the
    lowest maps that the walk recovered; ``match`` optimises the image until its gradient matches;
    ``auto`` takes the first that applies. ``settings`` are those of the matching, and their time
    limit that of a fit.
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
    if spec.from_image and len(labels) == 1 and method in ("auto", "mlp"):
        answer = _from_features(full, labels, where)
    else:
        given = _Given(
            network=network_of(full, model, where),
            gradients=full.tensors(GRAD, where),
            labels=labels,
            feature=head_feature(full, where),
            shape=input_shape(spec),
            normalisation=normalisation_of(spec),
            head=spec.head,
        )
        answer = _by_walk_or_matching(method, given, settings or MatchSettings(), seed, progress)
    seconds = time.perf_counter() - start
    certificate, match = answer.certificate, answer.match
    verdict: Verdict = "unique" if certificate.exact else "approximate"
    reason = (
        "exact: the finished image's own gradient is the given one to its precision"
        if certificate.exact
        else f"not exact: the finished image's gradient misses the given one by "
        f"{certificate.relative:.1e}, its precision is {certificate.precision:.1e}"
    )
    record = StageRecord(
        "reconstruct",
        {"method": answer.method, "matching": None if match is None else asdict(match.options)},
        seed=seed,
        device=str(where),
        seconds=seconds,
        verdict=verdict,
    )
    return ImageOutcome(
        bundle=bundle.extended({IMAGE: answer.images.cpu()}, record=record),
        images=answer.images,
        verdict=verdict,
        reason=reason,
        method=answer.method,
        certificate=certificate,
        match=match,
        device=str(where),
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Answer:
    """Images (N, 3, H, W) by one method, with their certificate."""

    method: str
    images: Tensor
    certificate: GradientResidual
    match: MatchResult | None = None


@dataclass(frozen=True)
class _Given:
    """What is known of a gradient: its network, and what the earlier stages recovered."""

    network: nn.Module
    gradients: Mapping[str, Tensor]
    labels: Tensor
    feature: Tensor | None
    shape: tuple[int, int, int]
    normalisation: tuple[Sequence[float], Sequence[float]]
    head: str | None

    def certify(self, images: Tensor) -> GradientResidual:
        """Compare the images' own gradient with the given one."""
        mean, std = self.normalisation
        return check_reconstruction(self.network, self.gradients, images, self.labels, mean, std)

    def answer(self, method: str, inputs: Tensor) -> _Answer:
        """Make an answer of what the network takes, ``inputs`` (N, C, H, W).

        Most pictures have 8 bits. Where these all but have, they are tried with exactly those, and
        the gradient decides.
        """
        images = denormalise(inputs, *self.normalisation).clamp(0.0, 1.0)
        answer = _Answer(method, images.float(), self.certify(images.float()))
        levels = images * _LEVELS
        if float((levels - levels.round()).abs().max()) > _OFF_LEVEL:
            return answer
        rounded = (levels.round() / _LEVELS).float()
        snapped = _Answer(method, rounded, self.certify(rounded))
        return min(answer, snapped, key=lambda tried: tried.certificate.relative)

    def smooth_start(self, dice: torch.Generator) -> Tensor:
        """Return smooth random inputs (N, C, H, W): at plain grey all kinks of ReLUs meet."""
        size = (len(self.labels), self.shape[0], _START_GRID, _START_GRID)
        coarse = _START_GREY + _START_SPREAD * torch.randn(size, generator=dice, device=dice.device)
        pictures = interpolate(coarse, size=self.shape[1:], mode="bicubic", align_corners=False)
        return normalise(pictures, *self.normalisation)


def _by_walk_or_matching(
    method: str,
    given: _Given,
    settings: MatchSettings,
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> _Answer:
    """Walk down as far as that goes, fit the rest, and match gradients where that fails too."""
    answers = []
    if method != "match":
        try:
            answers.append(_by_walk(method, given, settings, seed))
        except IncompleteError:
            if method != "auto":
                raise
    near = any(answer.certificate.relative <= _FAR for answer in answers)
    if method in ("auto", "match") and not near:
        answers.append(_by_matching(given, settings, seed, progress))
    return min(answers, key=lambda answer: answer.certificate.relative)


def _by_walk(method: str, given: _Given, settings: MatchSettings, seed: int) -> _Answer:
    """Recover the images layer by layer, and fit them to the lowest maps where that stops."""
    if given.feature is None:
        raise IncompleteError("the head's input is not known", "run gradleak recover-feature first")
    samples = len(given.labels)
    example = torch.zeros(samples, *given.shape, device=given.labels.device)
    limit = math.inf if settings.time_limit is None else settings.time_limit
    walk = walk_down(
        given.network,
        example,
        given.gradients,
        given.labels,
        given.feature,
        thorough=False,
        patience=limit,
    )
    if walk.image is not None and method != "fit":
        return given.answer("peel", walk.image)
    if method == "peel":
        raise IncompleteError(
            f"the image is out of reach by peeling: {walk.barriers[0]}",
            "use --method fit, or --method match",
        )
    dice = torch.Generator(device=given.labels.device).manual_seed(seed)
    rough = walk.guessed
    start = given.smooth_start(dice) if rough is None else rough
    fitted = fit_image(walk, start, seconds=limit, generator=dice, near=rough is not None)
    answers = [given.answer("fit", image) for image in (fitted.image, rough) if image is not None]
    return min(answers, key=lambda answer: answer.certificate.relative)


def _by_matching(
    given: _Given,
    settings: MatchSettings,
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> _Answer:
    mean, std = given.normalisation
    match = match_gradients(
        given.network,
        given.gradients,
        given.labels,
        shape=given.shape,
        mean=mean,
        std=std,
        head=given.head,
        features=given.feature,
        options=settings.options(given.network, given.shape),
        generator=torch.Generator(device=given.labels.device).manual_seed(seed),
        progress=progress,
    )
    return _Answer("match", match.images, given.certify(match.images), match)


def _from_features(bundle: Bundle, labels: Tensor, device: torch.device) -> _Answer:
    """Read the image off the first layer's feature, and certify it along the chain."""
    spec = bundle.model
    first = spec.layers[0].name
    if FEATURE + first not in bundle:
        raise IncompleteError(
            f"the bundle holds no {FEATURE}{first}", "run gradleak recover-feature first"
        )
    mean, std = normalisation_of(spec)
    feature = bundle.tensor(FEATURE + first, device).double()
    shape = input_shape(spec)
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
    return _Answer("mlp", image, certificate)
