"""The maxima of the likelihood of one sample, family by family (ALGORITHMS §3).

The likelihood of the whole gradient is climbed for every family from the roots of the search, and
the families are compared by their evidence, feature and label integrated out (Laplace's
approximation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.gaussian import Model, Observation, label_map
from gradleak.labels.likelihood import Estimate, maximise
from gradleak.labels.problem import FamilyTable
from gradleak.labels.starts import Factors, starts_of

# Log odds against a feature that is nowhere positive: activations do not give such.
_NOWHERE_POSITIVE = math.log(1e3)
# Labels are not smoothed by more than this.
_MOST_SMOOTHING = 0.5
_TINY = 1e-300


@dataclass(frozen=True)
class Maxima:
    """M maxima of the likelihood for each of B gradients; tensors (B, M) unless stated.

    ``family`` is the table index, ``top`` (B, M, K) the support by descending weight, ``weights``
    (B, M, K) the label there, ``base`` its value elsewhere, ``scale`` the signed norm of the
    feature, ``loss_scale`` γ; every ``*_error`` is one standard error. ``chi2`` is what the family
    adds to the residual of the best rank-one gradient, in units of the noise, with ``freedom``
    degrees of freedom (one less where γ is free), ``evidence`` its log evidence. ``model`` holds
    the maxima as the likelihood has them, ``order`` (B, M, K) the place of the ``top`` classes
    there, and ``squares`` the residual sum of squares.
    """

    family: Tensor
    top: Tensor
    weights: Tensor
    weight_error: Tensor
    base: Tensor
    base_error: Tensor
    scale: Tensor
    scale_error: Tensor
    loss_scale: Tensor
    loss_scale_error: Tensor
    chi2: Tensor
    freedom: Tensor
    evidence: Tensor
    model: Model
    order: Tensor
    squares: Tensor


def find_maxima(
    seen: Observation,
    factors: Factors,
    table: FamilyTable,
    *,
    loss_scales: Tensor | None = None,
) -> Maxima:
    """Climb to the maxima of the likelihood of every family of ``table``, for B gradients.

    ``loss_scales`` (K,) are the loss scales to start from where it is unknown (one gradient only);
    by default it is 1.
    """
    start, family = starts_of(seen, factors, table, loss_scales)
    free = loss_scales is not None
    found = maximise(seen, start, loss_scale_free=free)
    return _described(found, family, seen, factors, free)


def _described(
    found: Estimate, family: Tensor, seen: Observation, factors: Factors, loss_scale_free: bool
) -> Maxima:
    """Turn maxima into labels with standard errors, and weigh them."""
    model, classes = found.model, seen.classes
    theta, active = model.theta, model.active
    to_label = label_map(theta, classes)
    inside = torch.arange(len(to_label) - 1, device=family.device) < model.support[..., None]
    entries = model.entries(to_label)
    covariance = found.covariance[..., 1:-1, 1:-1]
    variance = (to_label @ covariance @ to_label.mT).diagonal(dim1=-2, dim2=-1)
    errors = variance.clamp(min=0.0).sqrt()
    weights = torch.where(inside, entries[..., :-1], -math.inf).sort(-1, descending=True)
    turned = weights.indices
    noise = seen.noise[:, None].square()
    chi2 = ((found.squares - factors.least[:, None]) / noise).clamp(min=0.0)
    spare = classes - 2 + int(seen.grad_bias is not None)
    sign = (model.feature @ factors.direction[..., None]).squeeze(-1).sign()
    volume = -_NOWHERE_POSITIVE * (_one_signed(factors, noise)[:, None] & (sign < 0.0))
    volume = volume + _log_volume(found, noise, classes, seen.weight.shape[2], loss_scale_free)
    return Maxima(
        family=family,
        top=model.top.gather(-1, turned),
        weights=torch.where(weights.values > -math.inf, weights.values, 0.0),
        weight_error=torch.where(inside, errors[..., :-1], 0.0).gather(-1, turned),
        base=entries[..., -1],
        base_error=errors[..., -1],
        scale=sign * found.scale,
        scale_error=found.covariance[..., 0, 0].clamp(min=0.0).sqrt(),
        loss_scale=model.loss_scale,
        loss_scale_error=found.covariance[..., -1, -1].clamp(min=0.0).sqrt(),
        chi2=chi2,
        freedom=spare - int(loss_scale_free) - active.sum(-1),
        evidence=(volume - 0.5 * chi2).nan_to_num(-math.inf, -math.inf, -math.inf),
        model=model,
        order=turned,
        squares=found.squares,
    )


def _one_signed(factors: Factors, noise: Tensor) -> Tensor:
    """Return (B,) whether noise, τ² (B, 1), explains what v has of negative entries."""
    v = factors.direction
    below = v.clamp(max=0.0).square().sum(1)
    return below <= noise[:, 0] * v.shape[1] / factors.problem.sigma.square()


def _log_volume(
    found: Estimate, noise: Tensor, classes: int, width: int, loss_scale_free: bool
) -> Tensor:
    """Return (B, M) the log of the posterior volume over that of the prior (Laplace).

    Priors: log‖x‖ uniform and every direction alike, the weights uniform on their simplex, the
    smoothing on (0, ½), every choice of the support's classes alike, log γ uniform where it is
    free. ``noise`` (B, 1) is τ².
    """
    theta, active, support = found.model.theta, found.model.active, found.model.support.double()
    error = found.covariance.diagonal(dim1=-2, dim2=-1)[..., 1:-1].clamp(min=_TINY).sqrt()
    # The part of the Gaussian that lies between 0 and 1, where the prior is.
    within = torch.special.log_ndtr(theta / error) + torch.special.log_ndtr((1.0 - theta) / error)
    density = -math.log(_MOST_SMOOTHING) * found.model.base
    count = 1.0 + active.sum(-1) + float(loss_scale_free)
    choices = torch.lgamma(torch.full_like(support, classes + 1.0)) - torch.lgamma(
        classes - support + 1.0
    )
    volume: Tensor = (
        0.5 * count * (2.0 * math.pi * noise).log()
        - 0.5 * found.log_det
        - width * torch.linalg.vector_norm(found.model.feature, dim=-1).log()
        + torch.where(active, within, 0.0).sum(-1)
        # 1 / the number of supports C!/(k! (C − k)!), and the simplex's density (k − 1)!
        - choices
        + torch.lgamma(support + 1.0)
        + torch.lgamma(support)
        + density
    )
    return volume - found.model.loss_scale.log() if loss_scale_free else volume
