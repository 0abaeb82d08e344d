"""What a layer with weights reads: the windows that its gradient sums over (ALGORITHMS §6a).

A convolution's gradient is a sum over its windows,

    G[o, c, t] = Σ_n Σ_p δ[n, o, p] x[n, c, i(t, p)],

with i(t, p) the place that tap t of window p reads. So G is linear in the input x, by one matrix
for all input channels. A Linear layer is the case of one tap, one window and one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """Which place (of H·W, or of 1) each tap of each window reads.

    ``index`` (T, P) int64 holds T taps of P windows; what lies in the padding has the index
    ``places``, one beyond the last.
    """

    index: Tensor
    places: int

    @classmethod
    def of_convolution(
        cls,
        size: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Window:
        """Return the windows of a convolution over a map of ``size`` (H, W)."""
        places = size[0] * size[1]
        # unfold pads with zeros, so places are counted from one.
        ones = torch.arange(1, places + 1, dtype=torch.float64).view(1, 1, *size)
        index = F.unfold(ones, kernel, dilation, padding, stride)[0].long() - 1
        return cls(torch.where(index < 0, places, index), places)

    @classmethod
    def of_linear(cls) -> Window:
        """Return the one window of a Linear layer."""
        return cls(torch.zeros(1, 1, dtype=torch.long), 1)

    @property
    def taps(self) -> int:
        """Number of taps T of one window."""
        return self.index.shape[0]

    def matrix(self, delta: Tensor) -> Tensor:
        """Return A (O·T, N·places) with G = A x, for ``delta`` (N, O, P).

        Rows go by output channel and tap, as those of G (O, C, T) seen as (O·T, C); columns by
        sample and place.
        """
        samples, channels, _ = delta.shape
        whole = delta.new_zeros(channels, self.taps, samples, self.places + 1)
        index = self.index.to(delta.device)[None, :, None].expand(channels, -1, samples, -1)
        spread = delta.transpose(0, 1)[:, None].expand(-1, self.taps, -1, -1)
        whole.scatter_add_(3, index, spread)
        return whole[..., :-1].reshape(channels * self.taps, samples * self.places)

    def patches(self, x: Tensor) -> Tensor:
        """Return what the windows read (N, C, T, P) of ``x`` (N, C, places)."""
        padded = F.pad(x, (0, 1))
        return padded[..., self.index.to(x.device)]

    def gradient(self, delta: Tensor, x: Tensor) -> Tensor:
        """Return G (O, C, T) for ``delta`` (N, O, P) and ``x`` (N, C, places)."""
        return torch.einsum("nop,nctp->oct", delta, self.patches(x))
