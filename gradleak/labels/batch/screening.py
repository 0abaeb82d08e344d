"""Where to start: which classes a label may rest on, and how large its feature is (ALGORITHMS §4).

The row of the gradient of a class k is G_k = (1/M) Σ_n (p_nk − y_nk) x_n. If one sample n alone
rests on k, then −M G_k is y_nk x_n, up to what all rows have in common; so every class proposes a
direction, and the scale is left. At each of a few scales p is known, and the label that suits it
best is a linear least-squares problem over span(U): with K = I − QQᵀ the support {i, j} needs
entries of K p and K alone, so all partners j of i are tried in a few matrix operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.batch.roots import span
from gradleak.labels.batch.subspace import Subspace

# The feature is the row's over y_k − p_k.
_SCALES = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 6.0)
# That is tiny where the network knows the class, and negative where it is surer of it than a
# smoothed label; and nothing is known of it where the loss is of unknown scale. Then: ranges of the
# logits, from nearly none to saturation.
_RANGES, _FROM, _TO = 18, 0.1, 100.0
# Classes that propose, by the size of their part of the gradient: some, and some for each sample.
_PROPOSERS, _PROPOSERS_EACH = 64, 8
_KEPT_SCALES = 3
_SMALLEST, _PENALTY = 0.01, 10.0
_MEMBERS = 0.1
# So few samples left are looked at in float64.
_DOUBLE = 8
_TINY = 1e-9


@dataclass(frozen=True)
class Starts:
    """Where to start: coordinates ``a`` (M, n), supports ``classes`` (M, k), best first.

    ``misfit`` (M,) is ‖r‖² / ‖c‖² there.
    """

    a: Tensor
    classes: Tensor
    misfit: Tensor


def propose(subspace: Subspace, size: int, base: bool, count: int, *, wide: bool = False) -> Starts:
    """Return the ``count`` most promising starts with supports of ``size`` 1 or 2.

    ``wide`` looks at the samples that the network knows well, too.
    """
    rows = subspace.left * subspace.values
    sums = rows @ subspace.right.sum(0)
    # Rows of classes outside every label are averages of the features, weighted by p.
    typical = rows[sums.argsort()[subspace.classes // 2 :]].mean(0)
    direction = -subspace.mass * (rows - typical)
    proposers = min(_PROPOSERS + _PROPOSERS_EACH * subspace.size, len(rows))
    first = direction.norm(dim=1).topk(proposers).indices
    direction = direction[first]
    row = subspace.unit_row
    if row is not None:  # a bias gradient knows the scale, up to what the row blurs
        one = direction @ row
        usable = one.abs() > 1e-9 * direction.norm(dim=1) if wide else one > 0
        direction = torch.where(usable[:, None], direction / one[:, None], direction)
    elif wide or not subspace.mass_known:
        a = _at_ranges(subspace, direction)
        a = torch.cat([a, -a]) if wide else a
        return _keep(subspace, a, first, size, base, count, members=subspace.mass_known)
    scales = direction.new_tensor(_SCALES if row is None else _SCALES[:4])
    a = scales[:, None, None] * direction
    return _keep(subspace, a, first, size, base, count)


def _at_ranges(subspace: Subspace, direction: Tensor) -> Tensor:
    """Return (T, M, n) the directions at scales that spread the logits over given ranges."""
    logits = direction @ subspace.logits.T
    spread = (logits.amax(1) - logits.amin(1)).clamp(min=1e-300)
    steps = torch.linspace(0.0, 1.0, _RANGES, dtype=direction.dtype, device=direction.device)
    ranges = _FROM * (_TO / _FROM) ** steps
    return (ranges[:, None] / spread)[..., None] * direction


def _keep(
    subspace: Subspace,
    a: Tensor,
    first: Tensor,
    size: int,
    base: bool,
    count: int,
    *,
    members: bool = False,
) -> Starts:
    """Weigh all starts and keep the best few scales of a class, and the best of all those.

    With ``members`` a start is the worse the further aᵀS⁻¹c / M is from one, as it is where the
    softmax saturates.
    """
    best = _weigh(subspace, a, first, size, base, _MEMBERS if members else 0.0)
    value, at = best.misfit.topk(_KEPT_SCALES, 0, largest=False)
    classes = torch.gather(best.classes, 0, at[..., None].expand(*at.shape, size))
    a = torch.gather(a, 0, at[..., None].expand(*at.shape, a.shape[-1]))
    order = value.flatten().topk(min(count, value.numel()), largest=False).indices
    return Starts(a.flatten(0, 1)[order], classes.flatten(0, 1)[order], value.flatten()[order])


@dataclass(frozen=True)
class _Fit:
    """p at coordinates ``a`` (T, M, n), and what is needed to fit labels to it over span(Q).

    ``projected`` (T, M, n) is Qᵀp, ``pull`` (T, M, C) K p, ``own`` (C,) the diagonal of K,
    ``energy`` (T, M) ‖K p‖², ``index`` (T, M, 1) the proposing class. ``floor`` (T, M) is what
    rounding leaves of a saturated softmax, whose δ is zero: no fit.
    """

    a: Tensor
    q: Tensor
    p: Tensor
    projected: Tensor
    pull: Tensor
    own: Tensor
    energy: Tensor
    index: Tensor
    floor: Tensor


def _weigh(
    subspace: Subspace, a: Tensor, first: Tensor, size: int, base: bool, members: float
) -> Starts:
    """Fit the label to p at coordinates ``a`` (T, M, n) with the class ``first`` (M,) in it.

    ``members`` is the weight of (aᵀS⁻¹c / M − 1)², which counts up to one. Ranking needs no more
    than float32, as long as δ is not much smaller than p.
    """
    dtype = torch.float64 if subspace.size <= _DOUBLE else torch.float32
    q = span(subspace, base).to(dtype)
    logits = a.to(dtype) @ subspace.logits.T.to(dtype) + subspace.bias.to(dtype)
    p = torch.softmax(logits, -1)
    projected = p @ q
    pull = p - projected @ q.T
    fit = _Fit(
        a=a,
        q=q,
        p=p,
        projected=projected,
        pull=pull,
        own=(1.0 - q.square().sum(1)).clamp(min=_TINY),
        energy=pull.square().sum(-1),
        index=first.expand(len(a), -1)[..., None],
        floor=4.0 * torch.finfo(dtype).eps * p.square().sum(-1),
    )
    return (_weigh_one if size == 1 else _weigh_pairs)(subspace, fit, first, base, members)


def _weigh_one(subspace: Subspace, fit: _Fit, first: Tensor, base: bool, members: float) -> Starts:
    """Fit a label on the proposing class alone."""
    x, kx = fit.pull.gather(-1, fit.index), fit.own[first][:, None]
    weight = (x / kx) if base else torch.ones_like(x)
    c = (fit.projected - weight * fit.q[first])[..., : subspace.size]
    misfit = fit.energy - (2.0 * weight * x - weight.square() * kx).squeeze(-1)
    misfit = (misfit.clamp(min=0.0) + fit.floor) / c.square().sum(-1).clamp(min=_TINY)
    misfit = misfit + _PENALTY * (weight < _SMALLEST).squeeze(-1)
    if members:
        share = subspace.membership(fit.a.flatten(0, 1), c.flatten(0, 1)).view_as(misfit)
        misfit = misfit + members * (share - 1.0).square().clamp(max=1.0)
    return Starts(fit.a, fit.index, misfit)


def _weigh_pairs(
    subspace: Subspace, fit: _Fit, first: Tensor, base: bool, members: float
) -> Starts:
    """Fit a label on the proposing class i and every other j, and keep the best j."""
    x, kx = fit.pull.gather(-1, fit.index), fit.own[first][:, None]
    y, ky = fit.pull, fit.own
    kxy = -(fit.q[first] @ fit.q.T)
    if base:
        determinant = (kx * ky - kxy.square()).clamp(min=_TINY)
        alpha, beta = (x * ky - kxy * y) / determinant, (y * kx - kxy * x) / determinant
    else:
        alpha = ((x - y) - (kxy - ky)) / (kx + ky - 2.0 * kxy).clamp(min=_TINY)
        beta = 1.0 - alpha
    gain = 2.0 * (alpha * x + beta * y)
    gain = gain - alpha.square() * kx - beta.square() * ky - 2.0 * alpha * beta * kxy
    rest = fit.energy[..., None] - gain
    # The delta's size: ‖c‖² = ‖δ‖² − ‖r‖², and ‖δ‖² needs p and the label alone.
    shift = 1.0 / subspace.classes if base else 0.0
    delta = (fit.p - shift).square().sum(-1, keepdim=True)
    delta = delta - 2.0 * (alpha * (fit.p.gather(-1, fit.index) - shift) + beta * (fit.p - shift))
    delta = delta + alpha.square() + beta.square() - shift * (alpha + beta).square()
    misfit = (rest.clamp(min=0.0) + fit.floor[..., None]) / (delta - rest).clamp(min=_TINY)
    # A pair of which one class gets nothing is no pair.
    misfit = misfit + _PENALTY * ((alpha < _SMALLEST) | (beta < _SMALLEST))
    if members:
        n = subspace.size
        along = (fit.a / subspace.values / subspace.mass).to(fit.p.dtype)
        share = along @ fit.q[:, :n].T
        total = torch.linalg.vecdot(along, fit.projected[..., :n])[..., None]
        share = total - alpha * share.gather(-1, fit.index) - beta * share
        misfit = misfit + members * (share - 1.0).square().clamp(max=1.0)
    misfit.scatter_(-1, fit.index, torch.inf)
    value, second = misfit.min(-1)
    return Starts(fit.a, torch.stack([first.expand_as(second), second], -1), value)
