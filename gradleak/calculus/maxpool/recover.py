"""From a pooled map and a gradient to the input: anneal, decide, and try again (§6e)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.maxpool.anneal import anneal
from gradleak.calculus.maxpool.candidates import find_candidates
from gradleak.calculus.maxpool.decide import Decision, decide
from gradleak.calculus.maxpool.equations import DENSE
from gradleak.calculus.maxpool.stem import PooledConvolution

# A gradient missed by more is too far from a decision for one to be tried.
_FAR = 0.05


@dataclass(frozen=True)
class PooledInput:
    """The input ``x`` (N, C, H, W) of a convolution under a pool, with errors ``std``.

    ``delta`` (N, O, P) is δ at what the pool reads. ``residual`` and ``beside`` are what is left
    of the gradient and of the pooled values, relative. ``solved`` says whether both are what the
    noise leaves; if not, the input is the best one met.
    """

    x: Tensor
    std: Tensor
    delta: Tensor
    residual: float
    beside: float
    solved: bool


def recover_input(
    stem: PooledConvolution, usual: float, *, rounds: int = 40, attempts: int = 2, seed: int = 0
) -> PooledInput:
    """Recover the input of ``stem`` where ``usual`` is the relative residual due to noise.

    Each of ``attempts`` is one annealing of at most ``rounds`` rounds with dice of its own; what
    counts is that the gradient and the pooled values fit.
    """
    candidates = find_candidates(stem)
    best, missed = stem.zeros(), float("inf")
    for attempt in range(attempts):
        dice = torch.Generator().manual_seed(seed + attempt)
        for number, approach in enumerate(anneal(stem, candidates, rounds, dice)):
            if approach.misfit < missed:
                best, missed = approach.x, approach.misfit
            if not approach.warm or number % 2 == 0 or approach.misfit > _FAR:
                continue
            found = decide(stem, candidates, approach.x, usual)
            if found is not None:
                delta = candidates.scatter(found.choices * stem.joined(stem.delta)[:, :, None])
                return PooledInput(
                    x=stem.maps(found.x),
                    std=stem.maps(_errors(stem, found)),
                    delta=delta.view(len(delta), stem.samples, -1).transpose(0, 1),
                    residual=found.residual,
                    beside=found.beside,
                    solved=True,
                )
    nothing = torch.zeros_like(stem.delta[:, :, :1]).expand(-1, -1, stem.windows)
    x = stem.maps(best)
    return PooledInput(x, torch.full_like(x, float("inf")), nothing, missed, float("inf"), False)


def _errors(stem: PooledConvolution, found: Decision) -> Tensor:
    """Return the standard deviations (C, N·places): each sample's with the others known.

    The weights of the last equations were the inverse squares of their errors, but for a factor
    that the gradient's own misfit gives.
    """
    parts = []
    for factor in found.factors or []:
        spread = torch.cholesky_inverse(factor).diagonal().sqrt()
        whole = stem.channels * stem.convolution.places <= DENSE
        parts.append(
            spread.view(stem.channels, -1) if whole else spread.expand(stem.channels, -1)
        )
    if not parts:
        return torch.full_like(found.x, float("inf"))
    return torch.stack(parts, 1).reshape(found.x.shape)
