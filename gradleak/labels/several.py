"""Several samples behind one head gradient: what becomes of a gradient of rank two or more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradleak.labels.factorise import Rank
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import FAMILIES, Family


def recover_several(
    grad_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    rank: Rank,
    *,
    families: Sequence[Family] = FAMILIES,
    column_sums: float | None = None,
) -> LabelResult:
    """Answer for one gradient (C, D) whose ``rank`` is not one, given the head's (C, D) weights.

    ``bias`` and ``grad_bias`` are (C,) or None, ``column_sums`` is what the answer reports of them.
    """
    del weight, bias, grad_bias, families
    classes, width = grad_weight.shape
    most = min(classes - 1, width)
    count = f"at least {most}" if rank.rank >= most else f"about {rank.rank}"
    return LabelResult(
        "failed",
        f"the head gradient has rank {rank.rank}: a batch of {count} samples, and only single "
        "samples are solved",
        "none",
        None,
        rank.rank,
        rank=rank.rank,
        noise=rank.noise,
        column_sums=column_sums,
    )
