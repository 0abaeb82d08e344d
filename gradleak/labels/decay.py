"""Weight decay in a head's gradient: what its columns sum to, which should be zero.

An optimiser with weight decay λ moves the weights by G + λW. The columns of G, the gradient of
softmax cross-entropy, sum to zero over the classes (Theorem 1 of arXiv 2402.03124), whatever factor
the loss carries; those of λW do not. So 1ᵀ(G + λW) = λ 1ᵀW is one equation a feature for the one
unknown λ, and what it leaves says whether it was weight decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.linalg import precision

# Column sums below so many roundings of the gradient are none.
_ROUNDINGS = 64.0
# The share of the column sums that weight decay may leave unexplained, beside rounding.
_UNEXPLAINED = 1e-2


@dataclass(frozen=True)
class WeightDecay:
    """The ``rate`` λ, its standard ``error``, and whether biases were decayed as well.

    ``of_bias`` is None where no bias gradient tells.
    """

    rate: float
    error: float
    of_bias: bool | None


def find_weight_decay(
    grad_weight: Tensor, weight: Tensor, grad_bias: Tensor | None, bias: Tensor | None
) -> WeightDecay | None:
    """Return the weight decay in a head's gradient (C, D), None where there is no sign of it.

    There is none either where the columns of ``weight`` (C, D) sum to zero themselves: then no
    column tells. ``grad_bias`` and ``bias`` (C,) tell whether biases were decayed.
    """
    gradient, state = grad_weight.double(), weight.double()
    sums, known = gradient.sum(0), state.sum(0)
    unit = precision(grad_weight.dtype)
    # The rounding of C entries each, and that the weights of a checkpoint bring in.
    rounding = unit * float(torch.linalg.vector_norm(gradient)) * _ROUNDINGS
    size, total = float(torch.linalg.vector_norm(known)), float(torch.linalg.vector_norm(sums))
    if not (math.isfinite(size) and total > rounding and size > 0.0):
        return None
    rate = float(sums @ known) / size**2
    left = float(torch.linalg.vector_norm(sums - rate * known))
    if rate <= 0.0 or left > max(_UNEXPLAINED * total, rounding):
        return None
    error = left / (size * math.sqrt(max(1, len(sums) - 1)))
    return WeightDecay(rate, error, _of_bias(rate, grad_bias, bias))


def _of_bias(rate: float, grad_bias: Tensor | None, bias: Tensor | None) -> bool | None:
    """Return whether the bias gradient's sum is that of decay rather than zero."""
    if grad_bias is None or bias is None:
        return None
    total, decayed = float(grad_bias.double().sum()), rate * float(bias.double().sum())
    if decayed == 0.0:
        return None
    return abs(total - decayed) < abs(total)
