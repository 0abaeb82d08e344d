"""What a label attack answers: the label, how sure it is, and what else would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from gradleak.labels.counts import ClassCounts

Verdict = Literal["unique", "ambiguous", "unidentifiable", "failed"]
# Standard deviations of a normal distribution that hold 95 % of it.
INTERVAL_STDS = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A closed interval of a number; an end is infinite where nothing bounds it."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether ``value`` lies in it."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class LabelIntervals:
    """95 % intervals under noise: of the scale, the label at its classes, its base, the loss scale.

    They are those of the likelihood's profile: not symmetric, and within the simplex. ``base`` is
    None for a label without one, ``loss_scale`` where it was given.
    """

    scale: Interval
    weights: tuple[Interval, ...]
    base: Interval | None
    loss_scale: Interval | None = None


@dataclass(frozen=True)
class SampleLabel:
    """The recovered label of one sample.

    ``classes`` is the support by descending weight, ``weights`` the label's values there, ``base``
    its value everywhere else, ``scale`` the signed norm of the head's input along the gradient's
    right singular vector. ``loss_scale`` is the recovered factor of the loss, None where it was
    given. The ``*_error`` fields are one standard error each; under noise the answer has 95 %
    ``intervals`` besides.
    """

    family: str
    classes: tuple[int, ...]
    weights: tuple[float, ...]
    base: float
    scale: float
    weight_errors: tuple[float, ...]
    base_error: float
    scale_error: float
    loss_scale: float | None = None
    loss_scale_error: float | None = None
    intervals: LabelIntervals | None = None

    def uncertainty(self) -> float:
        """Return the largest standard error of any entry of the label."""
        return max((*self.weight_errors, self.base_error))

    def distance(self, other: SampleLabel, classes: int) -> float:
        """Return the largest difference of an entry between two labels of C ``classes``."""
        one = dict(zip(self.classes, self.weights, strict=True))
        two = dict(zip(other.classes, other.weights, strict=True))
        named = one.keys() | two.keys()
        apart = [abs(one.get(c, self.base) - two.get(c, other.base)) for c in named]
        if len(named) < classes:
            apart.append(abs(self.base - other.base))
        return max(apart)


def dense_labels(samples: Sequence[SampleLabel | None], classes: int) -> Tensor:
    """Return the (B, C) float64 labels that ``samples`` describe, zeros where there is none."""
    import torch

    named = [(b, sample) for b, sample in enumerate(samples) if sample is not None]
    bases = [0.0 if sample is None else sample.base for sample in samples]
    labels = torch.tensor(bases, dtype=torch.float64)[:, None].repeat(1, classes)
    places = [b * classes + c for b, sample in named for c in sample.classes]
    weights = [weight for _, sample in named for weight in sample.weights]
    labels.view(-1)[places] = torch.tensor(weights, dtype=torch.float64)
    return labels


@dataclass(frozen=True)
class LabelResult:
    """The answer of ``recover_label`` for one gradient bundle.

    ``labels`` is (N, C) float64 and ``features`` (N, D) float64: the best answer, also when the
    verdict is not ``unique``; both are None when there is none. ``residual`` is the relative
    residual of the re-simulated head gradient, ``noise`` the estimated standard deviation of the
    noise on one gradient entry; ``rank`` that of the head gradient, which is the number of samples;
    ``column_sums`` how far its columns are, relative, from summing to zero. ``intervals`` are
    those of the signed scale in which every label fits, where it is not determined. ``counts``
    estimates how many samples are of each class, if their labels are hard, where a batch is not
    recovered whole.
    """

    verdict: Verdict
    reason: str
    method: str
    family: str | None
    batch_size: int
    samples: tuple[SampleLabel, ...] = ()
    labels: Tensor | None = None
    features: Tensor | None = None
    residual: float | None = None
    noise: float | None = None
    rank: int | None = None
    column_sums: float | None = None
    alternatives: tuple[SampleLabel, ...] = ()
    intervals: tuple[Interval, ...] = ()
    counts: ClassCounts | None = None
    seconds: float = field(default=0.0, compare=False)
