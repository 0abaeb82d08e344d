"""Fitting one virtual sample a class to a batch's head gradient (docs/method.md, class counts)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Scales of the mean feature, relative to the likeliest, from which the fit is repeated, and how
# many times the residual such a fit may have to count.
_RESTARTS, _AS_GOOD = (0.5, 2.0), 3.0
# Singular values of the gradient below this, relatively, are left out of the features.
_RANK = 1e-6
# Weight of the features' spread in the fit, and the smallest share that a class starts with.
_SPREAD, _SMALLEST = 1e-3, 1e-3
# Steps of the fit, fewer where one costs more multiplications.
_STEPS, _FEWEST, _WORK = 150, 30, 1e10
# Where no bias gradient gives the scale: scales looked at, how many of them are tried, how long.
_GRID, _TRIED, _TRIAL_STEPS = 400, 8, 25
# Shares below zero may add up to this much more than at the best scale.
_NEGATIVE = 0.02


@dataclass(frozen=True)
class CountBatch:
    """A gradient in the coordinates of its own row space, x = V a, all float64.

    ``gradient`` (C, r) is G V, ``head`` (C, r) is W V, ``bias`` (C,), ``grad_bias`` (C,) or None.
    """

    gradient: Tensor
    head: Tensor
    bias: Tensor
    grad_bias: Tensor | None
    samples: int

    @classmethod
    def of(
        cls,
        grad_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_bias: Tensor | None,
        samples: int,
    ) -> CountBatch | None:
        """Factorise the gradient; None where it is zero."""
        left, values, right = torch.linalg.svd(_own(grad_weight), full_matrices=False)
        if not float(values[0]) > 0.0:
            return None
        rank = int((values > _RANK * values[0]).sum())
        head = _own(weight) @ right[:rank].T
        return cls(
            gradient=left[:, :rank] * values[:rank],
            head=head,
            bias=torch.zeros_like(head[:, 0]) if bias is None else _own(bias),
            grad_bias=None if grad_bias is None else _own(grad_bias),
            samples=samples,
        )

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self.head)

    def favoured(self) -> float:
        """Return by how much of the batch classes are predicted beyond 1/C and beyond their share.

        It is a lower bound, read off the bias gradient p̄ − w: 0 for a network without a favourite.
        """
        assert self.grad_bias is not None
        return float((self.grad_bias - 1.0 / self.classes).clamp(min=0.0).sum())

    def misfit(self, share: Tensor, feature: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relative squared misfit of virtual samples, and their p (K, C).

        ``share`` (K,), ``feature`` (K, r), ``which`` (K,) the class of each.
        """
        p = torch.softmax(feature @ self.head.T + self.bias, -1)
        delta = p.scatter_add(1, which[:, None], torch.full_like(p[:, :1], -1.0))
        delta = share[:, None] * delta
        misfit = (delta.T @ feature - self.gradient).square().sum() / self.gradient.square().sum()
        if self.grad_bias is not None:
            left = (delta.sum(0) - self.grad_bias).square().sum()
            misfit = 0.5 * (misfit + left / self.grad_bias.square().sum())
        return misfit, p


@dataclass(frozen=True)
class VirtualSamples:
    """One virtual sample of each of K classes: ``logits`` (K,) of its share, ``feature`` (K, r).

    ``misfit`` is the value of the objective.
    """

    which: Tensor
    logits: Tensor
    feature: Tensor
    misfit: float = float("inf")

    def shares(self, classes: int) -> Tensor:
        """Return the shares of all C classes, zero where there is no virtual sample."""
        share = torch.softmax(self.logits, 0)
        return share.new_zeros(classes).scatter(0, self.which, share)


def fit_counts(batch: CountBatch) -> tuple[VirtualSamples, list[VirtualSamples]]:
    """Return the fit from the likeliest start, and the others that explain the gradient as well."""
    start = _start(batch)
    mean = start.feature.mean(0)
    fit = _descend(batch, start, _steps(batch))
    others = [_descend(batch, _alike(batch, factor * mean), _steps(batch)) for factor in _RESTARTS]
    return fit, [other for other in others if _as_good(batch, other, fit)]


def _as_good(batch: CountBatch, other: VirtualSamples, fit: VirtualSamples) -> bool:
    """Return whether another fit explains the gradient about as well, with whole counts.

    Where the bias gradient fixes the scale, whole or not the misfit must be about as small.
    """
    if batch.grad_bias is not None and other.misfit > _AS_GOOD * fit.misfit:
        return False
    return _residual_of_whole(batch, other) <= _AS_GOOD * _residual_of_whole(batch, fit)


