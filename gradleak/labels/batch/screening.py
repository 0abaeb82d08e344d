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

# The feature is the row's over the label's entry there.
_SCALES = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 6.0)
# Where the loss is of unknown scale: ranges of the logits, from nearly none to saturation.
_RANGES, _FROM, _TO = 16, 0.1, 60.0
# Classes that propose, by the size of their part of the gradient: some, and some for each sample.
_PROPOSERS, _PROPOSERS_EACH = 64, 8
_KEPT_SCALES = 3
_SMALLEST = 0.01
_TINY = 1e-9


@dataclass(frozen=True)
class Starts:
    """Where to start: coordinates ``a`` (M, n), supports ``classes`` (M, k), best first.

    ``misfit`` (M,) is ‖r‖² / ‖c‖² there.
    """

    a: Tensor
    classes: Tensor
    misfit: Tensor


def propose(subspace: Subspace, size: int, base: bool, count: int) -> Starts:
    """Return the ``count`` most promising starts with supports of ``size`` 1 or 2."""
    rows = subspace.left * subspace.values
    sums = rows @ subspace.right.sum(0)
    # Rows of classes outside every label are averages of the features, weighted by p.
    typical = rows[sums.argsort()[subspace.classes // 2 :]].mean(0)
    direction = -subspace.mass * (rows - typical)
    proposers = min(_PROPOSERS + _PROPOSERS_EACH * subspace.size, len(rows))
    first = direction.norm(dim=1).topk(proposers).indices
    direction = direction[first]
    if not subspace.mass_known:
        return _keep(subspace, _at_ranges(subspace, direction), first, size, base, count)
    scales = torch.tensor(_SCALES, dtype=rows.dtype, device=rows.device)
    if subspace.unit_row is not None:  # a bias gradient knows the scale, up to what the row blurs
        one = direction @ subspace.unit_row
        direction = torch.where((one > 0)[:, None], direction / one[:, None].abs(), direction)
        scales = scales[:4]
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
    subspace: Subspace, a: Tensor, first: Tensor, size: int, base: bool, count: int
) -> Starts:
    """Weigh all starts and keep the best few scales of a class, and the best of all those."""
    best = _weigh(subspace, a, first, size, base)
    value, at = best.misfit.topk(_KEPT_SCALES, 0, largest=False)
    classes = torch.gather(best.classes, 0, at[..., None].expand(*at.shape, size))
    a = torch.gather(a, 0, at[..., None].expand(*at.shape, a.shape[-1]))
    order = value.flatten().topk(min(count, value.numel()), largest=False).indices
    return Starts(a.flatten(0, 1)[order], classes.flatten(0, 1)[order], value.flatten()[order])


def _weigh(subspace: Subspace, a: Tensor, first: Tensor, size: int, base: bool) -> Starts:
    """Fit the label to p at coordinates ``a`` (T, M, n) with the class ``first`` (M,) in it.

    Ranking needs no more than float32.
    """
    q = span(subspace, base).float()
    p = torch.softmax(a.float() @ subspace.logits.T.float() + subspace.bias.float(), -1)
    projected = p @ q
    pull = p - projected @ q.T  # K p
    own = (1.0 - q.square().sum(1)).clamp(min=_TINY)
    energy = pull.square().sum(-1)
    index = first.expand(len(a), -1)[..., None]
    x = pull.gather(-1, index)
    kx = own[first][:, None]
    if size == 1:
        weight = (x / kx) if base else torch.ones_like(x)
        misfit = energy - (2.0 * weight * x - weight.square() * kx).squeeze(-1)
        c = projected - weight * q[first]
        c2 = c[..., : subspace.size].square().sum(-1)
        misfit = misfit / c2 + 10.0 * (weight < _SMALLEST).squeeze(-1)
        return Starts(a, index, misfit)
    kxy = -(q[first] @ q.T)
    y, ky = pull, own
    if base:
        determinant = (kx * ky - kxy.square()).clamp(min=_TINY)
        alpha, beta = (x * ky - kxy * y) / determinant, (y * kx - kxy * x) / determinant
    else:
        alpha = ((x - y) - (kxy - ky)) / (kx + ky - 2.0 * kxy).clamp(min=_TINY)
        beta = 1.0 - alpha
    fit = 2.0 * (alpha * x + beta * y)
    fit = fit - alpha.square() * kx - beta.square() * ky - 2.0 * alpha * beta * kxy
    # The delta's size: ‖c‖² = ‖δ‖² − ‖r‖², and ‖δ‖² needs p and the label alone.
    total = p.square().sum(-1, keepdim=True) if not base else _spread(p)
    pi = p.gather(-1, index)
    shift = 1.0 / subspace.classes if base else 0.0
    delta = total - 2.0 * (alpha * (pi - shift) + beta * (p - shift))
    delta = delta + alpha.square() + beta.square() - shift * (alpha + beta).square()
    rest = energy[..., None] - fit
    misfit = rest / (delta - rest).clamp(min=_TINY)
    # A pair of which one class gets nothing is no pair.
    misfit = misfit + 10.0 * ((alpha < _SMALLEST) | (beta < _SMALLEST))
    misfit.scatter_(-1, index, torch.inf)
    value, second = misfit.min(-1)
    classes = torch.stack([first.expand_as(second), second], -1)
    return Starts(a, classes, value)


def _spread(p: Tensor) -> Tensor:
    """Return (..., 1) Σ (p − 1/C)²."""
    return (p - 1.0 / p.shape[-1]).square().sum(-1, keepdim=True)
