"""What a long computation tells on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step: in which ``phase``, how many are ``done`` of ``total`` (None: not known).

    ``value`` is what the phase makes small: a residual, or an objective.
    """

    phase: str
    done: int
    total: int | None
    value: float


Progress = Callable[[Step], None]
