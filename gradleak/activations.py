"""Activations between Linear layers: their slopes, from the output where it determines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Pointwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """A pointwise activation φ.

    ``apply`` is φ, ``slope_at_output`` gives φ'(z) from φ(z), None where that is not unique (GELU,
    SiLU): then the pre-activation must be found first, and ``slope_at_input`` gives φ'(z) from z.
    """

    apply: Pointwise
    slope_at_output: Pointwise | None
    slope_at_input: Pointwise


def activation(name: str | None) -> Activation | None:
    """Return the activation called ``name`` (as in ``LinearLayer``), or None if it is not known."""
    kind, _, number = (name or "").partition(":")
    if kind != "leaky_relu":
        return _TABLE.get(kind)
    try:
        slope = float(number or 0.01)
    except ValueError:
        return None
    return _leaky_relu(slope) if math.isfinite(slope) else None


def _leaky_relu(slope: float) -> Activation:
    def derivative(t: Tensor) -> Tensor:
        return torch.where(t > 0, torch.ones_like(t), torch.full_like(t, slope))

    return Activation(
        lambda z: functional.leaky_relu(z, slope),
        # With a negative slope the output no longer tells the sign of the input.
        derivative if slope >= 0 else None,
        derivative,
    )


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _silu_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * (1.0 + z * torch.sigmoid(-z))


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z.square()) / (2.0 * torch.pi) ** 0.5
    slope: Tensor = 0.5 * torch.erfc(-z / 2.0**0.5) + z * density
    return slope


def _step(t: Tensor) -> Tensor:
    return (t > 0).to(t.dtype)


_TABLE: dict[str, Activation] = {
    "identity": Activation(lambda z: z, torch.ones_like, torch.ones_like),
    "relu": Activation(torch.relu, _step, _step),
    "sigmoid": Activation(torch.sigmoid, lambda x: x * (1.0 - x), _sigmoid_slope),
    "tanh": Activation(
        torch.tanh, lambda x: 1.0 - x.square(), lambda z: 1.0 - torch.tanh(z).square()
    ),
    "gelu": Activation(functional.gelu, None, _gelu_slope),
    "silu": Activation(functional.silu, None, _silu_slope),
}
