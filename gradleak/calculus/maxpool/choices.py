"""Choosing each window's entry by its value and by the gradient (§6e).

Given patches p, the gradient of output channel o is Σ_q δ_oq p[entry of q]: a window's choice
depends on those of the others in its channel. As long as little is known, each window in turn gets
the probabilities that the expectation of the others leaves it, a mean field. Once few are wrong,
they are changed one or two at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus.maxpool.candidates import NEVER, Candidates
from gradleak.calculus.maxpool.stem import PooledConvolution
from gradleak.calculus.pairs import best_changes

# Choices that are less likely than the best of their window by more (nats) are not tried; of the
# others so many, in so many changes.
_UNLIKELY, _TRIED, _CHANGES = 40.0, 500, 100


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


def mend_choices(
    stem: PooledConvolution,
    candidates: Candidates,
    patches: Tensor,
    choices: Tensor,
    log_odds: Tensor,
    noise: float,
    channels: Tensor,
) -> Tensor:
    """Return ``choices`` of zeros and ones (O, N·Q, K+1) with those of some ``channels`` mended.

    Other arguments are as above; ``noise`` is the variance of an entry of the gradient.
    """
    mended = choices.clone()
    gram = F.pad(patches.mT @ patches, (0, 1, 0, 1))
    delta = stem.joined(stem.delta)
    expected = candidates.scatter(choices * delta[:, :, None])
    seen = F.pad((stem.gradient - expected @ patches.mT) @ patches, (0, 1))
    for channel in channels.tolist():
        mended[channel] = _mended(
            candidates, delta[channel], gram, seen[channel], choices[channel], log_odds[channel],
            candidates.allowed[channel], noise,
        )  # fmt: skip
    return mended


def _mended(
    candidates: Candidates,
    delta: Tensor,
    gram: Tensor,
    seen: Tensor,
    choices: Tensor,
    log_odds: Tensor,
    allowed: Tensor,
    noise: float,
) -> Tensor:
    """Change one or two of a channel's ``choices`` (N·Q, K+1) at a time as long as that gains."""
    chosen, seen = choices.argmax(1), seen.clone()
    likely = torch.where(allowed, log_odds, NEVER)
    best = likely.amax(1, keepdim=True)
    for _ in range(_CHANGES):
        tried = likely >= best - _UNLIKELY
        tried &= F.one_hot(chosen, tried.shape[1]) == 0
        window, entry = tried.nonzero().mT
        ahead = likely[window, entry] - likely[window, chosen[window]]
        few = ahead.topk(min(_TRIED, len(ahead))).indices
        window, entry, ahead = window[few], entry[few], ahead[few]
        to, fro = candidates.place[window, entry], candidates.place[window, chosen[window]]
        own = delta[window]
        between = gram[to][:, to] - gram[to][:, fro] - gram[fro][:, to] + gram[fro][:, fro]
        products = own[:, None] * own * between
        single = own * (seen[to] - seen[fro]) - 0.5 * products.diagonal() + noise * ahead
        products = products.masked_fill(window[:, None] == window, torch.inf)
        changes = best_changes(single, products, noise)
        if not changes:
            break
        for change in changes:
            seen -= own[change] * (gram[to[change]] - gram[fro[change]])
            chosen[window[change]] = entry[change]
    return F.one_hot(chosen, choices.shape[1]).to(choices) * allowed
