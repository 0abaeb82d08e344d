"""What a client does to its gradient before it sends it: noise, clipping, pruning, quantisation.

Each defence is a function of all gradients together, tensor by tensor where the literature does it
so. They are here to be attacked: what is left of label and picture is then measured, not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.errors import UsageError

Gradients = Mapping[str, Tensor]


class Defense(Protocol):
    """A change to gradients; its fields are what the bundle's metadata record."""

    @property
    def name(self) -> str:
        """What the metadata call it."""

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the changed gradients, in float64 or as they came."""


@dataclass(frozen=True)
class Noise:
    """Independent noise of standard deviation ``std`` on every entry, Gaussian or Laplace.

    In the gradient's own unit, or ``relative`` to the root mean square of each tensor. Source: DLG,
    arXiv 1906.08935, section 5.
    """

    std: float
    law: str = "gaussian"
    relative: bool = False
    name = "noise"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a deviation that is none, or another law."""
        _require(0.0 < self.std < math.inf, "noise", self.std, "a positive number")
        _require(self.law in ("gaussian", "laplace"), "law", self.law, "gaussian or laplace")

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Add the noise."""
        return {
            name: g + self._scale(g) * self._draw(g, generator) for name, g in gradients.items()
        }

    def _scale(self, gradient: Tensor) -> float:
        return self.std * (float(gradient.square().mean().sqrt()) if self.relative else 1.0)

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw noise of standard deviation 1."""
        if self.law == "gaussian":
            return torch.randn(like.shape, generator=generator, dtype=like.dtype)
        # The difference of two exponentials is Laplace, of variance 2.
        pair = torch.empty((2, *like.shape), dtype=like.dtype).exponential_(generator=generator)
        return (pair[0] - pair[1]) / math.sqrt(2.0)


@dataclass(frozen=True)
class Clipping:
    """All gradients multiplied by min(1, ``norm`` / ‖g‖), ‖g‖ over all tensors together."""

    norm: float
    name = "clip"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a norm that is not positive."""
        _require(0.0 < self.norm < math.inf, "clip", self.norm, "a positive number")

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Scale the gradients down, if they are longer."""
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        factor = 1.0 if whole == 0.0 else min(1.0, self.norm / whole)
        return {name: factor * g for name, g in gradients.items()}


@dataclass(frozen=True)
class DpSgd:
    """Clipping to ``norm``, then Gaussian noise of ``multiplier`` · ``norm`` / ``samples``.

    Of one sample this is a step of DP-SGD (arXiv 1607.00133, algorithm 1). Of a batch it is not:
    there each sample is clipped before they are averaged, and a bundle holds the average.
    """

    norm: float
    multiplier: float
    samples: int = 1
    name = "dp-sgd"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for numbers out of range."""
        _require(0.0 < self.norm < math.inf, "clipping norm", self.norm, "a positive number")
        good = 0.0 < self.multiplier < math.inf
        _require(good, "noise multiplier", self.multiplier, "a positive number")

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Clip and add the noise."""
        clipped = Clipping(self.norm).apply(gradients, generator)
        return Noise(self.multiplier * self.norm / self.samples).apply(clipped, generator)


@dataclass(frozen=True)
class TopK:
    """Of each tensor the ``share`` of entries of largest size; the others become zero.

    At least one entry stays. Source: Deep Gradient Compression, arXiv 1712.01887.
    """

    share: float
    name = "top-k"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a share that is not between 0 and 1."""
        _require(0.0 < self.share <= 1.0, "top-k", self.share, "a share above 0, at most 1")

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Keep the largest entries."""
        return {name: self._kept(gradient) for name, gradient in gradients.items()}

    def _kept(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten()
        places = flat.abs().topk(max(1, round(self.share * flat.numel()))).indices
        return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(gradient)


@dataclass(frozen=True)
class Quantisation:
    """Each tensor rounded to 2^``bits`` − 1 equally spaced values between −max|g| and max|g|.

    One bit is the sign alone, times the mean size, zeros staying zeros (signSGD with a scale,
    arXiv 1901.09847). Rounding is to the nearest value.
    """

    bits: int
    name = "quantise"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a number of bits that is none."""
        _require(1 <= self.bits <= 32, "bits", self.bits, "from 1 to 32")

    def apply(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Round the gradients."""
        return {name: self._rounded(gradient) for name, gradient in gradients.items()}

    def _rounded(self, gradient: Tensor) -> Tensor:
        sizes = gradient.abs()
        if self.bits == 1:
            return gradient.sign() * sizes.mean()
        largest = float(sizes.max())
        if largest == 0.0:
            return gradient
        step = largest / (2 ** (self.bits - 1) - 1)
        rounded: Tensor = (gradient / step).round() * step
        return rounded


def apply_all(
    defenses: Sequence[Defense], gradients: Gradients, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return ``gradients`` after one defence and the next, in their own dtypes."""
    changed: Gradients = {name: g.double() for name, g in gradients.items()}
    for defense in defenses:
        changed = defense.apply(changed, generator)
    return {name: changed[name].to(g.dtype) for name, g in gradients.items()}


def _require(good: bool, what: str, value: object, wanted: str) -> None:
    if not good:
        raise UsageError(f"{what} is {value}", f"give {wanted}")
