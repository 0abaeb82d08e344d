"""The linear equations that chosen entries leave for the input, solved by conjugate gradients.

Weighted least squares of three kinds of equations: entries of the convolution's output, its
gradient, and neighbouring places being alike. Blocks of the normal matrix are cheap to make: the
gradient's part is a sum over taps of one P×P matrix with its rows and columns moved, since all taps
of all output channels share Δᵀ Δ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.maxpool.precondition import BlockFactors, Diagonal, Preconditioner
from gradleak.calculus.maxpool.stem import PooledConvolution

# Unknowns of a sample, and of a channel, up to which that block of the normal matrix is factorised.
# Larger ones take longer to be applied than all else that a step does.
DENSE, LARGEST_BLOCK = 4600, 1600
# Keeps the factor of a nearly singular normal matrix real, relative to its diagonal.
_RIDGE = 1e-13
# Where conjugate gradients end: squared errors of each unknown in units of its variance, or so many
# steps with blocks and with the diagonal.
_ENOUGH, _STEPS, _STEPS_DIAGONAL = 1e-4, 60, 2000


@dataclass(frozen=True)
class Equations:
    """Weighted equations for an input (C, N·places).

    ``entry_weight`` and ``entry`` (O, N·P) are for the map that the pool reads, ``delta`` (O, N·P)
    and ``channel_weight`` (O, 1) for the gradient, ``smooth`` weighs differences of neighbours.
    """

    stem: PooledConvolution
    entry_weight: Tensor
    entry: Tensor
    delta: Tensor
    channel_weight: Tensor
    smooth: float = 0.0

    def normal(self, x: Tensor) -> Tensor:
        """Apply the normal matrix."""
        stem, patches = self.stem, self.stem.patches(x)
        back = stem.weight.mT @ (self.entry_weight * (stem.weight @ patches))
        back += (self.channel_weight * (self.delta @ patches.mT)).mT @ self.delta
        found = stem.spread(back)
        return found + self.smooth * _roughness(stem, x) if self.smooth > 0.0 else found

    def right(self) -> Tensor:
        """Return the right-hand side of the normal equations."""
        stem = self.stem
        target = self.entry - stem.shift[:, None]
        back = stem.weight.mT @ (self.entry_weight * target)
        back += (self.channel_weight * stem.gradient).mT @ self.delta
        return stem.spread(back)

    def approached(self, x: Tensor, steps: int, tolerance: float) -> Tensor:
        """Return ``x`` after at most ``steps`` of conjugate gradients: rough directions first."""
        right = self.right()
        enough = tolerance**2 * float(right.square().sum())
        return _descend(self.normal, right, x, lambda rest: rest, steps, enough)

    def preconditioner(self) -> Preconditioner:
        """Return the factors of the normal matrix's blocks, or its diagonal.

        A block is one sample, or one channel of one where that is too large.
        """
        stem = self.stem
        places = stem.convolution.places
        if places > LARGEST_BLOCK and stem.channels * places > DENSE:
            return Diagonal(self._diagonal())
        inner = (self.delta * self.channel_weight).mT @ self.delta
        factors = []
        for n in range(stem.samples):
            blocks = self._blocks(inner, n)
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            diagonal += _RIDGE * diagonal.mean(-1, keepdim=True)
            factors.append(torch.linalg.cholesky_ex(blocks).L)
        return BlockFactors(torch.stack(factors))

    def solved(self, x: Tensor, before: Preconditioner, ends: float) -> Tensor:
        """Return the solution, from ``x`` by conjugate gradients with a preconditioner.

        Where weights are inverse variances, it is the solution to a hundredth of its errors. At
        the time ``ends`` (of ``time.monotonic``) it is what there is.
        """
        steps = _STEPS if isinstance(before, BlockFactors) else _STEPS_DIAGONAL
        enough = _ENOUGH * x.numel()
        return _descend(self.normal, self.right(), x, before.solve, steps, enough, ends)

    def _diagonal(self) -> Tensor:
        """Return the diagonal (C, N·places) of the normal matrix; places never read have one."""
        entries = self.stem.weight.square().mT @ self.entry_weight
        gradient = (self.channel_weight * self.delta.square()).sum(0)
        found = self.stem.spread(entries + gradient)
        return torch.where(found > 0.0, found, 1.0)

    def _blocks(self, inner: Tensor, n: int) -> Tensor:
        """Return the blocks (B, n, n) of sample ``n``; ``inner`` is Δᵀ Δ, weighted."""
        stem = self.stem
        places, windows, channels = stem.convolution.places, stem.windows, stem.channels
        here = slice(n * windows, (n + 1) * windows)
        index, weight = stem.convolution.index.to(inner.device), self.entry_weight[:, here]
        own = inner[here, here]
        shared = inner.new_zeros(places + 1, places + 1)
        for taken in index:  # a tap reads no place twice, but for the padding
            shared[taken[:, None], taken] += own
        if channels * places > DENSE:
            blocks = shared.repeat(channels, 1, 1)
            taps = stem.weight.view(stem.outputs, channels, -1).permute(1, 2, 0)  # (C, T, O)
            for p, taken in enumerate(index.mT):
                blocks[:, taken[:, None], taken] += (taps * weight[:, p]) @ taps.mT
            return blocks[:, :-1, :-1].clone()
        size = channels * (places + 1)
        whole = inner.new_zeros(size, size)
        first = torch.arange(channels, device=inner.device)[:, None] * (places + 1)
        for p, read in enumerate(index.mT):
            taken = (first + read).flatten()
            whole[taken[:, None], taken] += (stem.weight.mT * weight[:, p]) @ stem.weight
        whole = whole.view(channels, places + 1, channels, places + 1)
        for c in range(channels):
            whole[c, :, c] += shared
        return whole[:, :-1, :, :-1].reshape(1, channels * places, -1)


def _roughness(stem: PooledConvolution, x: Tensor) -> Tensor:
    """Apply the Laplacian of the maps (C, N·places), with free borders."""
    maps = x.view(stem.channels, stem.samples, *stem.size)
    across, along = maps.diff(dim=-1), maps.diff(dim=-2)
    found = F.pad(across, (1, 0)) - F.pad(across, (0, 1))
    found = found + F.pad(along, (0, 0, 1, 0)) - F.pad(along, (0, 0, 0, 1))
    return found.view(x.shape)


def _descend(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    x: Tensor,
    before: Callable[[Tensor], Tensor],
    steps: int,
    enough: float,
    ends: float = math.inf,
) -> Tensor:
    """Conjugate gradients for ``normal`` x = ``right``, ``before`` being the preconditioner.

    They end when the rest's square, in the preconditioner's norm, is no more than ``enough``, and
    at the time ``ends``.
    """
    rest = right - normal(x)
    ahead = before(rest)
    way = ahead.clone()
    size = (rest * ahead).sum()
    for _ in range(steps):
        if not float(size) > enough or time.monotonic() > ends:
            break
        pull = normal(way)
        length = size / (way * pull).sum()
        x = x + length * way
        rest = rest - length * pull
        ahead = before(rest)
        now = (rest * ahead).sum()
        way, size = ahead + (now / size) * way, now
    return x
