"""What a walk leaves behind: the maps it recovered, and what it did not get past."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradleak.calculus.layer import Estimate


@dataclass(frozen=True)
class PeeledMap:
    """The input (N, …) of the layers ``names``, with what its equations say of it.

    ``equations`` and ``unknowns`` are those of one channel; ``changed`` counts the units of the
    rectifier above that were settled against their first reading. ``with_output`` says that what is
    known of the layers' outputs was needed besides.
    """

    names: tuple[str, ...]
    estimate: Estimate
    equations: int
    unknowns: int
    condition: float
    residual: float
    changed: int
    with_output: bool = False

    @property
    def spare(self) -> float:
        """Equations beyond the unknowns; without any, no residual tells of a mistake."""
        return math.inf if self.with_output else self.equations - self.unknowns


@dataclass(frozen=True)
class Barrier:
    """An operation that the walk did not get past, and ``why``."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"
