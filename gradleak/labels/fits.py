"""Candidates of the scale search, refined and described: what is known of each fit (§3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fits:
    """Refined candidates, all tensors (B, M) unless stated.

    ``family`` (M,) is the table index, ``top`` (B, M, K) the classes of the largest label entries,
    ``weights`` (B, M, K) their values, ``base`` the value elsewhere; ``chi2`` the weighted sum of
    squares over ``freedom`` = equations − unknowns; ``scale_error`` the standard error of log|s|,
    ``weight_error`` and ``base_error`` those of the label with the scale's own included;
    ``*_sharpness`` the same with the scale held fixed; ``feasible`` whether the label lies in the
    simplex and uses all its parameters.
    """

    scale: Tensor
    family: Tensor
    top: Tensor
    weights: Tensor
    base: Tensor
    chi2: Tensor
    freedom: Tensor
    scale_error: Tensor
    weight_error: Tensor
    base_error: Tensor
    weight_sharpness: Tensor
    base_sharpness: Tensor
    feasible: Tensor

    def quality(self) -> Tensor:
        """Return (B, M) the misfit by degree of freedom, inf where the label is not feasible."""
        misfit = self.chi2 / self.freedom.clamp(min=1)
        return torch.where(self.feasible, misfit, math.inf)

    def at(self, index: Tensor) -> Fits:
        """Return the candidates of the problems in ``index`` (K,)."""
        fields = {n: value if n == "family" else value[index] for n, value in vars(self).items()}
        return Fits(**fields)

    def joined(self, more: Fits, index: Tensor) -> Fits:
        """Append candidates of the problems in ``index``; the others get infeasible ones."""
        fields = {"family": torch.cat([self.family, more.family])}
        for name, value in vars(self).items():
            if name != "family":
                new = getattr(more, name)
                wide = new.new_zeros((len(value), *new.shape[1:]))
                wide[index] = new
                fields[name] = torch.cat([value, wide], 1)
        return Fits(**fields)


def side_by_side(parts: Sequence[Fits]) -> Fits:
    """Return several fits of the same problems as one."""
    names = vars(parts[0])
    fields = {n: torch.cat([getattr(part, n) for part in parts], int(n != "family")) for n in names}
    return Fits(**fields)
