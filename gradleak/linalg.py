"""Products with large gradients, accumulated in float64 without copying them to float64 whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A block of this many float64 values stays in a core's cache while it is used.
_BLOCK = 1 << 18


def precision(dtype: torch.dtype) -> float:
    """Return the unit roundoff of ``dtype``: half its machine epsilon."""
    return float(torch.finfo(dtype).eps) / 2.0


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield row slices of ``matrix`` (..., R, K) such that a block fits a core's cache."""
    rows = matrix.shape[-2]
    step = max(1, _BLOCK * rows // max(1, matrix.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector`` for (..., R, K) and (..., K) as float64 (..., R)."""
    parts = [matrix[..., rows, :].double() @ vector[..., None] for rows in row_blocks(matrix)]
    return torch.cat(parts, -2).squeeze(-1)


def rmatvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix.T @ vector`` for (R, K) and (R,) as float64 (K,)."""
    out = torch.zeros(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    for rows in row_blocks(matrix):
        out += vector[rows] @ matrix[rows].double()
    return out


def outer_residual(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ‖M − l rᵀ‖ / ‖M‖ for (R, K), (R,), (K,); 0 for a matrix of zeros.

    The differences are formed in the matrix's own precision, their squares summed in float64: the
    result is right down to that precision, which is all the matrix can be compared to.
    """
    left, right = left.to(matrix.dtype), right.to(matrix.dtype)
    rest = total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for rows in row_blocks(matrix):
        block = matrix[rows]
        difference = torch.addr(block, left[rows], right, alpha=-1.0)
        rest = rest + _square(difference)
        total = total + _square(block)
    return float((rest / total).sqrt()) if float(total) > 0.0 else 0.0


def _square(block: Tensor) -> Tensor:
    # Row by row in the block's precision, over the rows in float64: digits enough for a residual.
    square: Tensor = torch.linalg.vecdot(block, block).double().sum()
    return square
