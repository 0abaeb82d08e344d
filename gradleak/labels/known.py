"""The scale of a sample whose label is known: the feature from the label (ALGORITHMS §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.problem import Point, ScaleProblem
from gradleak.labels.search import scale_grid

_STARTS = 6
_STEPS = 30


@dataclass(frozen=True)
class KnownLabelScale:
    """``scale`` s with x = s v, and the relative ``residual`` ‖δ(s) − (p(s) − y)‖ / ‖δ(s)‖."""

    scale: float
    residual: float


def scale_of_label(problem: ScaleProblem, label: Tensor) -> KnownLabelScale:
    """Find the one scale at which p(s) − (σ/s) u is the given label (C,).

    ``problem`` holds one gradient. C equations for one unknown: the scale-free residual of the
    label search, over all classes, from a grid of both signs; then Gauss–Newton in float64, at
    last with the inverse variances of rounding and noise, which lets the small entries speak.
    """
    grid = scale_grid(problem)
    scales = torch.cat([grid, -grid], 1)
    depth = _misfit(problem.at(scales), label)
    best = depth[0].topk(min(_STARTS, depth.shape[1]), largest=False).indices
    scale = _descend(problem, scales[:, best], label, weighted=False)
    winner = int(_misfit(problem.at(scale), label)[0].argmin())
    scale = _descend(problem, scale[:, winner, None], label, weighted=True)
    return KnownLabelScale(float(scale), label_residual(problem, label, float(scale)))


def label_residual(problem: ScaleProblem, label: Tensor, scale: float) -> float:
    """Return ‖δ(s) − (p(s) − y)‖ / ‖δ(s)‖ of a label (C,) at a scale of one gradient."""
    point = problem.at(torch.full_like(problem.sigma, scale)[:, None])
    return math.sqrt(float(_misfit(point, label)))


def _descend(problem: ScaleProblem, scale: Tensor, label: Tensor, *, weighted: bool) -> Tensor:
    """Damped Gauss–Newton in log|s| from each of ``scale`` (1, M)."""
    point = problem.at(scale)
    weight = 1.0 / problem.variance(point) if weighted else torch.ones_like(point.y)

    def value(point: Point) -> Tensor:
        if not weighted:
            return _misfit(point, label)
        return (weight * (point.y - label).square()).sum(-1)

    now = value(point)
    damping = torch.full_like(scale, 1e-3)
    for _ in range(_STEPS):
        curvature = (weight * point.slope.square()).sum(-1).clamp(min=1e-300)
        pull = (weight * point.slope * (point.y - label)).sum(-1)
        move = -pull / (curvature * (1.0 + damping))
        if bool((move.abs() < 1e-15).all()):
            break
        trial = scale * move.clamp(-0.3, 0.3).exp()
        found = value(problem.at(trial))
        better = found < now
        scale, now = torch.where(better, trial, scale), torch.where(better, found, now)
        damping = torch.where(better, damping * 0.1, damping * 10.0).clamp(1e-12, 1e12)
        point = problem.at(scale)
    return scale


def _misfit(point: Point, label: Tensor) -> Tensor:
    """Return (1, M) ‖y(s) − y‖² / ‖δ(s)‖², which has no trivial zero at large scales."""
    return (point.y - label).square().sum(-1) / point.delta.square().sum(-1)
