"""The contrast of pictures whose network normalised them by their own statistics.

A convolution under BatchNorm with batch statistics gives the same output and the same gradient for
an image and any multiple of it, but for BatchNorm's ε: with the image grows the variance that ε is
added to. So a fit ends at some multiple, and what its gradient misses is the trace of ε. That is
linear in z = 1/a² for an image a times too bright, zero at the true one: two multiples tell where.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.normalisation import normalise
from gradleak.stages.answers import Answer, Given

# The multiples tried first, of the largest that stays within black and white.
_FIRST = (1.0, 0.8)
_ROUNDS = 4
# Refining that goes on: so many times at most, while what is missed shrinks by this factor.
_AGAIN, _WORTH = 3, 0.9


@dataclass(frozen=True)
class Trial:
    """Inputs (N, C, H, W) of z = 1/a², a the multiple of what was begun with, and their misfit."""

    z: float
    misfit: float
    inputs: Tensor


def is_blind_to_contrast(model: nn.Module) -> bool:
    """Return whether some BatchNorm of the network normalises by the batch."""
    return any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


def with_contrast(
    answer: Answer,
    given: Given,
    refined: Callable[[Answer, Given, float], Answer],
    *,
    seconds: float,
) -> Answer:
    """Return the answer at the contrast where its gradient misses the given one least.

    ``refined`` descends from an answer for so many seconds, ``seconds`` bounds them all.
    """
    end = time.monotonic() + seconds
    found = [answer]

    def refine(inputs: Tensor) -> tuple[Tensor, float]:
        begun = given.answer(answer.method, inputs)
        tried = replace(answer, images=begun.images, certificate=begun.certificate, estimated=None)
        for _ in range(_AGAIN):
            before = tried.certificate.relative
            tried = refined(tried, given, max(end - time.monotonic(), 1.0))
            if tried.certificate.relative >= _WORTH * before:
                break
        found.append(tried)
        return normalise(tried.images.double(), *given.normalisation), tried.certificate.relative

    inputs = normalise(answer.images.double(), *given.normalisation)
    brightest = given.bounds().largest_multiple(inputs)

    def done() -> bool:
        return time.monotonic() > end or any(tried.certificate.exact for tried in found)

    _search(inputs, brightest, refine, done)
    return min(found, key=lambda tried: tried.certificate.relative)


def _search(
    inputs: Tensor,
    brightest: float,
    refine: Callable[[Tensor], tuple[Tensor, float]],
    done: Callable[[], bool],
) -> None:
    """Try the multiples of ``inputs`` (N, C, H, W) whose gradient may miss the given one least.

    ``brightest`` is the largest multiple that is still a picture; ``refine`` descends from inputs
    to nearby ones and returns them with their misfit; after ``done`` no further one is tried.
    """
    trials = []
    for share in _FIRST:
        a = share * brightest
        refined, misfit = refine(a * inputs)
        trials.append(Trial(a**-2, misfit, refined))
    for _ in range(_ROUNDS):
        trials.sort(key=lambda trial: trial.misfit)
        for z in list(_zeros(trials[:2])):
            if done():
                break
            if math.isfinite(z) and z >= brightest**-2 * (1.0 - 1e-3):
                nearest = trials[0]
                refined, misfit = refine(nearest.inputs * math.sqrt(nearest.z / z))
                trials.append(Trial(z, misfit, refined))


def _zeros(trials: Sequence[Trial]) -> Iterator[float]:
    """Yield where |linear| functions through two points are zero: between them, and outside."""
    one, two = trials
    yield (one.z * two.misfit + two.z * one.misfit) / (one.misfit + two.misfit)
    if two.misfit > one.misfit:
        yield (one.z * two.misfit - two.z * one.misfit) / (two.misfit - one.misfit)
