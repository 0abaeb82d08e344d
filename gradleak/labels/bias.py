"""With a bias gradient the sample's delta is given, and with it the scale (ALGORITHMS §2)."""

from __future__ import annotations

from torch import Tensor

from gradleak.errors import InputError
from gradleak.labels.factorise import RankOne

# Roundings by which the bias gradient may lie outside the weight gradient's column space.
_FOREIGN = 256.0


def scale_from_bias(leading: RankOne, grad_bias: Tensor, noise: float = 0.0) -> Tensor:
    """Return (1,) the signed scale s = σ uᵀδ / ‖δ‖² of x = Gᵀδ / ‖δ‖², δ the bias gradient (C,).

    ``noise`` is the standard deviation of additive noise on one entry. Raises :class:`InputError`
    when δ is zero or no multiple of u: then the two gradients are not of the same step.
    """
    delta = grad_bias.double()
    square = delta.square().sum()
    along = leading.u[0] @ delta
    foreign = (delta - along * leading.u[0]).square().sum()
    allowed = (_FOREIGN * leading.unit) ** 2 * float(square) + 4.0 * len(delta) * noise**2
    if not float(square) > 0.0 or float(foreign) > allowed:
        raise InputError(
            "the bias gradient and the weight gradient of the head do not belong together",
            "capture both in one step, or leave the bias gradient out",
        )
    return leading.sigma * along / square
