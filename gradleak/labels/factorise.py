"""Rank and leading factors of head gradients, without ever copying a large one to float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.sketch import leading_values, worthwhile
from gradleak.linalg import effective_precisions, precision, wide_blocks

# A rank-one residual up to this many roundings is rounding, not noise and not a second sample.
_ROUNDINGS = 16.0
_BEYOND_ROUNDING = 4.0 * _ROUNDINGS
# Noise shows where the column sums, zero without it, exceed this many roundings, and where they and
# the trailing singular values agree on its size to this factor.
_SUMS_BEYOND_ROUNDING = 4.0
_SAME_NOISE = 2.0
# More samples than this are rarely seen in one gradient.
_USUAL_BATCH = 64
_FLOAT32 = precision(torch.float32)
_SWEEPS = 3


@dataclass(frozen=True)
class RankOne:
    """The leading singular triple of B gradients (C, D): G ≈ σ u vᵀ, ‖u‖ = ‖v‖ = 1, in float64.

    ``u`` (B, C), ``sigma`` (B,), ``v`` (B, D) with a non-negative sum, so that non-negative
    features have positive scales; ``residual`` (B,) is ‖G − σ u vᵀ‖ / ‖G‖, ``unit`` (B,) the
    roundoff of each gradient's effective precision.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    residual: Tensor
    unit: Tensor

    def at(self, index: Tensor) -> RankOne:
        """Return the triples of the gradients in ``index`` (K,)."""
        return RankOne(**{name: value[index] for name, value in vars(self).items()})

    def finite(self) -> Tensor:
        """Return (B,) whether the gradient was free of NaN and infinity."""
        return torch.isfinite(self.sigma) & torch.isfinite(self.residual)


@dataclass(frozen=True)
class Rank:
    """How many samples a head gradient shows, and the noise on its entries.

    ``rank`` counts the singular values above the noise edge (or above rounding); ``noise`` is the
    estimated standard deviation of one entry; ``noisy`` says whether it exceeds rounding.
    """

    rank: int
    noise: float
    noisy: bool


def leading_triple(gradient: Tensor) -> RankOne:
    """Find the leading singular triple of gradients ``(B, C, D)`` by power iteration in float64.

    A noiseless float32 gradient of one sample has rank one and is exact after one pass from its
    largest row; only if a residual remains do further passes follow. A zero gradient gives σ = 0
    and a residual of 0.
    """
    largest = gradient.abs().amax(2).argmax(1)  # not by a norm, whose squares could underflow
    v = gradient[torch.arange(len(gradient), device=gradient.device), largest].double()
    unit = effective_precisions(gradient)
    found = _look(gradient, _normalised(v), unit)
    (open_ended,) = torch.where((found.residual > _ROUNDINGS * unit) | (unit < _FLOAT32))
    if len(open_ended):
        _put(found, open_ended, _sweep_on(_rows(gradient, open_ended), found.at(open_ended)))
    return found


def _look(gradient: Tensor, v: Tensor, unit: Tensor) -> RankOne:
    """Return the triple of gradients of rank one, of which ``v`` (B, D) is a row, in one pass.

    The row has its own rounding e. In G v = σ u its effect is of the order e²; to the square of the
    residual it adds σ²e², which is taken off again.
    """
    parts = []
    out, left = torch.zeros_like(v), torch.zeros_like(v[:, 0])
    for _, block in wide_blocks(gradient):
        along = block @ v[:, :, None]
        parts.append(along)
        out += (along.mT @ block).squeeze(1)
        left += _take_off(block, along, v)
    u = torch.cat(parts, 1).squeeze(-1)
    sigma = torch.linalg.vector_norm(u, dim=1)
    found = _normalised(out)
    shift = found - v
    left = (left - sigma.square() * torch.linalg.vecdot(shift, shift)).clamp_(min=0.0)
    return _oriented(u, sigma, found, left, unit)


def _sweep_on(gradient: Tensor, start: RankOne) -> RankOne:
    """Measure the residual of ``start`` itself, and iterate where it is more than rounding."""
    found = _project(gradient, start.v, start.unit)
    (left,) = torch.where(found.residual > _ROUNDINGS * found.unit)
    if not len(left):
        return found
    rest, v = _rows(gradient, left), found.v[left]
    for _ in range(_SWEEPS):
        v = _sweep(rest, v)
    swept = _project(rest, v, found.unit[left])
    # float64 on the outside, float32 in the making: its rounding is no second sample.
    coarse = (swept.unit < _FLOAT32) & (swept.residual > _ROUNDINGS * swept.unit)
    coarse &= swept.residual <= _ROUNDINGS * _FLOAT32
    swept.unit[coarse] = _FLOAT32
    _put(found, left, swept)
    return found


