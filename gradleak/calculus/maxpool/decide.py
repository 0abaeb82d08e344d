"""The last step: one entry a window, and the input by all equations to the data's precision (§6e).

Once most choices are right the wrong ones are few, and sit in output channels whose gradient does
not fit. Those count for less, the input is solved for, and choices are made anew; what the values
alone leave open, such as two windows that agree by accident, the gradient decides.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.calculus.maxpool.candidates import Candidates
from gradleak.calculus.maxpool.choices import mend_choices, refine_choices
from gradleak.calculus.maxpool.equations import Equations
from gradleak.calculus.maxpool.precondition import Preconditioner
from gradleak.calculus.maxpool.stem import PooledConvolution

# Rounds of deciding and solving; a round that leaves more than this share of the median misfit
# ends them.
_ROUNDS, _GAIN = 10, 0.7
# A channel with that many times the median misfit (of squares) is decided by its gradient; these
# are the temperatures, and the misfit from which that is worth doing, or so many times the usual.
_OUTLYING, _HEATS, _NEAR, _NOISE = 64.0, (1e8, 1e4, 1e2, 1.0), 1e-3, 10.0
# Channels with so many times the median are mended window by window, so many of them.
_WRONG, _MENDED = 4.0, 64
# What fits within that many times the usual residual is taken for right.
JUMP = 20.0
# Nothing that is missed by more is, however noisy the data.
_LOST = 0.05
_ROUGHLY = 150
_SAMPLED = 10000


@dataclass(frozen=True)
class Decision:
    """An input ``x`` (C, N·places) with one choice (O, N·Q, K+1) a window.

    ``misfit`` (O,) are mean squares of what is left of the gradient, ``residual`` and ``beside``
    the relative size of that and of what is left of the pooled values; ``before`` is the
    preconditioner of the equations that the choices make, or of the last ones, None before any.
    """

    x: Tensor
    choices: Tensor
    misfit: Tensor
    residual: float
    beside: float
    before: Preconditioner | None

    def fits(self, usual: float) -> bool:
        """Whether gradient and values are met as usual: ``usual`` is a relative residual."""
        return max(self.residual, self.beside) <= min(JUMP * usual, _LOST)


def decide(
    stem: PooledConvolution, candidates: Candidates, x: Tensor, usual: float, ends: float
) -> Decision | None:
    """Decide all windows near an input ``x`` (C, N·places); None where that does not settle.

    ``usual`` is the relative residual that the data's noise leaves. At the time ``ends`` it is
    given up.
    """
    last, mended = math.inf, None
    before: Preconditioner | None = None
    found: Decision | None = None
    for _ in range(_ROUNDS):
        if time.monotonic() > ends:
            break
        patches = stem.patches(x)
        seen = candidates.gather(stem.output(patches))
        apart = (seen - candidates.value[:, :, None]).abs()
        width = _width(candidates, apart)
        log_odds = candidates.prior - (apart / width).square().clamp(max=1e12) / 2.0
        now = _judged(stem, candidates, x, patches, candidates.best(log_odds), before)
        if mended is not None:
            now = _better(stem, candidates, now, mended)
        median = float(now.misfit.median())
        enough = max(_NEAR, _NOISE * usual) ** 2
        near = median <= enough * float(stem.gradient.square().mean())
        if near and bool((now.misfit > _OUTLYING * median).any()):
            tried = _cooled(stem, candidates, patches, now.choices, log_odds, median)
            now = _better(stem, candidates, now, tried)
        if near:
            median = float(now.misfit.median())
            wrong = now.misfit.topk(min(_MENDED, len(now.misfit))).indices
            wrong = wrong[now.misfit[wrong] > _WRONG * median]
            mended = mend_choices(stem, candidates, patches, now.choices, log_odds, median, wrong)
            now = _better(stem, candidates, now, mended)
            mended, median = now.choices, float(now.misfit.median())
        done = now.fits(usual)
        if done and found is not None and now.residual >= _GAIN * found.residual:
            return min(found, now, key=lambda d: d.residual)
        if not done and (found is not None or median > _GAIN**2 * last):
            return found
        found = now if done else None
        last = median
        equations = _trusting(stem, candidates, now, usual)
        if near:
            before = equations.preconditioner()
            x = equations.solved(x, before, ends)
            found = None if found is None else replace(found, before=before)
        else:  # what is wrong still is worth no more
            x = equations.approached(x, _ROUGHLY, 1e-11)
    return found


def _width(candidates: Candidates, apart: Tensor) -> float:
    """Return how far most values are from the nearest candidate's."""
    nearest = torch.where(candidates.allowed, apart, math.inf).amin(2)[candidates.sure]
    nearest = nearest[:: 1 + len(nearest) // _SAMPLED]
    least = 1e-9 * float(candidates.value.abs().amax())
    return max(float(nearest.quantile(0.7)), least) if len(nearest) else least


def _judged(
    stem: PooledConvolution,
    candidates: Candidates,
    x: Tensor,
    patches: Tensor,
    choices: Tensor,
    before: Preconditioner | None,
) -> Decision:
    """See how ``choices`` fit at an input ``x`` with its ``patches``."""
    delta = candidates.scatter(choices * stem.joined(stem.delta)[:, :, None])
    left = stem.gradient - delta @ patches.mT
    apart = (choices * candidates.gather(stem.output(patches))).sum(2) - candidates.value
    whole = torch.linalg.vector_norm(stem.gradient)
    sure = candidates.sure
    beside = torch.linalg.vector_norm(apart[sure])
    return Decision(
        x=x,
        choices=choices,
        misfit=left.square().mean(1),
        residual=float(torch.linalg.vector_norm(left) / whole),
        beside=float(beside / torch.linalg.vector_norm(candidates.value[sure])),
        before=before,
    )


def _cooled(
    stem: PooledConvolution,
    candidates: Candidates,
    patches: Tensor,
    choices: Tensor,
    log_odds: Tensor,
    noise: float,
) -> Tensor:
    """Return the ``choices`` that a mean field cools down to."""
    variance = choices.new_full((len(choices), 1), 4.0 * noise)
    delta, order = stem.joined(stem.delta), range(stem.pools.shape[1])
    for heat in _HEATS:
        choices = refine_choices(
            stem, candidates, delta, patches, choices, log_odds / heat, variance * heat, [order]
        )
    return candidates.best(choices.log())


def _better(
    stem: PooledConvolution, candidates: Candidates, now: Decision, choices: Tensor
) -> Decision:
    """Take over other ``choices`` in the channels where they fit better."""
    patches = stem.patches(now.x)
    other = _judged(stem, candidates, now.x, patches, choices, now.before)
    better = (other.misfit < now.misfit)[:, None, None]
    mixed = torch.where(better, other.choices, now.choices)
    return _judged(stem, candidates, now.x, patches, mixed, now.before)


def _trusting(
    stem: PooledConvolution, candidates: Candidates, decision: Decision, usual: float
) -> Equations:
    """Return the equations of a decision, each weighing as much as it has been found to fit."""
    misfit, choices = decision.misfit, decision.choices
    size = float(stem.gradient.square().mean())
    weight = 1.0 / (misfit + misfit.median() + (0.1 * usual) ** 2 * size)
    entries = candidates.gather(stem.output(stem.patches(decision.x)))
    apart = ((choices * entries).sum(2) - candidates.value).abs()
    typical = float(candidates.value[candidates.sure].square().mean().sqrt())
    least = max(float(apart[candidates.sure].median()), usual * typical)
    trust = choices / (apart.square() + least**2)[:, :, None]
    total = candidates.scatter(trust)
    wanted = candidates.scatter(trust * candidates.value[:, :, None])
    return Equations(
        stem,
        total,
        wanted / total.clamp(min=1e-300),
        candidates.scatter(choices * stem.joined(stem.delta)[:, :, None]),
        weight[:, None],
    )
