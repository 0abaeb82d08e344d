"""The contrast of pictures whose network normalised them by their own statistics.

A convolution under BatchNorm with batch statistics gives the same output and the same gradient for
an image and any multiple of it, but for BatchNorm's ε: with the image grows the variance that ε is
added to. So a fit ends at some multiple, and what its gradient misses is the trace of ε, linear in
z = 1/a² for an image a times too bright. No descent sees it beside slopes a thousand times steeper,
so that direction is taken by itself: the image and what must change with it for all else to stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.calculus.descent import Point, conjugate_gradients
from gradleak.normalisation import normalise
from gradleak.reconstruction.misfits import gradient_misfits
from gradleak.stages.answers import Answer, Given

_ROUNDS = 8
# A step of z = 1/a² leaves at least this of it.
_LEAST = 0.1
# What must change with the contrast: damping relative to the mean curvature, far above that of the
# contrast; products at most, and how exactly.
_DAMPING, _INNER, _TOLERANCE = 1e-6, 300, 1e-10


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
    ends = time.monotonic() + seconds
    misfits = gradient_misfits(given.network, given.gradients, given.labels)
    dice = torch.Generator(device=given.labels.device).manual_seed(0)
    best = tried = answer
    for _ in range(_ROUNDS):
        if best.certificate.exact or time.monotonic() > ends:
            break
        inputs = normalise(tried.images.double(), *given.normalisation)
        moved = _along_the_weakest(Point(misfits, inputs), dice, ends)
        scaled = given.answer(answer.method, moved)
        tried = replace(
            answer, images=scaled.images, certificate=scaled.certificate, estimated=None
        )
        tried = refined(tried, given, max(ends - time.monotonic(), 1.0))
        best = min(best, tried, key=lambda one: one.certificate.relative)
    return best


def _along_the_weakest(here: Point, generator: torch.Generator, ends: float) -> Tensor:
    """Return the image at another contrast, by the z at which the residuals are least."""
    damping = _DAMPING * here.curvature(generator)
    pulled = here.pull(here.push(here.x))
    beside = conjugate_gradients(here.product(damping), -pulled, _INNER, _TOLERANCE, ends)
    direction = here.x + beside
    along = torch.cat([part.flatten() for part in here.push(direction)])
    left = torch.cat([part.flatten() for part in here.left])
    z = 1.0 + 2.0 * float(along @ left) / float(along.square().sum())
    moved: Tensor = here.x + (max(z, _LEAST) ** -0.5 - 1.0) * direction
    return moved