def _rows(gradient: Tensor, index: Tensor) -> Tensor:
    return gradient if len(index) == len(gradient) else gradient[index]


def _put(into: RankOne, index: Tensor, found: RankOne) -> None:
    for name, value in vars(into).items():
        value[index] = getattr(found, name)


def _project(gradient: Tensor, v: Tensor, unit: Tensor) -> RankOne:
    """Return u and σ of G v = σ u, and what σ u vᵀ leaves of G, in one pass over it."""
    parts = []
    left = torch.zeros_like(v[:, 0])
    for _, block in wide_blocks(gradient):
        along = block @ v[:, :, None]
        parts.append(along)
        left += _take_off(block, along, v)
    u = torch.cat(parts, 1).squeeze(-1)
    return _oriented(u, torch.linalg.vector_norm(u, dim=1), v, left, unit)


def _take_off(block: Tensor, along: Tensor, v: Tensor) -> Tensor:
    """Take ``along`` vᵀ off a block (B, R, D), in place, and return (B,) the square of the rest."""
    rest = block.addcmul_(along, v[:, None, :], value=-1.0).flatten(1)
    return (rest[:, None] @ rest[..., None]).flatten()


def _oriented(u: Tensor, sigma: Tensor, v: Tensor, left: Tensor, unit: Tensor) -> RankOne:
    """Return the triple of G v = ``u`` with Σ v ≥ 0; ``left`` is the square of the residual."""
    sign = torch.where(v.sum(1, keepdim=True) < 0, -1.0, 1.0).to(v.dtype)
    return RankOne(
        u=u * (sign / _nonzero(sigma)[:, None]),
        sigma=sigma,
        v=v * sign,
        residual=(left / _nonzero(sigma.square() + left)).sqrt(),
        unit=unit,
    )


def ranks_of(gradient: Tensor, leading: RankOne, *, noise_std: float | None = None) -> list[Rank]:
    """Count the samples in each gradient of ``(B, C, D)`` and estimate its noise (§1).

    The leading triple settles the common case (one sample, no noise); otherwise the singular
    values are counted above rounding or, under noise, above the edge τ(√C + √D), with τ from the
    trailing ones. A gradient that is not finite has rank 0. ``noise_std`` is the noise where it is
    known, 0 for none.
    """
    scale = math.sqrt(gradient.shape[1] * gradient.shape[2])
    ranks = []
    numbers = (leading.sigma.tolist(), leading.residual.tolist(), leading.unit.tolist())
    for index, (norm, residual, unit) in enumerate(zip(*numbers, strict=True)):
        # A declared noise beyond rounding counts, even where none is to be seen.
        declared = (noise_std or 0.0) * scale > _ROUNDINGS * unit * norm
        if 0.0 < norm < math.inf and (residual > _ROUNDINGS * unit or declared):
            ranks.append(_rank_of_one(gradient[index], unit, noise_std))
        else:
            ranks.append(Rank(rank=int(norm > 0), noise=residual * norm / scale, noisy=False))
    return ranks


def as_one_sample(rank: Rank, leading: RankOne, index: int) -> Rank:
    """Return the rank of a noisy gradient known to be of one sample: what is beyond it is noise.

    Without noise a second singular value is a second sample, whatever is said.
    """
    if rank.rank <= 1 or not rank.noisy:
        return rank
    size = math.sqrt(leading.u.shape[1] * leading.v.shape[1])
    norm = float(leading.sigma[index])
    return Rank(rank=1, noise=float(leading.residual[index]) * norm / size, noisy=True)


def rank_of(gradient: Tensor, leading: RankOne) -> Rank:
    """Count the samples in the only gradient of ``(1, C, D)``; see :func:`ranks_of`."""
    return ranks_of(gradient, leading)[0]


