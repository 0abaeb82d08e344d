"""A loss that was multiplied by something, recognised because no label fits without the factor.

At the wrong factor γ a single sample's gradient either has no label in the simplex, or, with a bias
gradient, one that is spread over all classes: (1 − γ) p + γ y. A hard, smoothed or mixed label with
one factor explains the C numbers of δ by far fewer, so where there is one, it is taken.
"""

from __future__ import annotations

from dataclasses import replace

from gradleak.errors import GradleakError
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import ARBITRARY

# Relative standard error of a factor beyond which other labels with other factors fit as well.
_SURE = 1e-3


def is_doubtful(found: LabelResult | GradleakError) -> bool:
    """Return whether a single sample's answer may be that of a wrong factor of the loss."""
    if isinstance(found, GradleakError) or found.rank != 1:
        return False
    return found.verdict == "failed" or any(s.family == ARBITRARY for s in found.samples)


def with_recognised_scale(
    plain: LabelResult | GradleakError, free: LabelResult | GradleakError
) -> LabelResult | GradleakError:
    """Return the answer ``free`` in its factor where it is sure of a known family, or ``plain``.

    A genuine label of no family stays what it was.
    """
    if isinstance(free, GradleakError) or free.verdict != "unique" or not free.samples:
        return plain
    (sample,) = free.samples
    if sample.family == ARBITRARY or sample.loss_scale is None:
        return plain
    error = sample.loss_scale_error
    if error is None or not error < _SURE * sample.loss_scale:
        return plain
    reason = (
        f"{free.reason}; the loss was multiplied by {sample.loss_scale:.4g} (summed, scaled or "
        "clipped), without which no label fits"
    )
    return replace(free, reason=reason)
