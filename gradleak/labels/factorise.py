"""Rank and leading factors of head gradients, without ever copying a large one to float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A block of this many float64 values stays in a core's cache while it is used twice.
_BLOCK = 1 << 18
# A rank-one residual up to this many roundings is rounding, not noise and not a second sample.
_ROUNDINGS = 16.0
_SWEEPS = 3


@dataclass(frozen=True)
class RankOne:
    """The leading singular triple of B gradients (C, D): G ≈ σ u vᵀ, ‖u‖ = ‖v‖ = 1, in float64.

    ``u`` (B, C), ``sigma`` (B,), ``v`` (B, D); ``residual`` (B,) is ‖G − σ u vᵀ‖ / ‖G‖.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Rank:
    """How many samples a head gradient shows, and the noise on its entries.

    ``rank`` counts the singular values above the noise edge (or above rounding); ``noise`` is the
    estimated standard deviation of one entry; ``noisy`` says whether it exceeds rounding.
    """

    rank: int
    noise: float
    noisy: bool


def precision(dtype: torch.dtype) -> float:
    """Return the unit roundoff of ``dtype``: half its machine epsilon."""
    return float(torch.finfo(dtype).eps) / 2.0


def row_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, block)`` of ``matrix`` (..., R, K), each block in float64 and cache-sized."""
    rows, columns = matrix.shape[-2:]
    step = max(1, _BLOCK // max(1, columns * matrix[..., 0, 0].numel()))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        yield part, matrix[..., part, :].double()


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector`` for (..., R, K) and (..., K), accumulated in float64."""
    return torch.cat([(b @ vector.unsqueeze(-1)).squeeze(-1) for _, b in row_blocks(matrix)], -1)


def leading_triple(gradient: Tensor) -> RankOne:
    """Find the leading singular triple of gradients ``(B, C, D)`` by power iteration in float64.

    A noiseless gradient of one sample has rank one and is exact after one sweep; the further
    sweeps serve noise. A zero gradient gives σ = 0 and a residual of 0.
    """
    largest = torch.linalg.vector_norm(gradient, dim=2, dtype=torch.float64).argmax(1)
    v = gradient[torch.arange(len(gradient), device=gradient.device), largest].double()
    v = v / _nonzero(torch.linalg.vector_norm(v, dim=1, keepdim=True))
    for _ in range(_SWEEPS - 1):
        v = _sweep(gradient, v)
    u = matvec(gradient, v)
    sigma = torch.linalg.vector_norm(u, dim=1)
    left = total = torch.zeros_like(sigma)
    for rows, block in row_blocks(gradient):
        total = total + block.square().sum((1, 2))
        # In place: the block is this function's own copy unless the gradient is float64 already.
        rest = torch.baddbmm(block, u[:, rows, None], v[:, None, :], alpha=-1.0)
        left = left + rest.square().sum((1, 2))
    return RankOne(
        u=u / _nonzero(sigma)[:, None],
        sigma=sigma,
        v=v,
        residual=(left / _nonzero(total)).sqrt(),
    )


def rank_of(gradient: Tensor, leading: RankOne, index: int = 0) -> Rank:
    """Count the samples in gradient ``index`` of ``(B, C, D)`` and estimate its noise (§1).

    The leading triple settles the common case (one sample, no noise); otherwise the singular
    values are counted above rounding or, under noise, above the edge τ(√C + √D), with τ from the
    trailing ones.
    """
    classes, width = gradient.shape[1:]
    scale = math.sqrt(classes * width)
    norm = float(leading.sigma[index])
    unit = precision(gradient.dtype)
    residual = float(leading.residual[index])
    if residual <= _ROUNDINGS * unit:
        return Rank(rank=int(norm > 0), noise=residual * norm / scale, noisy=False)
    values = _singular_values(gradient[index])
    possible = min(classes - 1, width)
    above = int((values > 4.0 * _ROUNDINGS * unit * values[0]).sum())
    if above < possible:
        tail = float(values[above:].square().sum()) ** 0.5
        return Rank(rank=above, noise=tail / scale, noisy=False)
    return _rank_under_noise(values, classes, width)


def _rank_under_noise(values: Tensor, classes: int, width: int) -> Rank:
    """Alternate between the noise std of the trailing singular values and the count above it."""
    rank = 0
    while True:
        free = max(1, (classes - rank) * (width - rank))
        noise = float(values[rank:].square().sum() / free) ** 0.5
        edge = 1.05 * noise * (math.sqrt(classes) + math.sqrt(width))
        above = int((values > edge).sum())
        if above <= rank or above >= len(values):
            return Rank(rank=max(rank, above), noise=noise, noisy=True)
        rank = above


def _singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of ``(C, D)``, descending.

    ``eigvalsh`` of the smaller Gram matrix would square the rounding, so this is a plain SVD of
    the triangular factor.
    """
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)


def _sweep(gradient: Tensor, v: Tensor) -> Tensor:
    """Return the normalised Gᵀ G v of gradients ``(B, C, D)`` in one pass over them."""
    out = torch.zeros_like(v)
    for _, block in row_blocks(gradient):
        out = out + ((block @ v[:, :, None]).mT @ block).squeeze(1)
    return out / _nonzero(torch.linalg.vector_norm(out, dim=1, keepdim=True))


def _nonzero(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm))
