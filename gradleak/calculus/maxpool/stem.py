"""A convolution whose output is seen through a max-pool: what is known of it, as matrices.

The map that the pool reads is z = W P(x) + b, W and b with the scale of a BatchNorm in them; known
are the maxima of z (rectified, where there is a ReLU) over the pool's windows, ∂loss/∂maximum, and
the convolution's own gradient. All samples are seen as one: the N·P windows of the convolution are
one axis, the N·Q of the pool another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.window import Window


@dataclass(frozen=True)
class PooledConvolution:
    """What is known of N samples of a convolution (O, C, T taps) under a pool.

    ``convolution`` reads maps of ``size`` (H, W), ``pool`` the map of the convolution's P windows.
    ``weight`` (O, C·T) and ``shift`` (O,) map patches to what the pool reads; ``gradient``
    (O, C·T) is that of the convolution itself. ``value`` (N, O, Q) are the maxima with errors
    ``std``; ``delta`` (N, O, Q) is δ at them times the slope of what lies between the convolution
    and the pool. Where ``rectified``, a maximum is at least zero, and at zero passes no δ.
    """

    convolution: Window
    pool: Window
    size: tuple[int, int]
    weight: Tensor
    shift: Tensor
    gradient: Tensor
    value: Tensor
    std: Tensor
    delta: Tensor
    rectified: bool

    @property
    def samples(self) -> int:
        """Number of samples N."""
        return len(self.value)

    @property
    def outputs(self) -> int:
        """Number of output channels O."""
        return len(self.weight)

    @property
    def channels(self) -> int:
        """Number of input channels C."""
        return self.weight.shape[1] // self.convolution.taps

    @property
    def windows(self) -> int:
        """Number of windows P of the convolution over one sample."""
        return self.convolution.index.shape[1]

    @functools.cached_property
    def reads(self) -> Tensor:
        """Where the taps of all windows read (T, N·P) of N·places; N·places in the padding."""
        return _tiled(self.convolution, self.samples).to(self.weight.device)

    @functools.cached_property
    def pools(self) -> Tensor:
        """Which windows of the convolution those of the pool read (K, N·Q), N·P in the padding."""
        return _tiled(self.pool, self.samples).to(self.weight.device)

    def zeros(self) -> Tensor:
        """Return an input (C, N·places) of zeros."""
        return self.weight.new_zeros(self.channels, self.samples * self.convolution.places)

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches (C·T, N·P) of an input (C, N·places)."""
        return F.pad(x, (0, 1))[:, self.reads].reshape(self.weight.shape[1], -1)

    def spread(self, patches: Tensor) -> Tensor:
        """Return the transpose of :meth:`patches`, a sum over windows (C, N·places)."""
        sums = patches.new_zeros(self.channels, self.samples * self.convolution.places + 1)
        sums.index_add_(1, self.reads.flatten(), patches.reshape(self.channels, -1))
        return sums[:, :-1]

    def output(self, patches: Tensor) -> Tensor:
        """Return the map that the pool reads (O, N·P)."""
        return self.weight @ patches + self.shift[:, None]

    def joined(self, maps: Tensor) -> Tensor:
        """Return (N, O, …) as (O, N·…)."""
        return maps.transpose(0, 1).reshape(maps.shape[1], -1)

    def maps(self, x: Tensor) -> Tensor:
        """Return an input (C, N·places) as (N, C, H, W)."""
        return x.view(self.channels, self.samples, *self.size).transpose(0, 1)


def _tiled(window: Window, samples: int) -> Tensor:
    """Return the index (T, N·P) of a window over ``samples`` maps laid one behind the other."""
    index, places = window.index, window.places
    parts = [
        torch.where(index == places, samples * places, index + n * places) for n in range(samples)
    ]
    return torch.cat(parts, 1)
