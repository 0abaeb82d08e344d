"""Choosing the device: ``auto`` takes CUDA when it is there, a named one must exist."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gradleak.errors import UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device called ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises :class:`UsageError` for another name, or for CUDA where there is none: nothing falls back
    to the CPU silently.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if found is None:
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:N")
    if name != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(found[1] or 0) >= count:
            raise UsageError(
                f"device '{name}' is not there ({count} CUDA devices found)", "use --device cpu"
            )
    return torch.device(name)
