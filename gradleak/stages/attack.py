"""The ways from a gradient to its images: walking down, fitting what is left, matching."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.calculus.added import image_below_added
from gradleak.calculus.fit import fit_image
from gradleak.calculus.prior import smoothest_image
from gradleak.calculus.remaining import RemainingNetwork
from gradleak.calculus.trace import trace
from gradleak.calculus.walk import Walk, walk_down
from gradleak.errors import IncompleteError, UsageError
from gradleak.progress import Progress, Step
from gradleak.reconstruction.matching import match_gradients
from gradleak.reconstruction.options import MatchSettings
from gradleak.stages.answers import Answer, Given
from gradleak.stages.contrast import is_blind_to_contrast, with_contrast
from gradleak.stages.levels import with_levels
from gradleak.stages.refining import noise_of, refined

# An image whose gradient misses the given one by more is worth a try of matching.
_FAR = 1e-2
# One that meets noisy maps is as good as they are: kinks that fall otherwise leave so much.
_MET = 0.1
# One whose gradient misses the given one by less is where matching begins.
_HALFWAY = 0.8
_NAMES = {"embedding": "the position embedding", "peel": "the walk", "fit": "the fit"}
# A fit whose gradient misses more, and more than noise explains, is one of many, or a wrong one.
_UNEXPLAINED = 1e-3
_MORE_THAN_NOISE = 1.5
# An answer is finished where its gradient leaves as many times the noise that the maps show.
_AS_NOISY = 4.0
# Share of the time limit that it has in any case.
_REFINING_SHARE = 0.25
# The errors of a walked image are right within this many dB (benchmarks/images.py, noise).
_MARGIN = 5.0


def twice_differentiable() -> contextlib.AbstractContextManager[None]:
    """Let attention run in plain operations: its fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def find_images(
    method: str,
    given: Given,
    settings: MatchSettings,
    seed: int,
    progress: Progress | None,
) -> Answer:
    """Walk down as far as that goes, fit the rest, and match gradients where that fails too."""
    answers = []
    if method in ("auto", "embedding"):
        try:
            answers.append(_by_embedding(given))
        except (IncompleteError, UsageError):
            if method == "embedding":
                raise
    if answers and (method == "embedding" or answers[0].certificate.exact):
        return answers[0]
    if method != "match":
        try:
            answers.append(_by_walk(method, given, settings, seed, progress))
        except (IncompleteError, UsageError):  # a network that cannot be traced can be matched
            if method != "auto":
                raise
    if method in ("auto", "match") and not any(_is_near(answer, given) for answer in answers):
        begun = min(answers, key=_distance, default=None)
        if begun is not None and not _distance(begun) < _HALFWAY:
            begun = None
        answers.append(_by_matching(given, settings, begun, seed, progress))
    return min(answers, key=_distance)


def _distance(answer: Answer) -> float:
    return answer.certificate.relative


def _is_near(answer: Answer, given: Given) -> bool:
    """Return whether an answer's gradient is near enough, or as near as noise lets it be."""
    noise = noise_of(answer, given) or 0.0
    return _meets_its_maps(answer) or _distance(answer) <= max(_FAR, _MORE_THAN_NOISE * noise)


def _meets_its_maps(answer: Answer) -> bool:
    """Return whether a walk or a fit is as good as the errors of its maps let it be."""
    met = answer.walk is not None if answer.fitted is None else answer.fitted.met
    return met and _distance(answer) <= _MET


def _by_embedding(given: Given) -> Answer:
    """Read the image off the gradient of an added position embedding and the projection below."""
    example = torch.zeros(len(given.labels), *given.shape, device=given.labels.device)
    steps = trace(given.network, example)
    found = image_below_added(steps, given.network.state_dict(), given.gradients)
    if found is None:
        raise IncompleteError(
            "the image cannot be read off a position embedding: the gradient is not of one sample "
            "whose separate patches a parameter of their own shape is added to",
            "use --method auto",
        )
    return replace(given.answer("embedding", found.image), added=found)


