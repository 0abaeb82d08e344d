"""Products with large gradients, accumulated in float64 without copying them to float64 whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Values of a block that stays in a core's cache while it is used twice or three times.
_BLOCK = 1 << 18
_GPU_BLOCK = 1 << 26
_RUN = 64
_SAMPLE = 256
# Rows that give a first guess, and roundings of the matrix up to which that is good enough.
_HEAVIEST, _ROUNDINGS = 32, 16.0
# A relative residual that is told to three digits by any of two norms that differ by it.
_LITTLE = 1e-3


def precision(dtype: torch.dtype) -> float:
    """Return the unit roundoff of ``dtype``: half its machine epsilon."""
    return float(torch.finfo(dtype).eps) / 2.0


def effective_precisions(batch: Tensor) -> Tensor:
    """Return (B,) the unit roundoff of the coarsest dtype that holds every value of each (B, …).

    A gradient that was float32 or bfloat16 once keeps that precision in whatever dtype it is saved.
    """
    own = precision(batch.dtype)
    units = torch.full((len(batch),), own, dtype=torch.float64, device=batch.device)
    flat = batch.flatten(1)
    # A float32 that a half precision holds ends in 13 zeros: one look settles nearly all gradients.
    bits = flat[:, :_SAMPLE].view(torch.int32) if batch.dtype == torch.float32 else None
    if bits is not None and bool((bits & 0x1FFF).any(1).all()):
        return units
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # First the sample; the few gradients that pass are looked at whole.
        if precision(dtype) > own and any(held := _holds(dtype, flat[:, :_SAMPLE]).tolist()):
            rows = torch.tensor([b for b, may in enumerate(held) if may], device=batch.device)
            whole = _holds(dtype, flat if all(held) else flat[rows])
            units[rows[whole]] = precision(dtype)
    return units


def _holds(dtype: torch.dtype, flat: Tensor) -> Tensor:
    """Return (B,) whether ``dtype`` holds every value of a row of (B, K)."""
    return (flat.to(dtype).to(flat.dtype) == flat).all(1)


def row_blocks(matrix: Tensor, values: int = _BLOCK) -> Iterator[slice]:
    """Yield row slices of ``matrix`` (..., R, K) with about ``values`` values each.

    A GPU, which has no such cache to fill, gets larger ones.
    """
    rows = matrix.shape[-2]
    values = values if matrix.device.type == "cpu" else max(values, _GPU_BLOCK)
    step = max(1, values * rows // max(1, matrix.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def wide_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield row slices of ``matrix`` (..., R, K) and those rows in float64.

    All of them are in the same memory, which the next one overwrites: fresh memory for each would
    cost more than the arithmetic.
    """
    room: Tensor | None = None
    for rows in row_blocks(matrix):
        part = matrix[..., rows, :]
        if room is None or room.shape != part.shape:
            room = torch.empty(part.shape, dtype=torch.float64, device=part.device)
        yield rows, room.copy_(part)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector`` for (..., R, K) and (..., K) as float64 (..., R)."""
    return matmul(matrix, vector[..., None]).squeeze(-1)


def matmul(matrix: Tensor, other: Tensor) -> Tensor:
    """Return ``matrix @ other`` for (..., R, K) and (..., K, M) as float64 (..., R, M)."""
    return torch.cat([block @ other for _, block in wide_blocks(matrix)], -2)


def rmatvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix.T @ vector`` for (R, K) and (R,) as float64 (K,).

    A float32 matrix is summed in float32 over short runs of rows and in float64 over the runs,
    which costs no copy of it: the error is that of a sum of ``_RUN`` terms, averaged over the runs.
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    vector = vector.to(matrix.dtype)
    out = torch.zeros(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), _RUN):
        rows = slice(start, start + _RUN)
        out += vector[rows] @ matrix[rows]
    return out


def rmatmul(matrix: Tensor, other: Tensor) -> Tensor:
    """Return ``other @ matrix`` for (R, K) and (N, R) as float64 (N, K)."""
    out = other.new_zeros(len(other), matrix.shape[1], dtype=torch.float64)
    for rows, block in wide_blocks(matrix):
        out.addmm_(other[:, rows], block)
    return out


def outer_rest(matrix: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return what L R leaves of M, for (R, K), (R, N) and (N, K): the squares' sums, float64.

    The first (R,) are those of the rows, the second (K,) those of the columns. The differences are
    formed in float64: where many terms cancel in a sum, float32 would leave its own rounding.
    """
    rows, columns = left.new_zeros(len(left)), right.new_zeros(right.shape[1])
    for part, block in wide_blocks(matrix):
        squares = block.addmm_(left[part], right, alpha=-1.0).square_()
        rows[part] = squares.sum(1)
        columns += squares.sum(0)
    return rows, columns


