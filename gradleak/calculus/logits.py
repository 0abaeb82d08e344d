"""The δ that a client's step began with, as its own arithmetic had it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounded_delta(delta: Tensor, feature: Tensor, gradient: Tensor) -> Tensor:
    """Return ∂loss/∂logits (N, C) as the gradient of the head has it, where that says it better.

    ``delta`` (N, C) is computed from label and ``feature`` (N, D), both float64; ``gradient``
    (C, D) is the head's, of any dtype. Where the softmax is sure of the label, p − y is a small
    difference of numbers near one, and the client's arithmetic rounded it: all layers below have
    the rounded one in their gradients, and the head's gradient G = Σ δ xᵀ shows it. A sample's δ is
    taken from there if that is the smaller error: of G, by what the computed δ leaves of it or by
    its own rounding, against the rounding of p − y.
    """
    wide = gradient.double()
    back = torch.linalg.pinv(feature)  # (D, N)
    left = wide - delta.mT @ feature
    unit = torch.finfo(gradient.dtype).eps
    own = min(unit, torch.finfo(torch.float32).eps)  # of a step; halves are for what is sent
    # What lies outside the features' span is noise; what lies inside may be the rounding of δ.
    noise = (left - (left @ back) @ feature).square().mean().sqrt()
    noise = noise.clamp(min=unit * float(wide.square().mean().sqrt()))
    shown = noise * math.sqrt(len(wide)) * back.norm(dim=0)
    rounding = own / len(delta)
    given = (wide @ back).mT
    return torch.where((shown < rounding)[:, None], given, delta)
