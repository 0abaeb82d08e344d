"""Pictures of 8 bits: what their levels tell of what is not known of them.

Under noise, the levels of the surest pixels first, which settle the others.

Noise leaves some pixels of a walked image surer than others, by their standard errors. Those that
are within half a level many times over are set to it; the gradient is then met by the rest alone,
which leaves them less to be wrong by; and so on.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.calculus.descent import DescentOptions, Residuals, descend
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.misfits import gradient_misfits
from gradleak.stages.answers import LEVELS, Answer, Given, with_eight_bits

# A pixel is sure if so many standard errors are less than half a level; of those that were left
# after a round, the ones this near a level.
_SIGMAS, _NEAR_LEVEL = 5.0, 0.25
# Where fewer are sure, there is nothing to begin with; and an image whose gradient is the given one
# need not be of 8 bits unless so many of its pixels are near a level.
_ENOUGH, _ALL_BUT = 0.5, 0.9
# The right picture leaves all of the noise; the likeliest image, which has fitted some, a part.
_FITTED = 1.25
_ROUNDS = 4
_DESCENT = DescentOptions(steps=6, inner=60, damping=1e-6)


def with_levels(answer: Answer, given: Given, *, seconds: float, seed: int) -> Answer:
    """Return the picture of 8 bits beside a walked ``answer`` if its gradient is as near.

    It takes ``seconds`` at most, and returns the answer as it was where that is not enough, or the
    errors of its pixels are not known or too large.
    """
    found = None if answer.walk is None else answer.walk.recovered(0)
    if found is None:
        return answer
    rounded = with_eight_bits(answer.images)
    if rounded is not None:
        settled = torch.equal(rounded, answer.images.to(rounded))
        return answer if settled else _if_near(answer, rounded, given)
    levels = answer.images.double() * LEVELS
    if answer.certificate.exact and not between_levels(answer.images):
        return answer  # not a picture of 8 bits
    _, spread = given.normalisation
    std = found.std * found.std.new_tensor(list(spread)).view(1, -1, 1, 1)
    # The errors of label and feature are not in the walk's: those show in pixels between levels.
    sure = (_SIGMAS * std * LEVELS < 0.5) & ((levels - levels.round()).abs() < _NEAR_LEVEL)
    if float(sure.double().mean()) < _ENOUGH:
        return answer
    ends = time.monotonic() + seconds
    misfits = gradient_misfits(given.network, given.gradients, given.labels)
    for _ in range(_ROUNDS):
        fixed = normalise(torch.where(sure, levels.round(), levels) / LEVELS, *given.normalisation)
        if bool(sure.all()):
            break
        move = _met(misfits, fixed, ~sure, max(ends - time.monotonic(), 0.0), seed)
        levels = denormalise(fixed + move, *given.normalisation) * LEVELS
        sure = sure | ((levels - levels.round()).abs() < _NEAR_LEVEL)
        if time.monotonic() > ends:
            break
    return _if_near(answer, (levels.round().clamp(0.0, LEVELS) / LEVELS).float(), given)


def _if_near(answer: Answer, images: Tensor, given: Given) -> Answer:
    """Return the answer with ``images`` of 8 bits if their gradient is as near as noise allows."""
    certificate = given.certify(images)
    if certificate.relative > _FITTED * answer.certificate.relative:
        return answer
    after = (*answer.after, "set to levels of 8 bits")
    return replace(answer, images=images, certificate=certificate, after=after)


def between_levels(images: Tensor) -> int:
    """Return how many values lie between levels of 8 bits where all but a few lie on one.

    None do in pictures of other than 8 bits, whose values lie anywhere.
    """
    off = (images.double() * LEVELS).frac()
    off = torch.minimum(off, 1.0 - off)
    between = int((off > _NEAR_LEVEL).sum())
    return between if between <= (1.0 - _ALL_BUT) * off.numel() else 0


def _met(misfits: Residuals, fixed: Tensor, free: Tensor, seconds: float, seed: int) -> Tensor:
    """Return how the ``free`` entries move to meet the gradient, the others as they are."""
    mask = free.to(fixed.dtype)
    dice = torch.Generator(device=fixed.device).manual_seed(seed)
    found = descend(
        lambda x: misfits(fixed + mask * x),
        torch.zeros_like(fixed),
        replace(_DESCENT, seconds=seconds),
        generator=dice,
    )
    return mask * found.x
