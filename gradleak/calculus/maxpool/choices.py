"""Choosing each window's entry by its value and by the gradient: a mean field (§6e).

Given patches p, the gradient of output channel o is Σ_q δ_oq p[entry of q]: a window's choice
depends on those of the others in its channel. Each window in turn gets the probabilities that the
expectation of the others leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.maxpool.candidates import NEVER, Candidates
from gradleak.calculus.maxpool.stem import PooledConvolution


def refine_choices(
    stem: PooledConvolution,
    candidates: Candidates,
    delta: Tensor,
    patches: Tensor,
    choices: Tensor,
    log_odds: Tensor,
    variance: Tensor,
    orders: Sequence[Sequence[int]],
) -> Tensor:
    """Return ``choices`` (O, N·Q, K+1) after one pass over the windows for each of ``orders``.

    ``delta`` (O, N·Q) belongs to the windows, ``patches`` is (C·T, N·P); ``log_odds``
    (O, N·Q, K+1) are those by value alone, ``variance`` (O, 1) that of a gradient's entry.
    """
    choices = choices.clone()
    gram = patches.mT @ patches
    expected = candidates.scatter(choices * delta[:, :, None])
    # What is left of the gradient, seen by each patch; none is the last, and sees nothing.
    seen = F.pad(stem.gradient @ patches - expected @ gram, (0, 1))
    gram = F.pad(gram, (0, 1, 0, 1))
    log_odds = torch.where(candidates.allowed, log_odds, NEVER)
    for order in orders:
        for q in order:
            place, own = candidates.place[q], delta[:, q : q + 1]
            between = gram[place][:, place]
            gain = seen[:, place] + own * (choices[:, q] @ between)
            odds = own * (2.0 * gain - own * between.diagonal()) / (2.0 * variance)
            found = torch.softmax(odds + log_odds[:, q], 1)
            seen -= (own * (found - choices[:, q])) @ gram[place]
            choices[:, q] = found
    return choices
