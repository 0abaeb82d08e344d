"""The one-scalar problem of ALGORITHMS §3: everything about a sample follows from its scale s.

A gradient of one sample is G = σ u vᵀ, so its feature is x = s v with one unknown s, and

    p(s) = softmax(s a + b),   a = W v        δ(s) = (σ/s) u        y(s) = p(s) − δ(s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from gradleak.softlabels import Family

# Rounding of a float32 softmax cross-entropy in units of the gradient's own roundoff: a few for
# the exponentials and sums, and as many as the logits are large, since p carries their absolute
# error as a relative one.
_SOFTMAX_ROUNDINGS = 4.0
# What noise leaves at least of the sum of |δ|.
_LEAST = 0.01
# Below this a probability is gone from float32 and its class says nothing.
_UNDERFLOW = 1e-37


@dataclass(frozen=True)
class ScaleProblem:
    """B gradients of one sample each, of which only the scale is unknown.

    ``a``, ``b``, ``u`` are (B, C) float64 (logit direction, head bias, left singular vector),
    ``sigma`` (B,), ``noise`` (B,) the standard deviation of additive noise on one gradient entry
    (0 for a noiseless gradient), ``unit`` (B,) the roundoff of its precision, ``weight_norms``
    (B, C) the norms of the head's rows from their mean, which matter under noise alone.
    """

    a: Tensor
    b: Tensor
    u: Tensor
    sigma: Tensor
    noise: Tensor
    unit: Tensor
    weight_norms: Tensor

    def part(self, index: Tensor) -> ScaleProblem:
        """Return the problems in ``index`` (K,)."""
        names = ("a", "b", "u", "sigma", "noise", "unit", "weight_norms")
        return ScaleProblem(**{name: getattr(self, name)[index] for name in names})

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.a.shape[-1]

    @cached_property
    def noisy(self) -> bool:
        """Whether any of the gradients is noisy."""
        return bool((self.noise > 0).any())

    @cached_property
    def excess(self) -> Tensor | None:
        """Return (B, 1) s·Σδ, or None where every gradient is noisy and it is noise.

        A softmax of low precision does not sum to one, an error that all classes have in common,
        and δ shows it: Σδ = Σp − 1.
        """
        if bool((self.noise > 0).all()):
            return None
        return (self.sigma * torch.where(self.noise > 0, 0.0, self.u.sum(1)))[:, None]

    @cached_property
    def largest_logit(self) -> tuple[Tensor, Tensor]:
        """Return the slope in |s| and the offset, (B, 1), of the rounding of a probability."""
        unit = self.unit[:, None]
        slope = unit * self.a.abs().amax(1, keepdim=True)
        offset = unit * (_SOFTMAX_ROUNDINGS + self.b.abs().amax(1, keepdim=True))
        return slope, offset

    def smallest_scale(self) -> Tensor:
        """Return (B,) the smallest possible |s|: p and y are distributions, so Σ|δ| ≤ 2.

        Noise adds to Σ|δ|, in the mean 0.8 of its standard deviation for every class.
        """
        total = self.sigma * self.u.abs().sum(1)
        return 0.5 * (total - self.classes * self.noise).maximum(_LEAST * total)

    def at(self, scale: Tensor) -> Point:
        """Evaluate the label and its slope at scales ``(B, M)``."""
        s = scale[..., None]
        p = torch.softmax(torch.addcmul(self.b[:, None], s, self.a[:, None]), -1)
        mean = p @ self.a[..., None]
        p = self._with_excess(p, scale)
        delta = (self.sigma[:, None] / scale)[..., None] * self.u[:, None]
        slope = torch.addcmul(delta, s * p, self.a[:, None] - mean)
        return Point(scale, p, delta, p - delta, slope)

    def probabilities(self, scale: Tensor) -> Tensor:
        """Return (B, M, C) the probabilities p(s) at scales ``(B, M)``, as low precision sums them.

        The same as ``at(scale).p``.
        """
        logits = torch.addcmul(self.b[:, None], scale[..., None], self.a[:, None])
        return self._with_excess(torch.softmax(logits, -1), scale)

    def _with_excess(self, p: Tensor, scale: Tensor) -> Tensor:
        if self.excess is None:
            return p
        return p.addcmul_(p, (self.excess / scale)[..., None])

    def variance(self, point: Point) -> Tensor:
        """Return (B, M, C) the variance of y(s): rounding of p, δ and y, and the additive noise."""
        own = (_SOFTMAX_ROUNDINGS * self.unit)[:, None]
        # Errors of the logits pass through the softmax: a probability near one hardly feels them.
        felt = torch.addcmul(own[..., None], (self.rounding(point) - own)[..., None], 1.0 - point.p)
        size = point.delta.abs().add_(_UNDERFLOW).mul_(own[..., None])
        rounding = torch.addcmul(size, felt, point.p).square_()
        if not self.noisy:
            return rounding
        # Noise reaches y through u, alike for every class, and through v, which turns the logits.
        direct = (self.noise[:, None] / point.scale).square()[..., None]
        turned = (self.noise / self.sigma)[:, None] * point.scale
        return (
            rounding + direct + (turned[..., None] * point.p * self.weight_norms[:, None]).square()
        )

    def rounding(self, point: Point) -> Tensor:
        """Return (B, M) the relative rounding error expected of a probability.

        It carries the absolute rounding of the logits, so it grows with their largest.
        """
        slope, offset = self.largest_logit
        return torch.addcmul(offset, point.scale.abs(), slope)


@dataclass(frozen=True)
class Point:
    """The problem evaluated at ``scale`` (B, M): tensors (B, M, C); ``slope`` is ∂y/∂log|s|."""

    scale: Tensor
    p: Tensor
    delta: Tensor
    y: Tensor
    slope: Tensor

    def informative(self) -> Tensor:
        """Return (B, M, C) where float32 has kept anything of the probability or of δ."""
        return (self.p > _UNDERFLOW) | (self.delta != 0)


@dataclass(frozen=True, eq=False)
class FamilyTable:
    """The families considered, as tensors on one device, made once by :meth:`of`.

    ``support`` (F,) int64; ``base`` (F,) bool, and the same as ``free`` (F,) float64 1 or 0.
    ``outside`` (F, K) is 1 for those of the K largest entries that are not of the support, else 0;
    ``has`` (F, 2 + K) says which parameters the label has besides those that the others give: the
    scale, the base, and all weights of a mixture but one.
    """

    families: tuple[Family, ...]
    support: Tensor
    base: Tensor
    free: Tensor
    outside: Tensor
    has: Tensor

    @property
    def largest(self) -> int:
        """The largest support K."""
        return self.outside.shape[1]

    @staticmethod
    def of(families: Sequence[Family], device: torch.device) -> FamilyTable:
        """Return the table of ``families`` on ``device``."""
        return _table(tuple(families), device)


@cache
def _table(families: tuple[Family, ...], device: torch.device) -> FamilyTable:
    with torch.inference_mode(False):
        support = torch.tensor([f.support for f in families], device=device)
        base = torch.tensor([f.base for f in families], device=device)
        order = torch.arange(max(f.support for f in families), device=device)
        mixture = (order > 0) & (order < support[:, None])
        return FamilyTable(
            families,
            support,
            base,
            free=base.double(),
            outside=(order >= support[:, None]).double(),
            has=torch.cat([torch.ones_like(base)[:, None], base[:, None], mixture], 1),
        )


def largest_first(y: Tensor, count: int) -> Tensor:
    """Return (..., min(count, C − 1)) the classes of the largest entries of ``y``, descending."""
    return y.topk(min(count, y.shape[-1] - 1), -1).indices
