"""From a pooled map and a gradient to the input: anneal, decide, and try again (§6e)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.maxpool.anneal import anneal
from gradleak.calculus.maxpool.candidates import find_candidates
from gradleak.calculus.maxpool.decide import decide
from gradleak.calculus.maxpool.stem import PooledConvolution

# A gradient missed by more is too far from a decision for one to be tried; after one that did not
# settle, the next is tried when the miss has shrunk by that factor. No miss is smaller than noise.
_FAR, _NEARER, _NOISE = 0.03, 0.5, 4.0
# Rounds of an attempt, for each sample and one more. An attempt whose best miss has not shrunk by a
# tenth in so many rounds is given up.
_ROUNDS, _PATIENCE, _PROGRESS = 60, 20, 0.9


@dataclass(frozen=True)
class PooledInput:
    """The input ``x`` (N, C, H, W) of a convolution under a pool, with errors ``std``.

    ``delta`` (N, O, P) is δ at the convolution's output. ``residual`` and ``beside`` are what is
    left of the gradient and of the pooled values, relative, and ``solved`` says whether both are
    what the noise leaves; if not, the input is the best one met. ``condition`` is a lower bound of
    the condition number of the equations, each weighing as its error.
    """

    x: Tensor
    std: Tensor
    delta: Tensor
    residual: float
    beside: float
    condition: float
    solved: bool


def recover_input(
    stem: PooledConvolution,
    usual: float,
    *,
    attempts: int = 2,
    seconds: float = math.inf,
    seed: int = 0,
) -> PooledInput:
    """Recover the input of ``stem`` where ``usual`` is the relative residual due to noise.

    Each of ``attempts`` is one annealing with dice of its own; what counts is that the gradient and
    the pooled values fit. After so many ``seconds`` it is given up.
    """
    ends = time.monotonic() + seconds
    rounds = _ROUNDS * (1 + stem.samples)
    candidates = find_candidates(stem)
    best, missed = stem.zeros(), math.inf
    for attempt in range(attempts):
        dice = torch.Generator().manual_seed(seed + attempt)
        worth, least, since = max(_FAR, _NOISE * usual), math.inf, 0
        for approach in anneal(stem, candidates, rounds, dice):
            if approach.misfit < missed:
                best, missed = approach.x, approach.misfit
            since += 1
            if approach.misfit < _PROGRESS * least:
                least, since = approach.misfit, 0
            elif since > _PATIENCE:
                break
            if time.monotonic() > ends:
                break
            if not approach.warm or approach.misfit > worth:
                continue
            worth = _NEARER * approach.misfit
            found = decide(stem, candidates, approach.x, usual, ends)
            if found is not None:
                delta = candidates.scatter(found.choices * stem.joined(stem.delta)[:, :, None])
                lost = torch.full_like(found.x, math.inf)
                before = found.before
                return PooledInput(
                    x=stem.maps(found.x),
                    std=stem.maps(lost if before is None else before.spread(found.x)),
                    delta=delta.view(len(delta), stem.samples, -1).transpose(0, 1),
                    residual=found.residual,
                    beside=found.beside,
                    condition=math.inf if before is None else before.condition(),
                    solved=True,
                )
        if time.monotonic() > ends:
            break
    nothing = torch.zeros_like(stem.delta[:, :, :1]).expand(-1, -1, stem.windows)
    x, never = stem.maps(best), math.inf
    return PooledInput(x, torch.full_like(x, never), nothing, missed, never, never, False)
