"""Maximum likelihood of feature and label under Gaussian noise on every gradient entry (§3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.labels.gaussian import (
    Fields,
    Linear,
    Model,
    Observation,
    linearise,
    moved,
    squares_of,
    take,
)

_STEPS, _HALVINGS = 30, 6
# Steps smaller than this part of a standard error change nothing.
_CONVERGED = 1e-4
# A hypothesis that is this many squared standard deviations behind another one, and whose steps
# do not promise to make up for it, is not climbed any further; none is after so many steps.
_BEHIND, _PATIENCE = 200.0, 10
# Rounding of the sum of squares, relative to that of the gradient; after so many steps, one that
# moves by no more has arrived.
_ROUNDING, _LAST = 1e-14, 5


@dataclass(frozen=True)
class Estimate:
    """The maximum of the likelihood for every hypothesis: the ``model``, and tensors (B, M).

    ``scale`` is ‖x‖ freed of what noise adds to a norm, ``squares`` the residual sum of squares,
    ``covariance`` (B, M, K + 2, K + 2) that of (‖x‖, θ, γ), 0 for a parameter that is not free;
    ``log_det`` is log det of the information in (x, θ, γ) for a noise of 1.
    """

    model: Model
    scale: Tensor
    squares: Tensor
    covariance: Tensor
    log_det: Tensor


def maximise(seen: Observation, start: Model, *, loss_scale_free: bool = False) -> Estimate:
    """Climb from ``start`` to the maximum of the likelihood by Gauss–Newton.

    All hypotheses of all problems go together; those that have arrived drop out.
    """
    gram = seen.gram()
    model, now = start, linearise(seen, start, gram, loss_scale_free)
    variance = seen.noise[:, None].square()
    rounding = _ROUNDING * seen.squares[:, None]
    stalled = torch.zeros_like(now.squares, dtype=torch.bool)
    for count in range(_STEPS):
        behind = now.squares - now.squares.nan_to_num(torch.inf).amin(1, keepdim=True)
        hopeless = behind > _BEHIND * variance + (2.0 * now.promise if count < _PATIENCE else 0.0)
        arrived = now.move <= _CONVERGED**2 * variance + (rounding if count >= _LAST else 0.0)
        active = ~(stalled | hopeless | arrived) & now.move.isfinite()
        if not bool(active.any()):
            break
        rows = active.any(1).nonzero().squeeze(1)
        most = int(active.sum(1).amax())
        columns = active[rows].to(torch.uint8).topk(most, 1).indices
        going = active[rows[:, None], columns]  # the rest fills the rows up and stays where it is
        few, few_gram = (seen, gram) if len(rows) == len(active) else seen.rows(rows, gram)
        before, linear = take(model, rows, columns), take(now, rows, columns)
        after, better = _improved(few, before, linear, going, rounding[rows])
        stalled[rows[:, None], columns] |= going & ~better
        model = _put(model, rows, columns, after)
        now = _put(now, rows, columns, linearise(few, after, few_gram, loss_scale_free))
    return _estimate(seen, model, now)


def _improved(
    seen: Observation, model: Model, now: Linear, going: Tensor, rounding: Tensor
) -> tuple[Model, Tensor]:
    """Take the step, shortened until it is an improvement; return what is ``better`` (B, M).

    What is not ``going`` (B, M) stays.
    """
    length = torch.ones_like(now.squares)
    trial = moved(model, now, length)
    for _ in range(_HALVINGS):
        better = squares_of(seen, trial) <= now.squares + rounding
        if bool((better | ~going).all()):
            break
        length = torch.where(better, length, 0.3 * length)
        trial = moved(model, now, length)
    better = going & (squares_of(seen, trial) <= now.squares + rounding)
    wide = better[..., None]
    chosen = replace(
        model,
        theta=torch.where(wide, trial.theta, model.theta),
        feature=torch.where(wide, trial.feature, model.feature),
        loss_scale=torch.where(better, trial.loss_scale, model.loss_scale),
    )
    return chosen, better


def _estimate(seen: Observation, model: Model, now: Linear) -> Estimate:
    """State the errors of the maximum, and take from the norm of x̂ what noise added to it."""
    variance = seen.noise[:, None].square()
    both = now.free[..., None] & now.free[..., None, :]
    scale = freed_norm(now, variance)
    covariance = torch.where(both, now.inverse, 0.0) * variance[..., None, None]
    return Estimate(model, scale, now.squares, covariance, now.log_det)


def freed_norm(now: Linear, variance: Tensor) -> Tensor:
    """Return ‖x̂‖ (B, M) freed of what noise of ``variance`` (B, 1) added to it."""
    square = now.norm.square()
    return (square - variance * now.across_variance).clamp(min=0.25 * square).sqrt()


def _put(whole: Fields, rows: Tensor, columns: Tensor, part: Fields) -> Fields:
    """Return ``whole`` with ``part`` in the place that :func:`take` took it from."""
    merged = {
        name: value.index_put((rows[:, None], columns), getattr(part, name))
        for name, value in vars(whole).items()
    }
    return type(whole)(**merged)
