"""Soft labels: how they are built, and the families that a solver may assume.

A label is a point of the simplex. The families (ALGORITHMS §1) are described by two facts: on how
many classes it has weights of its own (its *support*) and whether every other class shares one
positive value (its *base*, α/C of label smoothing) or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradleak.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A label family: ``support`` classes with weights of their own, a shared ``base`` or none."""

    name: str
    support: int
    base: bool

    @property
    def parameters(self) -> int:
        """Continuous label parameters: λ's of the mixture, and α where there is a base."""
        return self.support - 1 + int(self.base)


FAMILIES: tuple[Family, ...] = (
    Family("hard", 1, False),
    Family("smooth", 1, True),
    Family("mixup", 2, False),
    Family("mixup+smooth", 2, True),
    Family("mixup3", 3, False),
    Family("mixup3+smooth", 3, True),
)

ARBITRARY = "arbitrary"
"""The name given to a label that fits none of the families."""

MIXED = "mixed"
"""The name given to a batch whose labels are of different families."""


def families(name: str = "auto") -> tuple[Family, ...]:
    """Return the families that ``name`` stands for: all of them for ``auto``, else that one.

    Raises :class:`UsageError` for an unknown name.
    """
    if name == "auto":
        return FAMILIES
    chosen = tuple(family for family in FAMILIES if family.name == name)
    if not chosen:
        known = ", ".join(family.name for family in FAMILIES)
        raise UsageError(f"unknown label family '{name}'", f"choose auto or one of {known}")
    return chosen


def family_name(support: int, base: bool) -> str:
    """Return the name of the family with this many support classes, with or without a base."""
    for family in FAMILIES:
        if family.support == support and family.base == base:
            return family.name
    return ARBITRARY


def soft_label(weights: Sequence[tuple[int, float]], classes: int, smooth: float = 0.0) -> Tensor:
    """Build one soft label (1 − α) Σ λ_k e_k + α/C as a float64 tensor of shape ``(C,)``.

    ``weights`` holds pairs (class k, λ_k) whose λ sum to one; ``smooth`` is α in [0, 1].
    Raises :class:`UsageError` for a class outside [0, C), a λ or an α outside [0, 1], or λ that do
    not sum to one.
    """
    import torch

    if not 0.0 <= smooth <= 1.0:
        raise UsageError(f"smoothing {smooth} is outside [0, 1]", "give α between 0 and 1")
    if abs(sum(weight for _, weight in weights) - 1.0) > 1e-9:
        raise UsageError("mixture weights do not sum to one", "give λ and 1 − λ")
    label = torch.full((classes,), smooth / classes, dtype=torch.float64)
    for index, weight in weights:
        if not 0 <= index < classes:
            raise UsageError(
                f"label {index} is outside [0, {classes})", f"give a class from 0 to {classes - 1}"
            )
        if not 0.0 <= weight <= 1.0:
            raise UsageError(f"mixture weight {weight} is outside [0, 1]", "give λ between 0 and 1")
        label[index] += (1.0 - smooth) * weight
    return label
