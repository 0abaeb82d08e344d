"""What training mode makes of a network: batch statistics, and dropout's masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every BatchNorm normalise by the batch it is given, in eval mode too, and return it.

    In place. Dropout, whose masks nobody can repeat, stays off in eval mode.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def drops_units(model: nn.Module) -> bool:
    """Return whether a forward pass in train mode draws dropout masks."""
    return any(isinstance(module, _DropoutNd) and module.p > 0.0 for module in model.modules())


@contextlib.contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers afterwards: a forward pass in train mode moves the running statistics."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
