"""What can be asked of the label solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradleak.softlabels import FAMILIES, Family


@dataclass(frozen=True)
class LabelOptions:
    """The question put to the solver.

    ``families`` may be assumed; ``method`` is ``auto``, ``bias`` or ``scale``; ``batch_size`` is
    the number N of samples. Without it that is the rank of the gradient, or ``recorded_size`` where
    that is known to be larger. ``noise_std`` is the standard deviation of the noise on an entry of
    the gradient, estimated if None; ``loss_scale`` the factor γ of the loss, None if it is unknown.
    With ``recognise`` another factor is tried where a single sample's gradient leaves no label of a
    known family at ``loss_scale``. ``seed`` is that of the starts of a batch's search.
    """

    families: Sequence[Family] = FAMILIES
    method: str = "auto"
    batch_size: int | None = None
    recorded_size: int | None = None
    noise_std: float | None = None
    loss_scale: float | None = 1.0
    recognise: bool = False
    seed: int = 0

    @property
    def counted(self) -> bool:
        """Whether the number N of samples is known, and not taken from the rank."""
        return self.batch_size is not None or self.recorded_size is not None

    def samples(self, rank: int) -> int:
        """Return the number N of samples behind a gradient of this rank."""
        if self.batch_size is not None:
            return self.batch_size
        return rank if self.recorded_size is None else max(rank, self.recorded_size)
