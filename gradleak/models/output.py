"""The logits in what a network returns: alone, or in the record that some libraries wrap around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def logits_in(output: object) -> object:
    """Return the ``logits`` of a mapping or record, the first of a tuple, else the output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    return output


def giving_logits(model: nn.Module) -> nn.Module:
    """Make ``model`` return its logits alone, in place, and return it."""
    if not any(hook is _logits for hook in model._forward_hooks.values()):
        model.register_forward_hook(_logits)
    return model


def _logits(_model: nn.Module, _inputs: Any, output: object) -> object:
    return logits_in(output)
