"""The linear equations that chosen entries leave for the input, solved by conjugate gradients.

Weighted least squares of three kinds of equations: entries of the convolution's output, its
gradient, and neighbouring places being alike. The normal matrix of one sample is cheap to make: the
gradient's part is a sum over taps of one P×P matrix with its rows and columns moved, since all taps
of all output channels share Δᵀ Δ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.maxpool.stem import PooledConvolution

# Unknowns of one sample up to which the preconditioner has all of its channels in one matrix.
DENSE = 4600
# Keeps the factor of a nearly singular normal matrix real, relative to its diagonal.
_RIDGE = 1e-13


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
        return _descend(self.normal, self.right(), x, lambda rest: rest, steps, tolerance)

    def factors(self) -> list[Tensor]:
        """Return Cholesky factors of the normal matrix, blocks of each sample as ``_blocks``.

        The samples' equations are tied by the gradient alone.
        """
        inner = (self.delta * self.channel_weight).mT @ self.delta
        found = []
        for n in range(self.stem.samples):
            matrix = self._of_sample(inner, n)
            matrix.diagonal(dim1=-2, dim2=-1).add_(_RIDGE * float(matrix.diagonal().mean()))
            found.append(torch.linalg.cholesky_ex(matrix).L)
        return found

    def solved(self, x: Tensor, factors: list[Tensor], steps: int, tolerance: float) -> Tensor:
        """Return the solution, from ``x`` by conjugate gradients with ``factors`` before them."""
        stem, count = self.stem, len(factors)

        def before(rest: Tensor) -> Tensor:
            parts = rest.view(stem.channels, count, -1).transpose(0, 1)
            found = [
                torch.cholesky_solve(part.reshape(-1, factor.shape[-1], 1)[:, :, 0].mT, factor).mT
                if factor.shape[-1] == part.shape[-1]
                else torch.cholesky_solve(part.reshape(-1, 1), factor).view_as(part)
                for part, factor in zip(parts, factors, strict=True)
            ]
            return torch.stack(found).transpose(0, 1).reshape(rest.shape)

        return _descend(self.normal, self.right(), x, before, steps, tolerance)

    def _of_sample(self, inner: Tensor, n: int) -> Tensor:
        """Return the normal matrix of sample ``n``, or its mean over channels where too large."""
        stem = self.stem
        places, windows = stem.convolution.places, stem.windows
        here = slice(n * windows, (n + 1) * windows)
        index = stem.convolution.index.to(inner.device)
        own = inner[here, here]
        shared = inner.new_zeros(places + 1, places + 1)
        for taken in index:
            shared[taken[:, None], taken] += own
        shared = shared[:-1, :-1]
        weight, channels = self.entry_weight[:, here], stem.channels
        if channels * places > DENSE:
            square = stem.weight.square().view(len(weight), channels, -1).mean(1)  # (O, T)
            diagonal = inner.new_zeros(places + 1)
            diagonal.index_add_(0, index.flatten(), (square.mT @ weight).flatten())
            return shared + torch.diag(diagonal[:-1])
        whole = inner.new_zeros(channels * (places + 1), channels * (places + 1))
        first = torch.arange(channels, device=inner.device)[:, None] * (places + 1)
        for p in range(windows):
            taken = (first + index[:, p]).flatten()
            whole[taken[:, None], taken] += (stem.weight.mT * weight[:, p]) @ stem.weight
        blocks = whole.view(channels, places + 1, channels, places + 1)[:, :-1, :, :-1].clone()
        for c in range(channels):
            blocks[c, :, c] += shared
        return blocks.view(channels * places, -1)


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
    tolerance: float,
) -> Tensor:
    """Conjugate gradients for ``normal`` x = ``right``, ``before`` being the preconditioner."""
    rest = right - normal(x)
    ahead = before(rest)
    way = ahead.clone()
    size, enough = (rest * ahead).sum(), tolerance**2 * right.square().sum()
    for _ in range(steps):
        if float(rest.square().sum()) <= float(enough):
            break
        pull = normal(way)
        length = size / (way * pull).sum()
        x = x + length * way
        rest = rest - length * pull
        ahead = before(rest)
        now = (rest * ahead).sum()
        way, size = ahead + (now / size) * way, now
    return x
