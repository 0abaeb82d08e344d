"""The roots of one sample's equations within a batch, from many starts at once (ALGORITHMS §4).

    (I − QQᵀ) ( softmax(H a + b) − Σ_k β_k e_k ) = 0,    aᵀS⁻¹c = M,    H = W V,

for the coordinates a of the sample's feature; the weights β of a given support are eliminated, and
c = Uᵀ(softmax(H a + b) − Σ_k β_k e_k) are the coordinates of its delta. The first residual is
measured in units of the delta, ‖r‖ / ‖c‖, since it vanishes trivially where the delta does (a
saturated softmax, or a = 0 beside a free base). The second equation fixes the scale of a, on which
a free base leaves the first almost no hold. A bias gradient adds a third, unit_row · a = 1. Where
the scale of the loss, and so M, is unknown, the second is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.subspace import Subspace

_TINY = 1e-300
_RIDGE = 1e-15
_MEMBERSHIP, _LOOSE_MEMBERSHIP = 0.3, 3e-3
# ‖r‖²/‖c‖² in squared roundings at which a descent has arrived, and the damping that ends it.
_CONVERGED, _STUCK = 1e-4, 1e9
# A descent that gains less than this factor in so many steps has arrived, or no root before it.
_PATIENCE, _GAIN = 6, 0.5


@dataclass(frozen=True)
class Roots:
    """M ends of a descent.

    ``a`` and ``c`` (M, n) are the coordinates of feature and delta, ``classes`` and ``weights``
    (M, k) the support and the label's weights on it, beside a base. ``misfit`` (M,) is ‖r‖² / ‖c‖²,
    ``membership`` (M,) aᵀS⁻¹c / M.
    """

    a: Tensor
    c: Tensor
    classes: Tensor
    weights: Tensor
    misfit: Tensor
    membership: Tensor

    def take(self, index: Tensor) -> Roots:
        """Return the roots at ``index``."""
        return Roots(**{name: value[index] for name, value in vars(self).items()})

    @classmethod
    def join(cls, parts: list[Roots]) -> Roots:
        """Put several sets of roots with supports of one size together."""
        return cls(**{k: torch.cat([getattr(p, k) for p in parts]) for k in vars(parts[0])})


@dataclass(frozen=True)
class _State:
    """The equations evaluated at M points."""

    a: Tensor
    p: Tensor
    projected: Tensor
    rows: Tensor
    inverse: Tensor
    weights: Tensor
    c: Tensor
    residual: Tensor
    square: Tensor
    membership: Tensor
    objective: Tensor


def span(subspace: Subspace, base: bool) -> Tensor:
    """Return Q (C, n or n + 1): U, and the normalised all-ones vector where the base is free.

    The two are orthogonal: every delta sums to zero over the classes.
    """
    if not base:
        return subspace.left
    ones = torch.full_like(subspace.left[:, :1], subspace.classes**-0.5)
    return torch.cat([subspace.left, ones], 1)


class Equations:
    """One sample's equations in a subspace, with or without a free base; what is shared is kept."""

    def __init__(self, subspace: Subspace, base: bool, *, loosely: bool = False) -> None:
        """Prepare the products of Q and H that every evaluation needs.

        ``loosely`` gives aᵀS⁻¹c = M less weight. Where S has a small value, as for two samples of
        one class that a network hardly tells apart, that equation holds a descent in a narrow
        curved valley off which the first one would lead it to the root.
        """
        self.subspace = subspace
        weight = _LOOSE_MEMBERSHIP if loosely else _MEMBERSHIP
        self.hold = weight**2 * float(subspace.mass_known)
        self.q = span(subspace, base)
        h = subspace.logits
        self.hh = (h[:, :, None] * h[:, None, :]).flatten(1)
        self.qh = (self.q[:, :, None] * h[:, None, :]).flatten(1)

    def descend(self, a: Tensor, classes: Tensor, steps: int) -> Roots:
        """Levenberg–Marquardt from starts ``a`` (M, n) with supports ``classes`` (M, k)."""
        state = self._evaluate(a, classes)
        damping = torch.full_like(state.objective, 1e-2)
        ends: list[Roots] = []
        index, order = torch.arange(len(a), device=a.device), []
        before = state.objective
        for step in range(1, steps + 1):
            trial = self._evaluate(state.a + self._step(state, classes, damping), classes)
            better = trial.objective < state.objective
            state = _State(
                **{k: _where(better, v, getattr(state, k)) for k, v in vars(trial).items()}
            )
            damping = torch.where(better, damping * 0.3, damping * 5.0)
            done = (state.objective < _CONVERGED * self.subspace.unit**2) | (damping > _STUCK)
            if step % _PATIENCE == 0:
                done |= state.objective > _GAIN * before
                before = state.objective
            if step == steps:
                done = torch.ones_like(done)
            if bool(done.any()):
                ends.append(self._roots(state, classes, done))
                order.append(index[done])
            left = ~done
            if bool(left.all()):
                continue
            if not bool(left.any()):
                break
            classes, damping, index, before = (
                classes[left],
                damping[left],
                index[left],
                before[left],
            )
            state = _State(**{k: v[left] for k, v in vars(state).items()})
        return Roots.join(ends).take(torch.cat(order).argsort())

    def _roots(self, state: _State, classes: Tensor, which: Tensor) -> Roots:
        n = self.subspace.size
        c = state.c[:, :n]
        misfit = state.square / c.square().sum(1).clamp(min=_TINY)
        ends = Roots(state.a, c, classes, state.weights, misfit, state.membership)
        return ends.take(which)

    def _evaluate(self, a: Tensor, classes: Tensor) -> _State:
        p = self.subspace.probabilities(a)
        projected = p @ self.q
        rows = self.q[classes]  # (M, k, n)
        identity = torch.eye(classes.shape[1], dtype=a.dtype, device=a.device)
        inverse = torch.linalg.inv((1.0 + _RIDGE) * identity - rows @ rows.mT)
        pull = p.gather(1, classes) - (rows @ projected[..., None]).squeeze(-1)
        weights = (inverse @ pull[..., None]).squeeze(-1)
        c = projected - (weights[:, None] @ rows).squeeze(1)
        residual = (p - c @ self.q.T).scatter_add(1, classes, -weights)
        square = residual.square().sum(1)
        own = c[:, : self.subspace.size]
        membership = self.subspace.membership(a, own)
        objective = square / own.square().sum(1).clamp(min=_TINY)
        objective = objective + self.hold * (membership - 1.0).square()
        if self.subspace.unit_row is not None:
            objective = objective + _MEMBERSHIP**2 * (a @ self.subspace.unit_row - 1.0).square()
        return _State(
            a, p, projected, rows, inverse, weights, c, residual, square, membership, objective
        )

    def _step(self, state: _State, classes: Tensor, damping: Tensor) -> Tensor:
        """Return the damped Gauss–Newton step, from products with H alone.

        Everything is multiplied by ‖c‖², which leaves the step as it is.
        """
        h, n = self.subspace.logits, self.subspace.size
        p = state.p
        mean = p @ h
        p2 = p.square()
        p2h = p2 @ h
        # B = diag(p) (H − 1 meanᵀ); BᵀB without forming B.
        normal = (p2 @ self.hh).view(-1, n, n)
        normal = normal - p2h[:, :, None] * mean[:, None] - mean[:, :, None] * p2h[:, None]
        normal = normal + p2.sum(1)[:, None, None] * mean[:, :, None] * mean[:, None]
        qb = (p @ self.qh).view(len(p), -1, n) - state.projected[:, :, None] * mean[:, None]
        eb = p.gather(1, classes)[..., None] * (h[classes] - mean[:, None]) - state.rows @ qb
        weights_slope = state.inverse @ eb
        normal = normal - qb.mT @ qb - eb.mT @ weights_slope
        pr = p * state.residual
        pull = pr @ h - pr.sum(1, keepdim=True) * mean
        # Dividing by ‖c‖ adds −r (∂ log‖c‖)ᵀ to the Jacobian.
        c = state.c[:, :n]
        size = c.square().sum(1, keepdim=True).clamp(min=_TINY)
        c_slope = (qb - state.rows.mT @ weights_slope)[:, :n]
        log = (c_slope.mT @ c[..., None]).squeeze(-1) / size
        normal = normal - pull[:, :, None] * log[:, None] - log[:, :, None] * pull[:, None]
        normal = normal + state.square[:, None, None] * log[:, :, None] * log[:, None]
        pull = pull - state.square[:, None] * log
        along = state.a / self.subspace.values
        member = c / self.subspace.values + (c_slope.mT @ along[..., None]).squeeze(-1)
        member = member / self.subspace.mass
        held = size * self.hold
        normal = normal + held[..., None] * member[:, :, None] * member[:, None]
        pull = pull + held * (state.membership - 1.0)[:, None] * member
        size = size * _MEMBERSHIP**2
        row = self.subspace.unit_row
        if row is not None:
            normal = normal + size[..., None] * row[:, None] * row
            pull = pull + size * (state.a @ row - 1.0)[:, None] * row
        diagonal = normal.diagonal(dim1=1, dim2=2).clamp(min=0.0)
        floor = 1e-14 + 1e-6 * diagonal.mean(1, keepdim=True)
        damped = normal + torch.diag_embed(damping[:, None] * (diagonal + floor))
        solution = torch.linalg.solve_ex(damped, -pull[..., None]).result.squeeze(-1)
        return torch.nan_to_num(solution)


def _where(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
