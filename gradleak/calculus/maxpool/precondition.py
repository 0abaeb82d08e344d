"""What is easily inverted of a normal matrix: its blocks, or its diagonal where they are too large.

Both go before conjugate gradients, and both give the errors of an unknown with those outside its
block known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFactors:
    """Cholesky factors (N, B, n, n) of blocks: one of each sample, or one of each channel of it."""

    factors: Tensor

    def solve(self, rest: Tensor) -> Tensor:
        """Apply the inverse of the blocks to (C, N·places)."""
        samples, blocks = self.factors.shape[:2]
        parts = rest.view(len(rest), samples, -1).transpose(0, 1)
        if blocks > 1:
            found = torch.cholesky_solve(parts[..., None], self.factors)[..., 0]
        else:  # one by one: together they would be copied
            found = torch.stack(
                [
                    torch.cholesky_solve(part.reshape(-1, 1), factor[0]).view_as(part)
                    for part, factor in zip(parts, self.factors, strict=True)
                ]
            )
        return found.transpose(0, 1).reshape(rest.shape)

    def spread(self, like: Tensor) -> Tensor:
        """Return the standard deviations of the unknowns, in the shape (C, N·places) of ``like``.

        They are those of equations whose weights are the inverse squares of their errors.
        """
        samples, channels = len(self.factors), len(like)
        spread = torch.cholesky_inverse(self.factors).diagonal(dim1=-2, dim2=-1).sqrt()
        return spread.reshape(samples, channels, -1).transpose(0, 1).reshape(like.shape)

    def condition(self) -> float:
        """Return the largest ratio of two pivots of one block."""
        pivots = self.factors.diagonal(dim1=-2, dim2=-1)
        return float((pivots.amax(-1) / pivots.amin(-1)).amax())


@dataclass(frozen=True)
class Diagonal:
    """The ``diagonal`` (C, N·places) alone."""

    diagonal: Tensor

    def solve(self, rest: Tensor) -> Tensor:
        """Divide ``rest`` (C, N·places) by it."""
        return rest / self.diagonal

    def spread(self, like: Tensor) -> Tensor:
        """Return the standard deviations (C, N·places), each with all other unknowns known."""
        return self.diagonal.rsqrt().to(like)

    def condition(self) -> float:
        """Return the square root of the largest ratio of two entries."""
        return float((self.diagonal.amax() / self.diagonal.amin()).sqrt())


Preconditioner = BlockFactors | Diagonal