def _start(batch: CountBatch) -> VirtualSamples:
    """Return virtual samples that are all alike: at the mean feature, with the shares it implies.

    A bias gradient gives the mean feature, as the slope of G over g_b. Without one its direction is
    G's leading one, and several scales are tried at which the shares are hardly negative.
    """
    if batch.grad_bias is not None:
        square = batch.grad_bias.square().sum()
        return _alike(batch, batch.gradient.T @ batch.grad_bias / square)
    direction = torch.zeros_like(batch.gradient[0])
    direction[0] = 1.0
    spread = float((batch.head[:, 0] - batch.head[:, 0].mean()).abs().amax())
    least = 0.5 * float(batch.gradient[:, 0].abs().sum())
    largest = max(50.0 / spread if spread > 0.0 else 0.0, 10.0 * least)
    scales = torch.logspace(0.0, 1.0, _GRID, base=largest / least).to(direction) * least
    scales = torch.cat([scales, -scales])
    y = torch.softmax(scales[:, None] * batch.head[:, 0] + batch.bias, -1)
    y = y - batch.gradient[:, 0] / scales[:, None]
    negative = y.clamp(max=0.0).sum(-1).neg()
    good = scales[negative <= negative.min() + _NEGATIVE]
    chosen = good[torch.linspace(0, len(good) - 1, min(_TRIED, len(good))).long()]
    # With fewer samples than classes some shares are zero: the scale of each sign that fits best.
    absent = max(1, batch.classes - batch.samples)
    smallest = y.abs().topk(absent, -1, largest=False).values.sum(-1).view(2, -1).argmin(1)
    sparse = scales.view(2, -1).gather(1, smallest[:, None])[:, 0]
    tried = [
        _descend(batch, _alike(batch, scale * direction), _TRIAL_STEPS)
        for scale in torch.cat([chosen, sparse])
    ]
    # The scale is right where the counts are whole.
    return min(tried, key=lambda fit: _residual_of_whole(batch, fit))


def _residual_of_whole(batch: CountBatch, fit: VirtualSamples) -> float:
    return check_counts(batch, fit, round_counts(fit.shares(batch.classes), batch.samples))[0]


def _alike(batch: CountBatch, feature: Tensor) -> VirtualSamples:
    """Return virtual samples with one feature (r,), of the classes that may be in the batch."""
    delta = batch.grad_bias
    if delta is None:
        delta = batch.gradient @ feature / feature.square().sum()
    share = torch.softmax(batch.head @ feature + batch.bias, 0) - delta
    share, which = share.topk(min(batch.classes, 2 * batch.samples + 8))
    share = share.clamp(min=_SMALLEST / batch.classes)
    return VirtualSamples(which, share.log(), feature.expand(len(which), -1))


def _steps(batch: CountBatch) -> int:
    """Return how many steps the fit may take: fewer where each one is long."""
    kept = min(batch.classes, 2 * batch.samples + 8)
    work = 6.0 * kept * batch.head.numel()
    return int(min(_STEPS, max(_FEWEST, _WORK / work)))


def _descend(batch: CountBatch, start: VirtualSamples, steps: int) -> VirtualSamples:
    """Fit shares and features to the gradient, the features no further apart than need be."""
    unit = start.feature.norm(dim=1).mean()
    logits = start.logits.clone().requires_grad_()
    feature = (start.feature / unit).contiguous().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits, feature],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        share = torch.softmax(logits, 0)
        misfit, _ = batch.misfit(share, unit * feature, start.which)
        apart = (feature - share @ feature).square().sum(1)
        value: Tensor = misfit + _SPREAD * (share @ apart)
        return value

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            value = objective()
        logits.grad, feature.grad = torch.autograd.grad(value, (logits, feature))
        return value.detach()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        value = float(objective())
    # A step too far, into numbers that are none, is no fit.
    if not math.isfinite(value):
        return start
    return replace(start, logits=logits.detach(), feature=unit * feature.detach(), misfit=value)


def check_counts(batch: CountBatch, fit: VirtualSamples, counts: Tensor) -> tuple[float, float]:
    """Return the residual of the gradient of the counts, and the network's confidence."""
    share = counts[fit.which].to(fit.feature) / batch.samples
    misfit, p = batch.misfit(share, fit.feature, fit.which)
    own = p.gather(1, fit.which[:, None])[:, 0]
    return float(misfit.sqrt()), float(share @ (own - (share @ p)[fit.which]))


def round_counts(shares: Tensor, samples: int) -> Tensor:
    """Return (C,) int64 counts with Σ = ``samples`` nearest to the shares (C,)."""
    wanted = shares.clamp(min=0.0)
    wanted = wanted / wanted.sum() * samples
    counts = wanted.floor().long()
    missing = samples - int(counts.sum())
    counts[(wanted - counts).topk(missing).indices] += 1
    return counts


def _own(tensor: Tensor) -> Tensor:
    """Return a float64 copy, which may take part in autograd where the original may not."""
    return tensor.detach().to(torch.float64, copy=True)