def _rank_of_one(gradient: Tensor, unit: float, noise_std: float | None) -> Rank:
    """Count the samples in one gradient ``(C, D)`` of ``unit`` roundoff."""
    classes, width = gradient.shape
    wide = gradient.double()
    scale = math.sqrt(classes * width)
    norm = float(torch.linalg.vector_norm(wide))
    if noise_std and noise_std * scale > _ROUNDINGS * unit * norm:
        above = int((_singular_values(wide) > _edge(noise_std, classes, width)).sum())
        return Rank(rank=above, noise=noise_std, noisy=True)
    seen = _rank_beside_noise(wide, unit, norm) if noise_std is None else None
    if seen is not None:
        return seen
    # Batches are mostly far smaller than the head, and then few of its singular values suffice.
    if worthwhile(wide, _USUAL_BATCH):
        values, beyond = leading_values(wide, _USUAL_BATCH)
        edge = _BEYOND_ROUNDING * unit * float(values[0])
        above = int((values > edge).sum())
        if above < len(values):
            beyond = math.hypot(beyond, float(torch.linalg.vector_norm(values[above:])))
            if beyond < edge * math.sqrt(min(classes, width)) or noise_std is not None:
                return Rank(rank=above, noise=beyond / scale, noisy=False)
    values = _singular_values(wide)
    possible = min(classes - 1, width)
    above = int((values > _BEYOND_ROUNDING * unit * values[0]).sum())
    # Without noise every column sums to zero, so that the last of C singular values is zero.
    full = above == possible and len(values) > possible
    if above < possible or full or noise_std is not None:
        tail = float(values[above:].square().sum()) ** 0.5
        return Rank(rank=above, noise=tail / scale, noisy=False)
    return _rank_under_noise(values, classes, width)


def _rank_beside_noise(wide: Tensor, unit: float, norm: float) -> Rank | None:
    """Return the rank where the column sums tell of noise and the trailing values of the same.

    The columns of a noiseless gradient sum to zero (Theorem 1), so that their sums measure the
    noise by itself, be it so little that its singular values reach from rounding to beyond it.
    """
    classes, width = wide.shape
    scale = math.sqrt(classes * width)
    summed = float(torch.linalg.vector_norm(wide.sum(0)))
    if summed <= _SUMS_BEYOND_ROUNDING * unit * norm:
        return None
    noise = summed / scale
    if worthwhile(wide, _USUAL_BATCH):
        values, beyond = leading_values(wide, _USUAL_BATCH)
    else:
        values, beyond = _singular_values(wide), 0.0
    # First an edge that no error of the sums lets the noise pass; the many trailing values know it
    # better, and set the second.
    for edge in (_SAME_NOISE, 1.0):
        above = int((values > edge * _edge(noise, classes, width)).sum())
        free = (classes - above) * (width - above)
        if above == len(values) or free <= 0:
            return None
        tail = math.hypot(beyond, float(torch.linalg.vector_norm(values[above:])))
        noise = tail / math.sqrt(free)
        if not 1.0 < _SAME_NOISE * noise * scale / summed < _SAME_NOISE**2:
            return None
    return Rank(rank=above, noise=noise, noisy=True)


def _rank_under_noise(values: Tensor, classes: int, width: int) -> Rank:
    """Alternate between the noise std of the trailing singular values and the count above it."""
    rank = 0
    while True:
        free = max(1, (classes - rank) * (width - rank))
        noise = float(values[rank:].square().sum() / free) ** 0.5
        above = int((values > _edge(noise, classes, width)).sum())
        if above <= rank or above >= len(values):
            return Rank(rank=max(rank, above), noise=noise, noisy=True)
        rank = above


def _edge(noise: float, classes: int, width: int) -> float:
    """Return what the largest singular value of noise alone stays below."""
    return 1.05 * noise * (math.sqrt(classes) + math.sqrt(width))


def _singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of ``(C, D)``, descending.

    ``eigvalsh`` of the smaller Gram matrix would square the rounding, so this is a plain SVD of
    the triangular factor.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return values


def _sweep(gradient: Tensor, v: Tensor) -> Tensor:
    """Return the normalised Gᵀ G v of gradients ``(B, C, D)`` in one pass over them."""
    out = torch.zeros_like(v)
    for _, block in wide_blocks(gradient):
        out = out + ((block @ v[:, :, None]).mT @ block).squeeze(1)
    return _normalised(out)


def _normalised(v: Tensor) -> Tensor:
    return v / _nonzero(torch.linalg.vector_norm(v, dim=1, keepdim=True))


def _nonzero(norm: Tensor) -> Tensor:
    return norm + (norm == 0)
