"""Pictures of 8 bits behind the inputs of a batch, which errors of its labels mix.

The inputs are combinations of the pictures, N unknown factors each, so all that is wrong with one
lies in the span of the batch. That span is known well where the labels are not: its condition is
that of the first layer's gradient, not of the head's. And of the thousands of values of a picture
each lies on a level, which tells the few factors by far more equations than there are unknowns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradleak.normalisation import denormalise
from gradleak.stages.answers import LEVELS, with_eight_bits

# Factors of one picture that are tried, one more or less by so much at most, and the steps between
# them: coarse, and around the best of those.
_MOST, _STEP, _FINE_STEP, _AROUND = 0.1, 1e-4, 2e-6, 60
# Of two samples, so many steps both ways, of these sizes in turn; and values that are looked at.
_MIXING, _MIXING_STEPS, _SAMPLED = 100, (5e-4, 2e-5, 1e-6), 1024
# Samples that one is tried with, those first whose labels share most with its own.
_PARTNERS = 4
# A value this near a level is thought to be meant by it; the rounds of going to those.
_MEANT, _ROUNDS = 0.3, 60
# They end where the picture moves by less, relative to it.
_STILL = 1e-9
# Directions that the batch's inputs span by less than this of the largest are none.
_SPANNED = 1e-7


def unmixed_by_levels(
    inputs: Tensor, labels: Tensor, normalisation: tuple[Sequence[float], Sequence[float]]
) -> Tensor | None:
    """Return the pictures of 8 bits behind ``inputs`` (N, C, H, W) that their labels' errors spoil.

    An error of the labels mixes the samples of a batch: all of them a little, those much that
    share a class; and where a network has no biases it scales them. ``labels`` are (N, classes).
    None where the levels do not tell how, of one sample or more.
    """
    nothing = denormalise(torch.zeros_like(inputs[:1]), *normalisation)
    _, sizes, span = torch.linalg.svd(
        (denormalise(inputs, *normalisation) - nothing).flatten(1), full_matrices=False
    )
    span = span[sizes > _SPANNED * sizes[0]]
    shared = torch.minimum(labels[:, None], labels[None]).sum(2).fill_diagonal_(0.0)
    pictures = []
    for n, one in enumerate(inputs):
        partners = shared[n].argsort(descending=True)[:_PARTNERS]
        others = inputs[[m for m in partners.tolist() if shared[n, m] > 0.0]]
        settled = (_settled(guess, span) for guess in _guesses(one[None], others, normalisation))
        picture = next((found for found in settled if found is not None), None)
        if picture is None:
            return None
        pictures.append(picture)
    return torch.cat(pictures)


def _guesses(
    one: Tensor, others: Tensor, normalisation: tuple[Sequence[float], Sequence[float]]
) -> Iterator[Tensor]:
    """Yield pictures (1, C, H, W) near the one behind ``one`` input, the likeliest first."""
    yield denormalise(one, *normalisation)
    yield _scaled(one, normalisation)
    for other in others:
        yield _unmixed(one, other[None], normalisation)


def _settled(picture: Tensor, span: Tensor) -> Tensor | None:
    """Move a ``picture`` (1, C, H, W) along a ``span`` (K, D), orthonormal, until it is of 8 bits.

    Least squares on the values that are near a level, which brings others near theirs, and so on.
    """
    levels = (picture * LEVELS).flatten()
    for _ in range(_ROUNDS):
        off = levels.round().clamp(0.0, LEVELS) - levels
        meant = off.abs() < _MEANT
        known = span[:, meant]
        if len(known) > known.shape[1]:
            return None
        move = (
            known @ off[meant]
            if bool(meant.all())
            else torch.linalg.lstsq(known.mT, off[meant][:, None]).solution[:, 0]
        )
        levels = levels + move @ span
        if float(move.norm()) <= _STILL * float(levels.norm()):
            break
    if float(levels.min()) < -_MEANT or float(levels.max()) > LEVELS + _MEANT:
        return None  # levels that no picture has
    return with_eight_bits((levels / LEVELS).clamp(0.0, 1.0).view_as(picture))


def _scaled(one: Tensor, normalisation: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Return the factor of ``one`` input (1, C, H, W) whose picture is the nearest to levels."""
    factor = 1.0
    for reach, step in ((_MOST, _STEP), (_AROUND * _FINE_STEP, _FINE_STEP)):
        count = round(reach / step)
        tried = [factor + step * k for k in range(-count, count + 1)]
        factor = min(tried, key=lambda f: _off_levels(denormalise(f * one, *normalisation)))
    return denormalise(factor * one, *normalisation)


def _unmixed(
    one: Tensor, other: Tensor, normalisation: tuple[Sequence[float], Sequence[float]]
) -> Tensor:
    """Return the picture nearest to levels that a little of ``other`` and a factor make of one."""
    base = denormalise(torch.zeros_like(one), *normalisation)
    first = ((denormalise(one, *normalisation) - base) * LEVELS).flatten()
    second = ((denormalise(other, *normalisation) - base) * LEVELS).flatten()
    base = (base * LEVELS).flatten()
    every = max(1, len(first) // _SAMPLED)
    factor, share = 1.0, 0.0
    for step in _MIXING_STEPS:
        tried = step * torch.arange(-_MIXING, _MIXING + 1, dtype=one.dtype, device=one.device)
        shares = (share + tried)[:, None] * second[::every]
        off = []
        for f in (factor + tried).tolist():
            levels = base[::every] + f * first[::every] + shares
            off.append((levels - levels.round()).square().mean(1))
        best = int(torch.stack(off).argmin())
        factor += float(tried[best // len(tried)])
        share += float(tried[best % len(tried)])
    return denormalise(factor * one + share * other, *normalisation)


def _off_levels(images: Tensor) -> float:
    levels = images * LEVELS
    return float((levels - levels.round()).square().sum())
