"""Which of its entries a pool may have taken, by the values of the windows around (§6e).

An entry is at most the maximum of every window that covers it, so it can be a window's maximum
only where no overlapping window has a smaller one. Two overlapping windows of one value share an
entry, unless they agree by accident: that is likely, not certain. Windows of a value near zero may
have been closed by the rectifier; for them "none" is a choice of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.maxpool.stem import PooledConvolution

# Logarithm of what excludes a choice.
NEVER = -1e30
# Standard deviations within which two values are taken for one, and beyond which they exclude; so
# many times as many where no closed window shows how large errors are.
_TIE, _EXCLUDE, _BLIND = 8.0, 16.0, 5.0
# Rounding of a float32 forward pass, relative to the value and to the largest.
_ROUNDING, _FLOOR = 6e-7, 2e-9
# Log odds against an entry of its own for a window that ties with another, and against a window
# of no visible value being open.
_UNLIKELY = 10.0
# What a pooled map has of negative values is noise. A window is sure to be open from so many times
# the largest of them, and may be from so many times the usual one, in standard deviations.
_SURE, _LEAST_NOISE, _MAYBE = 15.0, 4.0, 3.0


@dataclass(frozen=True)
class Candidates:
    """What each window may have taken: K entries and "none".

    ``place`` (N·Q, K+1) is the entry's place among N·P (N·P for none and in the padding),
    ``allowed`` and ``prior`` (O, N·Q, K+1) say which are possible and their log odds. ``value``
    and ``std`` (O, N·Q) are the maxima, ``sure`` those of open windows. ``bound`` (O, N·P) is the
    most that each entry can be.
    """

    place: Tensor
    allowed: Tensor
    prior: Tensor
    value: Tensor
    std: Tensor
    sure: Tensor
    bound: Tensor

    def gather(self, entries: Tensor) -> Tensor:
        """Return entries (O, N·P) as the windows see them (O, N·Q, K+1), none being zero."""
        return F.pad(entries, (0, 1))[:, self.place]

    def scatter(self, shares: Tensor) -> Tensor:
        """Return the transpose of :meth:`gather`, (O, N·P)."""
        sums = shares.new_zeros(len(shares), self.bound.shape[1] + 1)
        sums.index_add_(1, self.place.flatten(), shares.flatten(1))
        return sums[:, :-1]

    def normalised(self, log_odds: Tensor) -> Tensor:
        """Return probabilities (O, N·Q, K+1) of the allowed choices."""
        return torch.softmax(torch.where(self.allowed, log_odds, NEVER), 2) * self.allowed

    def best(self, log_odds: Tensor) -> Tensor:
        """Return the most likely choices as zeros and ones (O, N·Q, K+1)."""
        chosen = torch.where(self.allowed, log_odds, NEVER).argmax(2)
        one = F.one_hot(chosen, self.place.shape[1]).to(log_odds.dtype)
        return one * self.allowed


def find_candidates(stem: PooledConvolution) -> Candidates:
    """Find what the windows of ``stem`` may have taken."""
    value, std = stem.joined(stem.value), stem.joined(stem.std)
    entries = stem.samples * stem.windows
    place = stem.pools.mT
    edge = max(float((-value / std).amax()), _LEAST_NOISE)
    sure, maybe = _opened(stem, value, std, edge)
    worse = edge / _LEAST_NOISE if stem.rectified else _BLIND
    if stem.rectified:
        value = torch.where(maybe, value.clamp(min=0.0), 0.0)
    error = worse * std + (_ROUNDING * value.abs() + _FLOOR * value.abs().amax()) / _TIE
    bound = _over_entries(value, place, entries, "amin")
    around = F.pad(_over_entries(error, place, entries, "amax"), (0, 1))[:, place]
    error = torch.maximum(around, error[:, :, None])
    own = value[:, :, None]
    limit = F.pad(bound, (0, 1), value=math.inf)[:, place]
    inside = place < entries
    allowed = (limit >= own - _EXCLUDE * error) & inside
    tied = (((own - limit).abs() <= _TIE * error) & inside).to(value.dtype)
    count = value.new_zeros(len(value), entries + 1)
    count.index_add_(1, place.flatten(), tied.flatten(1))
    shared = torch.where(allowed, count[:, place], 0.0)
    alone = (shared.amax(2, keepdim=True) - shared).clamp(max=1.0)
    prior = torch.where(sure[:, :, None], -_UNLIKELY * alone, 0.0)
    prior = torch.where(maybe[:, :, None], prior, -_UNLIKELY)
    none = (~sure)[:, :, None]
    return Candidates(
        place=torch.cat([place, torch.full_like(place[:, :1], entries)], 1),
        allowed=torch.cat([allowed, none], 2),
        prior=torch.cat([prior, torch.zeros_like(prior[:, :, :1])], 2),
        value=value,
        std=std,
        sure=sure,
        bound=torch.where(bound.isfinite(), bound, 1e3 * value.abs().amax()),
    )


def _opened(
    stem: PooledConvolution, value: Tensor, std: Tensor, edge: float
) -> tuple[Tensor, Tensor]:
    """Return which windows (O, N·Q) are surely open, and which may well be.

    ``edge`` is the largest error of a closed one, in standard deviations.
    """
    if not stem.rectified:
        every = torch.ones_like(value, dtype=torch.bool)
        return every, every
    ratio = value / std
    below = -ratio[ratio < 0.0]
    noise = float(below.kthvalue(max(1, int(0.9 * len(below)))).values) if len(below) else 1.0
    return ratio > _SURE * edge, ratio > min(_MAYBE * max(noise, 1.0), edge)


def _over_entries(value: Tensor, place: Tensor, entries: int, reduce: str) -> Tensor:
    """Reduce the values (O, N·Q) of all windows that cover an entry: (O, N·P)."""
    start = math.inf if reduce == "amin" else 0.0
    whole = value.new_full((len(value), entries + 1), start)
    index = place.flatten().expand(len(value), -1)
    spread = value[:, :, None].expand(-1, -1, place.shape[1]).flatten(1)
    return whole.scatter_reduce_(1, index, spread, reduce)[:, :-1]
