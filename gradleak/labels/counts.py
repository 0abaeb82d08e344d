"""How many samples of a batch are of each class, where the samples themselves are out of reach.

Hard labels: with one virtual sample a class, feature μ_k and share w_k = count_k / N,

    G ≈ Σ_k w_k (p_k − e_k) μ_kᵀ        g_b ≈ Σ_k w_k (p_k − e_k)        p_k = softmax(W μ_k + b)

The fit starts where all features are alike, δ̄ = p(x̄) − w, and lets them differ as little as the
gradient asks for. It is an estimate: samples of a class need not be alike, and what the network is
sure of leaves no trace. So it is checked in three ways: how well the counts explain the gradient,
whether fits from other starts agree on them, and how sure the network is of its samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import UsageError
from gradleak.labels.counts_fit import CountBatch, check_counts, fit_counts, round_counts

# A residual, a disagreement or a mean confidence above these leaves the counts without a basis.
_EXPLAINED, _AGREED, _SURE = 0.1, 0.1, 0.4
# A disagreement above this is worse than not to fit at all, unless the gradient shows that the
# network predicts some classes by more than this too often.
_ADRIFT, _BIASED = 0.2, 0.3


@dataclass(frozen=True)
class ClassCounts:
    """An estimate of a batch's hard labels: ``counts`` (C,) int64, Σ = N.

    ``fractions`` (C,) float64 are the shares before rounding, Σ = 1. ``residual`` is the relative
    misfit of the gradient re-simulated from the rounded counts; ``disagreement`` in [0, 1] the
    largest total variation between the shares of fits that explain the gradient about as well;
    ``confidence`` in [−1, 1] how much more probable the network finds the fitted samples' own
    classes than it finds them in the whole batch, on average. ``consistent`` says whether all three
    are low enough for the counts to mean something, and ``reason`` says it in words.
    """

    counts: Tensor
    fractions: Tensor
    residual: float
    disagreement: float
    confidence: float
    consistent: bool
    reason: str


def count_labels(
    grad_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    samples: int,
) -> ClassCounts:
    """Estimate how many of N hard-labelled ``samples`` are of each class.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None, the gradient
    the mean over the samples. Without a bias gradient the scale of the features is searched too.
    Raises :class:`UsageError` for fewer than one sample.
    """
    if samples < 1:
        raise UsageError(f"a batch of {samples} samples", "give --batch-size from 1")
    # Autograd takes part, whatever mode the caller works in.
    with torch.inference_mode(False):
        batch = CountBatch.of(grad_weight, weight, bias, grad_bias, samples)
        if batch is None:
            alike = torch.full((len(weight),), 1.0 / len(weight), dtype=torch.float64)
            why = "the gradient is zero and says nothing of the labels"
            return ClassCounts(round_counts(alike, samples), alike, 1.0, 1.0, 1.0, False, why)
        return _count(batch)


def _count(batch: CountBatch) -> ClassCounts:
    """Fit the batch, check the fit, and say what it is worth."""
    fit, others = fit_counts(batch)
    shares = fit.shares(batch.classes)
    counts = round_counts(shares, batch.samples)
    residual, confidence = check_counts(batch, fit, counts)
    apart = [0.5 * float((shares - other.shares(batch.classes)).abs().sum()) for other in others]
    disagreement = max(apart, default=0.0)
    # Without a bias gradient any scale can be made to fit, unless each sample is overdetermined.
    free = batch.grad_bias is None and 2 * batch.samples + 1 >= batch.classes
    if free:
        why = "without a bias gradient so many samples leave the scale of their features open"
    elif confidence > _SURE:
        why = f"the network knows its samples (by {confidence:.2g}), which then leave no trace"
    elif disagreement > _AGREED:
        why = f"fits that differ in {100.0 * disagreement:.2g} % of the samples do equally well"
    else:
        why = f"re-simulated from the counts, the gradient is off by {100.0 * residual:.2g} %"
    adrift = confidence > _SURE or disagreement > _ADRIFT
    if adrift and batch.grad_bias is not None and batch.favoured() < _BIASED:
        # No more than that a network predicts every class alike, on average.
        shares = _fill(-batch.grad_bias)
        counts = round_counts(shares, batch.samples)
    checks = (residual / _EXPLAINED, disagreement / _AGREED, confidence / _SURE)
    return ClassCounts(
        counts=counts.cpu(),
        fractions=shares.cpu(),
        residual=residual,
        disagreement=disagreement,
        confidence=confidence,
        consistent=max(checks) <= 1.0 and not free,
        reason=why,
    )


def _fill(lack: Tensor) -> Tensor:
    """Return shares max(0, t + lack) with the level t at which they sum to one."""
    ordered = lack.sort(descending=True).values
    level = (1.0 - ordered.cumsum(0)) / torch.arange(1, len(lack) + 1).to(lack)
    last = int((ordered + level > 0.0).nonzero().max())
    return (level[last] + lack).clamp(min=0.0)