def _by_walk(
    method: str, given: Given, settings: MatchSettings, seed: int, progress: Progress | None
) -> Answer:
    """Recover the images layer by layer, and fit them to the lowest maps where that stops."""
    if given.feature is None:
        raise IncompleteError("the head's input is not known", "run gradleak recover-feature first")
    samples = len(given.labels)
    example = torch.zeros(samples, *given.shape, device=given.labels.device)
    limit = math.inf if settings.time_limit is None else settings.time_limit
    start = time.monotonic()
    walk = walk_down(
        given.network,
        example,
        given.gradients,
        given.labels,
        given.feature,
        thorough=False,
        patience=limit,
        progress=progress,
    )
    if walk.image is not None and method != "fit":
        answer = replace(
            given.answer("peel", walk.image), walk=walk, estimated=_estimated(walk, given)
        )
        answer = refined(answer, given, _rest(limit, start), seed, progress)
        if answer.certificate.relative > _FAR and not _meets_its_maps(answer):
            return answer
        return with_levels(answer, given, seconds=_rest(limit, start), seed=seed)
    if method == "peel":
        raise IncompleteError(
            f"the image is out of reach by peeling: {walk.barriers[0]}",
            "use --method fit, or --method match",
        )
    dice = torch.Generator(device=given.labels.device).manual_seed(seed)
    rough = walk.guessed
    fitted = fit_image(
        walk,
        given.smooth_start(dice) if rough is None else rough,
        seconds=limit,
        generator=dice,
        bounds=given.bounds(),
        near=rough is not None,
        accepted=given.is_read,
        progress=progress,
    )
    images = [image for image in (fitted.image, rough, *fitted.smoother) if image is not None]
    found = [replace(given.answer("fit", x), walk=walk, fitted=fitted) for x in images]
    best = min(found, key=_distance)
    explained = max(_UNEXPLAINED, _AS_NOISY * walk.usual)
    if _distance(best) > explained and not _meets_its_maps(best):
        # Where many fit, or none was found, the smoothest is the likeliest; its gradient judges.
        smooth = smoothest_image(
            RemainingNetwork(walk),
            given.smooth_start(dice),
            given.bounds(),
            seconds=_rest(limit, start),
            generator=dice,
            progress=progress,
        )
        smoothest = replace(given.answer("fit", smooth), walk=walk, fitted=fitted)
        best = min(best, smoothest, key=_distance)
    best = refined(best, given, _rest(limit, start), seed, progress)
    if is_blind_to_contrast(given.network) and best.certificate.relative <= _FAR:
        best = with_contrast(best, given, _refined_by(seed, progress), seconds=limit)
    return best


def _refined_by(seed: int, progress: Progress | None) -> Callable[[Answer, Given, float], Answer]:
    return lambda answer, given, seconds: refined(answer, given, seconds, seed, progress)


def _rest(limit: float, start: float) -> float:
    """Return the seconds that refining may take, of a search that began at ``start``."""
    return max(limit - (time.monotonic() - start), _REFINING_SHARE * limit)


def _estimated(walk: Walk, given: Given) -> tuple[float, float] | None:
    """Return the PSNRs (dB) that the errors of a walked image stand for."""
    found = walk.recovered(0)
    if found is None or not bool(found.std.isfinite().all()):
        return None
    _, spread = given.normalisation
    error = found.std * found.std.new_tensor(list(spread)).view(1, -1, 1, 1)
    middle = -10.0 * math.log10(max(float(error.square().mean()), 1e-300))
    return middle - _MARGIN, middle + _MARGIN


def _by_matching(
    given: Given,
    settings: MatchSettings,
    begun: Answer | None,
    seed: int,
    progress: Progress | None,
) -> Answer:
    """Match gradients, from the images of an answer that is halfway there if there is one."""
    mean, std = given.normalisation

    def note(done: int, total: int, objective: float) -> None:
        if progress is not None:
            progress(Step("matching gradients", done, total, objective))

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
        start=None if begun is None else begun.images,
        generator=torch.Generator(device=given.labels.device).manual_seed(seed),
        progress=note,
    )
    found = Answer("match", match.images, given.certify(match.images), match=match)
    if begun is None:
        return found
    return replace(found, after=(f"begun at what {_NAMES[begun.method]} found",))


def null_control(
    method: str, given: Given, settings: MatchSettings, seed: int, progress: Progress | None
) -> Answer:
    """Run the attack on noise: gradients of the same norms, tensor by tensor, and the same label.

    What the picture shows then, it does not have from the gradient. Grey is the answer where the
    attack has none.
    """
    dice = torch.Generator().manual_seed(seed)
    noise = {}
    for name, gradient in given.gradients.items():
        drawn = torch.randn(gradient.shape, generator=dice, dtype=torch.float64)
        size = torch.linalg.vector_norm(gradient.double()) / drawn.norm()
        noise[name] = (drawn.to(gradient.device) * size).to(gradient.dtype)
    blind = replace(given, gradients=noise)
    try:
        return find_images(method, blind, settings, seed, progress)
    except IncompleteError:
        grey = torch.full((len(given.labels), *given.shape), 0.5, device=given.labels.device)
        return Answer("none", grey, blind.certify(grey))
