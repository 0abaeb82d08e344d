"""The last descent from an image that is near, on all gradients at once.

The walk takes each layer's equations once, with the errors of the layers above in them; the
gradients as a whole have less to be wrong by. Where they are noisy, the image that meets them best
has fitted their noise: what they tell least of is then a matter of what pictures are like. So the
likeliest image is sought instead: every entry of a gradient weighs as its noise, and neighbouring
pixels differ by as much as those of photographs do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.calculus.descent import DescentOptions, Residuals, descend
from gradleak.calculus.prior import slopes
from gradleak.linalg import precision
from gradleak.normalisation import normalise
from gradleak.progress import Progress, Step
from gradleak.reconstruction.misfits import gradient_misfits
from gradleak.stages.answers import Answer, Given, with_eight_bits

# An answer whose gradient is that near is refined against the gradient itself.
_NEAR = 0.3
_OPTIONS = DescentOptions(steps=20, inner=60, damping=1e-6)
# The gradient of a finished picture leaves as many times the noise that the maps show, at most.
_AS_NOISY = 4.0
# A gradient with relative noise from here on is met by too many pictures; what the walk leaves is
# rounding up to so many roundings.
_NOISY, _ROUNDINGS = 2e-6, 16.0
# An image that leaves less than this part of the noise shows that it is none.
_FREE = 0.25
# The likeliest image leaves the noise, and no more than that many times as much.
_ALL = 1.25
# Root mean square of the difference of neighbouring pixels, black 0 and white 1.
_SLOPE = 0.1


def refined(
    answer: Answer, given: Given, seconds: float, seed: int, progress: Progress | None
) -> Answer:
    """Descend from an answer that is near on all gradients, and keep what is better.

    Better fits the gradients better; under noise it is likelier. It takes ``seconds`` at most.
    """
    noise = noise_of(answer, given)
    exact = answer.certificate.exact and noise is None
    if exact or answer.certificate.relative > _NEAR:
        return answer
    usual = 0.0 if answer.walk is None else answer.walk.usual
    bound = _AS_NOISY * usual
    if with_eight_bits(answer.images) is not None and answer.certificate.relative <= bound:
        return answer  # a picture of 8 bits that leaves no more than noise has nothing to gain

    ends = time.monotonic() + seconds
    found = _descended(answer, given, noise, seconds, seed, progress)
    if noise is not None and found.certificate.relative < _FREE * noise:
        # What the walk left was no noise: the gradients are met more closely than that.
        found = _descended(found, given, None, max(ends - time.monotonic(), 0.0), seed, progress)
        noise = None
    before = answer.certificate.relative
    if noise is None and found.certificate.relative >= before:
        return answer
    if noise is not None and found.certificate.relative > max(before, _ALL * noise):
        return answer  # led astray at kinks: it is not noise alone that it leaves
    how = "refined on all gradients" if noise is None else "made the likeliest under the noise"
    return replace(found, estimated=None, after=(*answer.after, how))


def _descended(
    answer: Answer,
    given: Given,
    noise: float | None,
    seconds: float,
    seed: int,
    progress: Progress | None,
) -> Answer:
    """Return where a descent from ``answer`` ends, on the gradients or, with noise, likelihood."""

    def note(step: int, squares: float) -> None:
        if progress is not None:
            progress(Step("refining", step, _OPTIONS.steps, squares))

    misfits = gradient_misfits(given.network, given.gradients, given.labels)
    start = normalise(answer.images.double(), *given.normalisation)
    residuals = misfits if noise is None else _unlikelihood(misfits, noise, given)
    dice = torch.Generator(device=start.device).manual_seed(seed)
    options = replace(_OPTIONS, seconds=seconds)
    found = descend(residuals, start, options, generator=dice, progress=note)
    better = given.answer(answer.method, found.x)
    return replace(answer, images=better.images, certificate=better.certificate)


def noise_of(answer: Answer, given: Given) -> float | None:
    """Return the relative noise of the gradients as the walk met it, None where there is none."""
    if answer.walk is None:
        return None
    unit = max(precision(gradient.dtype) for gradient in given.gradients.values())
    usual = answer.walk.usual
    noise = usual if usual > _ROUNDINGS * unit else unit / math.sqrt(3.0)
    return noise if noise > _NOISY else None


def _unlikelihood(misfits: Residuals, noise: float, given: Given) -> Residuals:
    """Return residuals whose squares are −2 ln of the posterior, over the number of them.

    ``misfits`` are relative to a tensor's norm, so an entry's noise is ``noise`` over the root of
    their number.
    """
    _, spread = given.normalisation

    def residuals(x: Tensor) -> tuple[Tensor, ...]:
        parts = [part * (math.sqrt(part.numel()) / noise) for part in misfits(x)]
        parts += slopes(x * x.new_tensor(list(spread)).view(1, -1, 1, 1) / _SLOPE)
        return _of_mean(parts)

    return residuals


def _of_mean(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Scale residuals so that their squares add up to their mean."""
    root = math.sqrt(sum(part.numel() for part in parts))
    return tuple(part / root for part in parts)
