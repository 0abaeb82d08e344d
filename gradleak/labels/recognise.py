"""A loss that was multiplied by something, recognised because no label fits without the factor.

At the wrong factor γ a single sample's gradient either has no label in the simplex, or, with a bias
gradient, one that is spread over all classes: (1 − γ) p + γ y. A hard, smoothed or mixed label with
one factor explains the C numbers of δ by far fewer, so where there is one, it is taken.
"""

from __future__ import annotations

from dataclasses import replace

from gradleak.errors import GradleakError
from gradleak.labels.verdict import LabelResult, SampleLabel
from gradleak.softlabels import ARBITRARY

# A label with more than this spread evenly over all classes is unusual, and under noise it cannot
# be told from a sharper one of a smaller loss, if that is apart from one by so many of its errors.
_SPREAD, _APART = 0.5, 3.0
# Relative standard error of a factor beyond which other labels with other factors fit as well;
# under noise, where no factor is as sure as that.
_SURE, _SURE_UNDER_NOISE = 1e-3, 0.05


def is_doubtful(found: LabelResult | GradleakError) -> bool:
    """Return whether a single sample's answer may be that of a wrong factor of the loss."""
    if isinstance(found, GradleakError) or found.rank != 1:
        return False
    return found.verdict == "failed" or any(
        s.family == ARBITRARY or _is_spread(found, s) for s in found.samples
    )


def _is_spread(found: LabelResult, sample: SampleLabel) -> bool:
    """Return whether a label is spread as that of a scaled loss is, and noise blurs how exactly."""
    return sample.intervals is not None and _evenly(found, sample) > _SPREAD


def with_recognised_scale(
    plain: LabelResult | GradleakError, free: LabelResult | GradleakError
) -> LabelResult | GradleakError:
    """Return the answer ``free`` in its factor where it is sure of a known family, or ``plain``.

    A genuine label of no family stays what it was.
    """
    if isinstance(free, GradleakError) or not free.samples:
        return plain
    if isinstance(plain, LabelResult) and any(_is_spread(plain, s) for s in plain.samples):
        return _undecided(plain, free.samples[0])
    (sample,) = free.samples
    if free.verdict != "unique" or sample.family == ARBITRARY or sample.loss_scale is None:
        return plain
    error = sample.loss_scale_error
    sure = _SURE if sample.intervals is None else _SURE_UNDER_NOISE
    if error is None or not error < sure * sample.loss_scale:
        return plain
    reason = (
        f"{free.reason}; the loss was multiplied by {sample.loss_scale:.4g} (summed, scaled or "
        "clipped), without which no label fits"
    )
    return replace(free, reason=reason)


def _evenly(found: LabelResult, sample: SampleLabel) -> float:
    """Return what of a label lies evenly on all classes."""
    classes = 0 if found.labels is None else found.labels.shape[-1]
    return classes * sample.base


def _undecided(plain: LabelResult, free: SampleLabel) -> LabelResult:
    """Return ``plain`` as one of two answers where another factor of the loss explains it too."""
    scale, error = free.loss_scale, free.loss_scale_error
    if plain.verdict != "unique" or scale is None:
        return plain
    if error is not None and abs(scale - 1.0) < _APART * error:
        return plain
    return replace(
        plain,
        verdict="ambiguous",
        reason=f"{plain.reason}; but a loss multiplied by {scale:.3g} leaves a {free.family} label "
        "that noise does not tell from this one: see --loss-scale",
    )
