"""How gradients are matched: the options, their bounds, and the defaults for a network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from gradleak.errors import UsageError

_STEPS = {"adam": 400, "lbfgs": 10000}
_LEARNING_RATE = {"adam": 0.1, "lbfgs": 1.0}


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """How to match; ``default_options`` picks the values measured to be best for a network.

    ``distance`` between gradients is ``cosine`` or ``l2``; ``optimiser`` is ``adam`` (signed,
    steps decaying by 10 at 3/8, 5/8 and 7/8 of the run) or ``lbfgs`` (float64, strong Wolfe line
    search). ``steps`` counts evaluations of the objective a restart (None: 400 for adam, 10000
    for lbfgs); ``time_limit`` is in seconds over all restarts, which share it evenly (None: no
    limit); ``learning_rate`` None is 0.1 (normalised pixel values) for adam and 1 for lbfgs;
    ``tv`` and ``feature_weight`` are the weights of total variation and of the feature term.
    Raises ``UsageError`` for a value out of bounds.

    The defaults are those that did best on photographs; ``benchmarks/matching.py`` measures them
    (docs/results/matching.md). More total variation flattens, and a heavier feature term distracts.
    """

    distance: Literal["cosine", "l2"] = "cosine"
    optimiser: Literal["adam", "lbfgs"] = "adam"
    steps: int | None = None
    restarts: int = 1
    time_limit: float | None = 60.0
    tv: float = 0.01
    feature_weight: float = 0.1
    learning_rate: float | None = None

    def complete(self) -> MatchOptions:
        """Fill in what the optimiser decides: steps and learning rate."""
        return replace(
            self,
            steps=self.steps or _STEPS[self.optimiser],
            learning_rate=self.learning_rate or _LEARNING_RATE[self.optimiser],
        )

    def __post_init__(self) -> None:
        """Check every bound."""
        _require(self.distance in ("cosine", "l2"), "distance", self.distance, "cosine or l2")
        _require(self.optimiser in _STEPS, "optimiser", self.optimiser, "adam or lbfgs")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more")
        _require(self.restarts >= 1, "restarts", self.restarts, "1 or more")
        for name in ("time_limit", "learning_rate"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "a number above 0")
        for name in ("tv", "feature_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "a number of 0 or more")


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """What a user asks of the matching; None (or ``auto``) is chosen for the network.

    The fields are those of :class:`MatchOptions`.
    """

    distance: str = "auto"
    optimiser: str = "auto"
    steps: int | None = None
    restarts: int = 1
    time_limit: float | None = 60.0
    tv: float | None = None
    feature_weight: float | None = None

    def options(self, model: nn.Module, shape: tuple[int, int, int]) -> MatchOptions:
        """Complete the settings for a network; an optimiser that is named brings its own defaults.

        Raises ``UsageError`` for a value out of bounds.
        """
        base = _DEFAULTS.get(self.optimiser) or default_options(model, shape)
        asked: dict[str, Any] = {
            name: value for name, value in vars(self).items() if value not in (None, "auto")
        }
        return replace(base, **(asked | {"time_limit": self.time_limit}))


def default_options(model: nn.Module, shape: tuple[int, int, int]) -> MatchOptions:
    """Choose L2 with L-BFGS for a smooth network, cosine with signed Adam for one with kinks.

    A network of ReLUs and max-pools is piecewise linear: its logits have no curvature along any
    line, and the kinks of its gradient defeat the quasi-Newton line search (see
    ``MatchOptions``). The curvature is measured, not read off module names; ``shape`` is
    (C, H, W). On a smooth network neither prior is used: the feature came from the same gradient,
    and its rounding would become the image's.
    """
    return _DEFAULTS["adam" if _is_piecewise_linear(model, shape) else "lbfgs"]


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}", f"use {allowed}")


def _is_piecewise_linear(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether the logits have no curvature along a random line at a random image."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn((2, 1, *shape), generator=generator).to(parameter)
    x = draw[0].requires_grad_()
    with torch.enable_grad():
        try:
            logits = model(x)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the network refused images of shape {list(shape)} ({str(error).splitlines()[0]})",
                "correct input_shape in the metadata",
            ) from error
        weights = torch.linspace(-1, 1, logits.numel()).to(logits)
        (slope,) = torch.autograd.grad(
            (logits.flatten() * weights).sum(), x, create_graph=True, materialize_grads=True
        )
        if not slope.requires_grad:
            return True
        (bend,) = torch.autograd.grad((slope * draw[1]).sum(), x, materialize_grads=True)
    return not bool(bend.any())


_DEFAULTS = {
    "adam": MatchOptions(),
    "lbfgs": MatchOptions(distance="l2", optimiser="lbfgs", tv=0.0, feature_weight=0.0),
}
