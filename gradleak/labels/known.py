"""The scale of a sample whose label is known: the feature from the label (ALGORITHMS §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.labels.problem import ScaleProblem
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

    ``problem`` holds one gradient. C equations for one unknown: the same scale-free residual as in
    the label search, over all classes, from a grid of both signs, then Gauss–Newton in float64.
    """
    grid = scale_grid(problem)
    scales = torch.cat([grid, -grid], 1)
    depth = _misfit(problem, scales, label)
    best = depth[0].topk(min(_STARTS, depth.shape[1]), largest=False).indices
    scale, now = scales[:, best], depth[:, best]
    damping = torch.full_like(scale, 1e-3)
    for _ in range(_STEPS):
        point = problem.at(scale)
        residual = point.y - label
        curvature = point.slope.square().sum(-1).clamp(min=1e-300)
        move = -(point.slope * residual).sum(-1) / (curvature * (1.0 + damping))
        if bool((move.abs() < 1e-15).all()):
            break
        trial = scale * move.clamp(-0.3, 0.3).exp()
        value = _misfit(problem, trial, label)
        better = value < now
        scale, now = torch.where(better, trial, scale), torch.where(better, value, now)
        damping = torch.where(better, damping * 0.1, damping * 10.0).clamp(1e-12, 1e12)
    winner = int(now[0].argmin())
    return KnownLabelScale(float(scale[0, winner]), math.sqrt(float(now[0, winner])))


def _misfit(problem: ScaleProblem, scale: Tensor, label: Tensor) -> Tensor:
    """Return (1, M) ‖y(s) − y‖² / ‖δ(s)‖², which has no trivial zero at large scales."""
    point = problem.at(scale)
    return (point.y - label).square().sum(-1) / point.delta.square().sum(-1)
