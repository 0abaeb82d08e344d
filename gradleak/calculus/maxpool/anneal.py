"""From nothing to an input near the true one: choices and input in turn, cooled (§6e).

The choices are probabilities. At first they follow the values alone, then value and gradient; the
input is solved for given their expectation, with entries above their bound pulled down to it and a
prior for smooth maps that fades as the gradient begins to fit. Every few rounds the choices are
heated, which frees what settled wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.maxpool.candidates import Candidates
from gradleak.calculus.maxpool.choices import refine_choices
from gradleak.calculus.maxpool.equations import Equations
from gradleak.calculus.maxpool.stem import PooledConvolution

# Rounds by values alone, rounds until channels are judged singly, and between two heatings.
_WARM, _SETTLED, _PERIOD = 8, 12, 8
_SWEEPS, _HEAT, _HOT_MISFIT = 2, 4.0, 0.02
# Steps of conjugate gradients, few as long as the choices are poor.
_FEW, _MORE, _TOLERANCE = 60, 120, 1e-11
# Weight of an exceeded bound, of smoothness, and the shares of the gradient's misfit that count as
# error of an entry and of a choice.
_BOUND, _SMOOTH, _ENTRY, _CHOICE = 0.7, 4.0, 0.5, 0.2
_LEAST = 1e-14
# Open windows that there have to be for their spread to mean something.
_FEWEST = 2
_SAMPLED = 10000


@dataclass(frozen=True)
class Approach:
    """An input ``x`` (C, N·places) after a round, and the gradient's relative ``misfit``."""

    x: Tensor
    misfit: float
    warm: bool


@dataclass(frozen=True)
class _Fit:
    """How choices fit at an input."""

    apart: Tensor
    misfit: Tensor
    gradient: float
    error: float


def anneal(
    stem: PooledConvolution, candidates: Candidates, rounds: int, dice: torch.Generator
) -> Iterator[Approach]:
    """Yield the input after each of ``rounds`` rounds; ``dice`` orders the windows.

    Without open windows there is nothing to begin with, and none is yielded.
    """
    delta = stem.joined(stem.delta)
    x = stem.zeros()
    taken = candidates.value[candidates.sure]
    if len(taken) < _FEWEST:
        return
    width, typical = float(taken.std()), float(taken.square().mean().sqrt())
    choices = candidates.normalised(candidates.prior)
    for number in range(rounds):
        patches = stem.patches(x)
        entries = stem.output(patches)
        seen = candidates.gather(entries)
        apart = candidates.value[:, :, None] - seen
        if number < _WARM:
            choices = candidates.normalised(candidates.prior - apart / width)
        else:
            log_odds = candidates.prior - (apart / width).square() / 2.0
            choices = _chosen(
                stem, candidates, delta, patches, choices, log_odds, _heat(number, dice), dice
            )
        expected = candidates.scatter(choices * delta[:, :, None])
        above = (entries > candidates.bound) & (candidates.scatter(choices) < 0.5)
        over = (entries - candidates.bound).clamp(min=0.0).square().mean()
        fit = _fit(stem, candidates, choices, seen, expected, patches, float(over), typical)
        weights = _weights(candidates, choices, fit, number >= _SETTLED, typical)
        pulled = above * (_BOUND / fit.error**2)
        total = candidates.scatter(weights) + pulled
        wanted = candidates.scatter(weights * candidates.value[:, :, None])
        wanted = wanted + pulled * candidates.bound
        extra = 0.1 * fit.misfit.mean() if number < _SETTLED else fit.misfit.quantile(0.6)
        least = _LEAST**2 * stem.gradient.square().mean()
        equations = Equations(
            stem,
            total,
            wanted / total.clamp(min=1e-300),
            expected,
            1.0 / (fit.misfit + extra + least)[:, None],
            _SMOOTH * min(1.0, 3.0 * fit.gradient),
        )
        x = equations.approached(x, _FEW if number < _SETTLED else _MORE, _TOLERANCE)
        yield Approach(x, fit.gradient, number > _WARM)
        again = candidates.gather(stem.output(stem.patches(x)))
        off = ((choices * again).sum(2) - candidates.value)[candidates.sure]
        width = max(float(off.square().mean().sqrt()), _CHOICE * fit.gradient * typical, 1e-12)


def _heat(number: int, dice: torch.Generator) -> float:
    """Return how hot the choices of a round are, one being cold."""
    if number < _SETTLED or (number - _WARM) % _PERIOD:
        return 1.0
    return _HEAT * (1.0 + 0.5 * float(torch.rand((), generator=dice)))


def _chosen(
    stem: PooledConvolution,
    candidates: Candidates,
    delta: Tensor,
    patches: Tensor,
    choices: Tensor,
    log_odds: Tensor,
    heat: float,
    dice: torch.Generator,
) -> Tensor:
    """Refine ``choices`` by value and gradient."""
    size = stem.gradient.square().mean()
    if heat > 1.0:
        log_odds = candidates.prior + (log_odds - candidates.prior) / heat**2
        choices = candidates.normalised(log_odds)
        variance = (heat * _HOT_MISFIT) ** 2 * size.expand(stem.outputs, 1)
    else:
        expected = candidates.scatter(choices * delta[:, :, None])
        left = stem.gradient - expected @ patches.mT
        variance = left.square().mean(1, keepdim=True).clamp(min=_LEAST**2 * float(size))
    windows = stem.pools.shape[1]
    orders = [torch.randperm(windows, generator=dice).tolist() for _ in range(_SWEEPS)]
    return refine_choices(stem, candidates, delta, patches, choices, log_odds, variance, orders)


def _fit(
    stem: PooledConvolution,
    candidates: Candidates,
    choices: Tensor,
    seen: Tensor,
    expected: Tensor,
    patches: Tensor,
    over: float,
    typical: float,
) -> _Fit:
    """See how well values and gradient are met; ``over`` is the mean square above the bounds."""
    apart = (choices * seen).sum(2) - candidates.value
    misfit = (stem.gradient - expected @ patches.mT).square().mean(1)
    gradient = float((misfit.mean() / stem.gradient.square().mean()).sqrt())
    error = math.sqrt(float(apart[candidates.sure].square().mean()) + over)
    return _Fit(apart.abs(), misfit, gradient, max(error, _ENTRY * gradient * typical, 1e-300))


def _weights(
    candidates: Candidates, choices: Tensor, fit: _Fit, settled: bool, typical: float
) -> Tensor:
    """Weigh each choice (O, N·Q, K+1) as an equation for the entry that it takes."""
    if not settled:
        return choices / fit.error**2
    apart = fit.apart[candidates.sure]
    usual = float(apart[:: 1 + len(apart) // _SAMPLED].quantile(0.7))
    share = float((fit.misfit.quantile(0.6) / fit.misfit.mean()).sqrt()) * fit.gradient
    least = max(usual, _ENTRY * typical * share, _LEAST * typical)
    return choices / (fit.apart.square() + least**2)[:, :, None]
