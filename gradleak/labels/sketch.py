"""Singular triples of a matrix of low rank, for a fraction of the price of all of them."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING, _SWEEPS = 10, 2


def leading_triples(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples U (C, r), S (r,), V (D, r) of ``matrix`` (C, D) float64.

    Where ``rank`` is small the matrix is projected on the range of its product with a few random
    vectors first (Halko, Martinsson and Tropp 2011), which is exact for a matrix of that rank.
    """
    sketch = rank + _OVERSAMPLING
    if worthwhile(matrix, rank):
        basis = _range(matrix, sketch)
        small, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ small
    else:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank].contiguous(), values[:rank].contiguous(), vh[:rank].T.contiguous()


def leading_values(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the ``rank`` leading singular values of ``matrix`` (C, D) float64, and what is beyond.

    The second is the Frobenius norm of what the projection on their subspace leaves.
    """
    basis = _range(matrix, rank + _OVERSAMPLING)
    inside = basis.T @ matrix
    beyond = torch.addmm(matrix, basis, inside, alpha=-1.0).norm()
    values = torch.linalg.svdvals(inside)
    tail = values[rank:].square().sum()
    return values[:rank], float((beyond.square() + tail).sqrt())


def worthwhile(matrix: Tensor, rank: int) -> bool:
    """Return whether ``rank`` is so small that a projection costs less than a decomposition."""
    return 3 * (rank + _OVERSAMPLING) < min(matrix.shape)


def _range(matrix: Tensor, size: int) -> Tensor:
    """Return an orthonormal basis (C, size) of the leading range, the same in every run."""
    dice = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], size, generator=dice, dtype=matrix.dtype)
    basis: Tensor = torch.linalg.qr(matrix @ probe.to(matrix.device)).Q
    for _ in range(_SWEEPS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    return basis
