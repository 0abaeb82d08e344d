"""A loss that was multiplied by something, recognised because no label fits without the factor.

At the wrong factor γ a single sample's gradient either has no label in the simplex, or, with a bias
gradient, one that is spread over all classes: (1 − γ) p + γ y. A hard, smoothed or mixed label with
one factor explains the C numbers of δ by far fewer, so where there is one, it is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from gradleak.errors import GradleakError
from gradleak.labels.verdict import LabelResult, SampleLabel
from gradleak.softlabels import ARBITRARY

# A label with more than this spread evenly over all classes is unusual, and under noise it cannot
# be told from a sharper one of a smaller loss, if that is apart from one by so many of its errors.
_SPREAD, _APART = 0.5, 3.0
# Relative standard error of a factor beyond which other labels with other factors fit as well;
# under noise, where no factor is as sure as that.
_SURE, _SURE_UNDER_NOISE = 1e-3, 0.05


def is_doubtful(found: LabelResult | GradleakError, *, noisy: bool) -> bool:
    """Return whether a single sample's answer may be that of a wrong factor of the loss."""
    if isinstance(found, GradleakError) or found.rank != 1:
        return False
    return found.verdict == "failed" or any(
        sample.family == ARBITRARY or (noisy and _is_spread(found, sample))
        for sample in found.samples
    )


def with_recognised_scale(
    plain: LabelResult | GradleakError, free: LabelResult | GradleakError, *, noisy: bool
) -> LabelResult | GradleakError:
    """Return the answer ``free`` in its factor where it is sure of a known family, or ``plain``.

    A genuine label of no family stays what it was. Under noise ``plain`` is one of two answers
    where ``free`` explains the gradient too, and is not sure.
    """
    if isinstance(free, GradleakError) or not free.samples:
        return plain
    (sample,) = free.samples
    if sample.family == ARBITRARY or sample.loss_scale is None or sample.loss_scale_error is None:
        return plain
    spread = isinstance(plain, LabelResult) and all(s.family != ARBITRARY for s in plain.samples)
    error = sample.loss_scale_error / sample.loss_scale
    if (
        free.verdict == "unique"
        and error < (_SURE_UNDER_NOISE if noisy else _SURE)
        and not (noisy and spread and _explained(plain))
    ):
        reason = (
            f"{free.reason}; the loss was multiplied by {sample.loss_scale:.4g} (summed, scaled or "
            "clipped), without which no label fits"
        )
        return replace(free, reason=reason)
    apart = abs(sample.loss_scale - 1.0) > _APART * sample.loss_scale_error
    if noisy and apart and _explained(plain) and _explained(free):
        return _undecided(plain, sample)
    return plain


def _explained(found: LabelResult | GradleakError) -> TypeGuard[LabelResult]:
    """Return whether there is an answer that fits the gradient, the only one or not."""
    return isinstance(found, LabelResult) and found.verdict in ("unique", "ambiguous")


def _is_spread(found: LabelResult, sample: SampleLabel) -> bool:
    """Return whether more of a label lies evenly on all classes than labels are smoothed by."""
    classes = 0 if found.labels is None else found.labels.shape[-1]
    return classes * sample.base > _SPREAD


def _undecided(plain: LabelResult, free: SampleLabel) -> LabelResult:
    """Return ``plain`` as one of two answers, the other with another factor of the loss."""
    return replace(
        plain,
        verdict="ambiguous",
        reason=f"{plain.reason}; but a loss multiplied by {free.loss_scale:.3g} leaves a "
        f"{free.family} label that noise does not tell from this one: see --loss-scale",
    )