def outer_residual(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ‖M − L R‖ / ‖M‖ for (R, K), (R, N), (N, K); 0 for zeros, NaN if the matrix holds one.

    Vectors (R,) and (K,) stand for N = 1. Then the differences are formed in the matrix's own
    precision, at least float32, their squares summed in float64: the result is right down to that
    precision, which is all the matrix can be compared to.
    """
    if left.dim() == 1:
        unit = _unit(left, right)
        rest = _zero(matrix)
        for _, difference in _differences(matrix, left, right, unit):
            rest += _square(difference)
        outer = (left / unit).square().sum() * right.square().sum()
    else:
        unit = _zero(matrix) + 1.0
        rest = outer_rest(matrix, left, right)[0].sum()
        outer = ((left.mT @ left) * (right @ right.mT)).sum()
    if float(rest) < _LITTLE**2 * float(outer):
        return _relative(rest, outer)  # ‖L R‖ is ‖M‖ to so many digits
    total = _zero(matrix)
    for rows in row_blocks(matrix):
        total += _square(matrix[rows].to(unit.dtype) / unit)
    return _relative(rest, total)


def rank_one_fit(matrix: Tensor, left: Tensor) -> tuple[Tensor, float]:
    """Return the r (K,) that minimises ‖M − l rᵀ‖ for (R, K), (R,), and ‖M − l rᵀ‖ / ‖M‖ there.

    The rows of the largest l give a first r, which their number makes better than one rounding.
    Where it leaves roundings of M, a large matrix has been looked at once, and r is as good as any;
    where it leaves noise, a second look takes the mean over all rows.
    """
    heaviest = left.abs().topk(min(_HEAVIEST, len(left))).indices
    weights = left[heaviest]
    largest = weights[0].abs()  # in other units the squares of a small l would underflow
    scaled = weights / largest
    first = (scaled @ matrix[heaviest].double()) / (largest * (scaled @ scaled))
    residual = outer_residual(matrix, left, first)
    if residual <= _ROUNDINGS * min(precision(matrix.dtype), precision(torch.float32)):
        return first, residual
    return _corrected(matrix, left, first)


def _corrected(matrix: Tensor, left: Tensor, first: Tensor) -> tuple[Tensor, float]:
    """Return what :func:`rank_one_fit` does, from what the r ``first`` leaves of all rows."""
    unit = _unit(left, first)
    square = left @ left
    pulled, rest = torch.zeros_like(first), _zero(matrix)
    for part, difference in _differences(matrix, left, first, unit):
        pulled += part @ difference
        rest += _square(difference)
    # With D = (M − l firstᵀ) / unit, all else follows from its size and from lᵀD, which is
    # ``unit`` times ``pulled``.
    outer, pulled = first / unit, unit * pulled
    total = rest + 2.0 * (pulled @ outer) + square * (outer @ outer)
    least = (rest - pulled @ pulled / square).clamp(min=0.0)
    return first + unit * pulled / square, _relative(least, total)


def _differences(
    matrix: Tensor, left: Tensor, right: Tensor, unit: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, block by block, l / unit and (M − l rᵀ) / unit, in at least float32.

    All differences are in the same memory, which the next one overwrites: of a block read once,
    all further looks find it in the core's cache.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    left, right = (left / unit).to(wide), right.to(wide)
    scale, room = 1.0 / float(unit), None
    step = len(range(*next(row_blocks(matrix)).indices(len(matrix))))
    for block, part in zip(torch.split(matrix, step), torch.split(left, step), strict=True):
        block = block.to(wide)
        if room is None or room.shape != block.shape:
            room = torch.empty_like(block)
        yield part, torch.addr(block, part, right, beta=scale, alpha=-1.0, out=room)


def _unit(left: Tensor, right: Tensor) -> Tensor:
    """Return the size of l rᵀ: in other units the squares of a small gradient would underflow."""
    size = left.abs().amax() * right.abs().amax()
    ends = torch.finfo(torch.float32)
    return torch.where(size > 0, size.clamp(ends.tiny, ends.max), torch.ones_like(size))


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=like.device)


def _relative(rest: Tensor, total: Tensor) -> float:
    return 0.0 if float(total) == 0.0 else float((rest / total).sqrt())


def _square(block: Tensor) -> Tensor:
    # In the block's precision: digits enough for a residual.
    flat = block.flatten()
    return (flat @ flat).double()
