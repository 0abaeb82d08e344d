"""A batch in its own subspace (ALGORITHMS §4).

The head gradient of N samples has rank N: G = (1/M) Σ δ_n x_nᵀ = U S Vᵀ, where M is N for the mean
of the losses and N/γ if they are multiplied by γ. Every feature is x_n = V a_n and every delta
δ_n = U c_n, with a_n and c_n of N numbers each, and

    S = (1/M) Σ c_n a_nᵀ,     so  a_mᵀ S⁻¹ c_n = M if m = n, and 0 otherwise.

The diagonal of the second equation is Wedderburn's rank reduction: taking δ xᵀ/M out of G lowers
its rank by one exactly when aᵀS⁻¹c = M. So a single sample can be recognised as one of the batch
without knowing the others, and taken out, which leaves a smaller problem of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.factorise import Rank
from gradleak.labels.sketch import leading_triples
from gradleak.linalg import effective_precisions, precision

# A singular value is small if it is below this part of the largest.
_WEAK = 1e-3


@dataclass(frozen=True)
class Subspace:
    """What is left of a batch of ``samples`` = N: the n that are not taken out yet.

    ``mass`` is M, or 1 where it is not ``mass_known``.

    ``left`` (C, n) U, ``values`` (n,) the diagonal of S, ``right`` (D, n) V, ``logits`` (C, n)
    W V, ``bias`` (C,) of the head; all float64. ``noise`` is the standard deviation of one entry of
    the gradient, rounding included, ``noisy`` whether it exceeds rounding, and ``unit`` the
    roundoff of its precision. With a bias gradient every feature has one more entry, which is one:
    ``unit_row`` (n,) is its row of V, so unit_row · a_n = 1. ``turn`` (N, n) takes coordinates back
    to the whole subspace, V = V_whole ``turn``.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    logits: Tensor
    bias: Tensor
    samples: int
    mass: float
    mass_known: bool
    noise: float
    noisy: bool
    unit: float
    unit_row: Tensor | None
    turn: Tensor

    @property
    def size(self) -> int:
        """Number n of samples that are left."""
        return len(self.values)

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.left.shape[0]

    def weak(self) -> Tensor:
        """Return (n,) which singular values are small beside the largest.

        Along their directions samples of one class differ that the network hardly tells apart.
        """
        return self.values < _WEAK * self.values[0]

    def probabilities(self, a: Tensor) -> Tensor:
        """Return (..., C) softmax(W V a + b) of coordinates ``(..., n)``."""
        return torch.softmax(a @ self.logits.T + self.bias, -1)

    def membership(self, a: Tensor, c: Tensor) -> Tensor:
        """Return (K,) aᵀS⁻¹c / M, which is one for the samples of the batch; M if unknown."""
        return (a / self.values * c).sum(1) / self.mass

    def without(self, a: Tensor, c: Tensor) -> Subspace:
        """Take K samples with coordinates ``a`` and ``c`` (K, n) out, which leaves n − K."""
        rest = torch.diag(self.values) - c.T @ a / self.mass
        u, s, vh = torch.linalg.svd(rest)
        keep = self.size - len(a)
        turn = vh[:keep].T
        return Subspace(
            left=self.left @ u[:, :keep],
            values=s[:keep],
            right=self.right @ turn,
            logits=self.logits @ turn,
            bias=self.bias,
            samples=self.samples,
            mass=self.mass,
            mass_known=self.mass_known,
            noise=self.noise,
            noisy=self.noisy,
            unit=self.unit,
            unit_row=None if self.unit_row is None else self.unit_row @ turn,
            turn=self.turn @ turn,
        )


def subspace_of(
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    *,
    rank: Rank,
    samples: int,
    loss_scale: float | None = 1.0,
) -> Subspace:
    """Factorise the head gradient ``(C, D)`` of a batch of ``samples`` = N into its ``rank``.

    ``weight`` is (C, D), ``bias`` and ``grad_bias`` (C,) or None. The bias gradient is one more
    column, that of a feature which is always one. ``loss_scale`` is γ, None if unknown.
    """
    wide, w = gradient.double(), weight.double()
    b = torch.zeros_like(wide[:, 0]) if bias is None else bias.double()
    if grad_bias is not None:
        wide = torch.cat([wide, grad_bias.double()[:, None]], 1)
        w, b = torch.cat([w, b[:, None]], 1), torch.zeros_like(b)
    u, s, v = leading_triples(wide - wide.mean(0), rank.rank)
    return Subspace(
        left=u,
        values=s,
        right=v[: gradient.shape[1]],
        logits=w @ v,
        bias=b,
        samples=samples,
        mass=1.0 if loss_scale is None else samples / loss_scale,
        mass_known=loss_scale is not None,
        noise=rank.noise,
        noisy=rank.noisy,
        unit=max(float(effective_precisions(gradient[None])[0]), precision(weight.dtype)),
        unit_row=None if grad_bias is None else v[-1],
        turn=torch.eye(rank.rank, dtype=v.dtype, device=v.device),
    )
