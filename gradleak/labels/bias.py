"""With a bias gradient the sample's delta is given, and with it the scale (ALGORITHMS §2)."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InputError
from gradleak.labels.factorise import RankOne

# Roundings by which the bias gradient may lie outside the weight gradient's column space.
_FOREIGN = 256.0
# And by how many times the squares of the noise.
_SPREAD = 4.0


def scales_from_bias(leading: RankOne, grad_bias: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) the signed scales s = σ uᵀδ / ‖δ‖² of x = Gᵀδ / ‖δ‖², and whether they hold.

    ``grad_bias`` (B, C) holds the δ, ``noise`` (B,) the standard deviation of additive noise on one
    entry of the weight gradient. A scale does not hold when δ is zero or no multiple of u: then the
    two gradients are not of the same step.
    """
    delta = grad_bias.double()
    square = torch.linalg.vecdot(delta, delta)
    along = torch.linalg.vecdot(leading.u, delta)
    rest = delta - along[:, None] * leading.u
    foreign = torch.linalg.vecdot(rest, rest)
    # The noise may be as large on both gradients, or as large beside the size of each.
    classes, width = delta.shape[1], leading.v.shape[1]
    beside = (square * width / leading.sigma.square().clamp_min(1e-300)).clamp_min(1.0)
    variance = noise.square() * beside
    allowed = (_FOREIGN * leading.unit).square() * square + _SPREAD * classes * variance
    return leading.sigma * along / square, (square > 0.0) & (foreign <= allowed)


def scale_from_bias(leading: RankOne, grad_bias: Tensor) -> Tensor:
    """Return (1,) the signed scale of one gradient without noise, from its bias gradient (C,).

    Raises :class:`InputError` where :func:`scales_from_bias` says that it does not hold.
    """
    scale, holds = scales_from_bias(leading, grad_bias[None], torch.zeros_like(leading.sigma))
    if not bool(holds):
        raise foreign_bias()
    return scale


def foreign_bias() -> InputError:
    """Return the error for a bias gradient that is not of the weight gradient's step."""
    return InputError(
        "the bias gradient and the weight gradient of the head do not belong together",
        "capture both in one step, or leave the bias gradient out",
    )
