"""Whether a gradient is one of softmax cross-entropy: its columns sum to zero over the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.errors import InputError
from gradleak.labels.factorise import Rank, RankOne

# Column sums that rounding explains: relative to the gradient, and in roundings of p times the
# largest plausible mean feature, since a confident δ is no larger than the rounding of p itself.
_COLUMN_SUMS, _ROUNDINGS, _LARGEST_FEATURE = 1e-3, 16.0, 100.0
# Roundings by which a solved delta may fail to sum to zero: some, and some per class.
_DELTA_SUM, _DELTA_SUM_EACH = 64.0, 1.0


def column_sums(
    gradient: Tensor, leading: RankOne, ranks: Sequence[Rank]
) -> list[tuple[float, bool]]:
    """Return Σ_j |Σ_c G_cj| / Σ |G| of each gradient (B, C, D), and whether it counts as zero.

    Zero is what Theorem 1 of arXiv 2402.03124 says of softmax cross-entropy. A gradient of rank one
    is σ u vᵀ and its columns sum to σ (Σ u) v: no second look at it.
    """
    classes, width = gradient.shape[1:]
    spread = leading.sigma * leading.v.abs().sum(1)
    totals = (leading.u.sum(1).abs() * spread).tolist()
    sizes = (leading.u.abs().sum(1) * spread).tolist()
    found = []
    for b, (rank, unit) in enumerate(zip(ranks, leading.unit.tolist(), strict=True)):
        total, size = totals[b], sizes[b]
        if rank.rank > 1 or rank.noisy:
            total = float(gradient[b].sum(0, dtype=torch.float64).abs().sum())
            size = float(gradient[b].double().abs().sum())
        rounding = _ROUNDINGS * unit
        allowed = max(_COLUMN_SUMS, rounding) * size + rounding * _LARGEST_FEATURE * width
        if rank.noisy:
            allowed += 4.0 * rank.noise * math.sqrt(classes) * width
        found.append((total / size if size > 0.0 else 0.0, total <= allowed))
    return found


def allowed_delta_sum(classes: int, unit: Tensor) -> Tensor:
    """Return what of |Σ δ| rounding explains, for deltas of C classes and roundoffs ``unit``."""
    return (_DELTA_SUM + _DELTA_SUM_EACH * classes) * unit


def not_softmax(share: float) -> InputError:
    """Return the error for columns that sum to ``share`` of their size over the classes."""
    return InputError(
        f"the columns of the head gradient sum to {share:.2g} of its size over the classes instead "
        "of zero, so it is not a softmax cross-entropy gradient",
        "check the loss and the head (--head NAME), and whether it was pruned or quantised",
    )
