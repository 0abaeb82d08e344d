"""A batch at a head whose weight is zero, as some networks begin: every sample has the same p.

With W = 0 and one bias for all classes, p = 1/C whatever the feature, and the search by the shape
of p has nothing to go by. It needs none: all classes without a label have the same row v of the
gradient (bias gradient included), and a class k of one sample has

    v_k = v − (1 − α_k) [x_k, 1] / N,

so that the bias's entry gives the smoothing α_k, and the rest the feature. Mixed labels, and
several samples of one class, which merge into one row, are not of this kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.labels.batch.judge import residual_of
from gradleak.labels.factorise import Rank
from gradleak.labels.verdict import LabelResult, SampleLabel
from gradleak.linalg import precision
from gradleak.softlabels import MIXED

_METHOD = "constant"
# Roundings of the gradient's largest entries that a row may differ by and be the same.
_SAME = 64.0
# How far above 1 rounding may carry 1 − α; below that distance from 1 a label counts as hard.
_HARD = 1e-5


def recover_constant(
    grad_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    *,
    samples: int,
    rank: Rank,
) -> LabelResult | None:
    """Return hard and smoothed labels of ``samples`` classes at a head (C, D) of zero weight.

    None where the head is not zero, the bias gradient is not there, or the gradient is not of that
    kind; the search then says what it can.
    """
    if grad_bias is None or rank.noisy or bool(weight.any()):
        return None
    if bias is not None and float(bias.max() - bias.min()) > 0.0:
        return None
    classes = len(weight)
    rows = torch.cat([grad_weight.double(), grad_bias.double()[:, None]], 1)
    allowed = _SAME * precision(grad_weight.dtype) * rows.abs().amax(0)
    labelled = ((rows - rows.median(0).values).abs() > allowed).any(1)
    if int(labelled.sum()) != samples or 2 * samples >= classes:
        return None
    support = labelled.nonzero().flatten()
    shares = rows[~labelled].mean(0) - rows[support]
    kept = samples * shares[:, -1]
    if not bool(((kept > 0.0) & (kept <= 1.0 + _HARD)).all()):
        return None
    kept = torch.where((kept - 1.0).abs() < _HARD, 1.0, kept)
    features = shares[:, :-1] / shares[:, -1:]
    base = (1.0 - kept) / classes
    labels = base[:, None].expand(-1, classes).clone()
    labels[torch.arange(samples), support] += kept
    residual = residual_of(grad_weight, 1.0 / classes - labels, features, float(samples))
    if residual > _SAME * precision(grad_weight.dtype):
        return None
    error = precision(grad_weight.dtype) * samples
    found = tuple(
        SampleLabel(
            family="hard" if float(kept[n]) == 1.0 else "smooth",
            classes=(int(support[n]),),
            weights=(float(kept[n] + base[n]),),
            base=float(base[n]),
            scale=float(torch.linalg.vector_norm(features[n])),
            weight_errors=(error,),
            base_error=error / classes,
            scale_error=error * float(torch.linalg.vector_norm(features[n])),
        )
        for n in range(samples)
    )
    names = {sample.family for sample in found}
    return LabelResult(
        verdict="unique",
        reason=f"{samples} samples of different classes at a head of zero weight, where the "
        "gradient's rows are their features",
        method=_METHOD,
        family=names.pop() if len(names) == 1 else MIXED,
        batch_size=samples,
        samples=found,
        labels=labels.cpu(),
        features=features,
        residual=residual,
        rank=rank.rank,
        noise=rank.noise,
    )
