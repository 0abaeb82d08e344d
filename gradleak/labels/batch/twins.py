"""Samples that a network hardly tells apart: the last ones of a batch, found together (§4).

Two samples of one class whose softmax is nearly the same give G a small singular value. Along its
directions every sample's own equations hold to second order, and below some size to rounding: there
they leave a valley. All samples together do not, (1/M) Σ δ_n a_nᵀ = U S is linear in each of them.
So the ends of the search, good but for their place in the valley, complete the batch, and all are
polished together from several choices of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.labels.batch.judge import explains
from gradleak.labels.batch.polish import Labels, labels_of, polish
from gradleak.labels.batch.roots import Roots
from gradleak.labels.batch.samples import Found, search_once
from gradleak.labels.batch.subspace import Subspace
from gradleak.softlabels import Family

# Choices of ends that are tried, and polishing steps for each.
_TRIALS, _STEPS = 16, 40
# How far along the weak directions the chosen ends are moved, in their own size.
_SPREAD = 0.3


def complete(
    whole: Subspace, found: Sequence[Found], families: Sequence[Family], generator: torch.Generator
) -> tuple[Tensor, Labels] | None:
    """Complete a batch of which samples were ``found``: coordinates (N, n) and labels, or None.

    The label families of the missing samples are tried one by one, those of the samples found
    first.
    """
    missing = whole.size - sum(len(f.roots.a) for f in found)
    weak = whole.weak()
    # Each weak direction is one pair's. With nothing found there is nothing to complete.
    if not found or not 0 < missing <= 2 * int(weak.sum()):
        return None
    names = [f.family.name for f in found]
    for family in sorted(families, key=lambda f: -names.count(f.name)):
        ends = search_once(whole, found, family, generator)
        if ends is None:
            continue
        for _ in range(_TRIALS):
            chosen = ends.take(_some(ends, missing, generator))
            shift = torch.randn(chosen.a.shape, generator=generator, dtype=chosen.a.dtype)
            size = chosen.a.square().mean(1, keepdim=True).sqrt()
            moved = chosen.a + _SPREAD * weak * size * shift.to(chosen.a.device)
            parts = [*found, Found(replace(chosen, a=moved), family)]
            solved = polish(whole, *laid_out(whole, parts), steps=_STEPS)
            if solved.freedom > 0 and explains(whole, solved):
                return solved.a, solved.labels
    return None


def _some(ends: Roots, count: int, generator: torch.Generator) -> Tensor:
    """Choose ``count`` ends: one of every class, as far as they go, and then of any.

    A class is that of the largest weight; what is missing is mostly one twin of each.
    """
    first = ends.classes[:, 0].tolist()
    classes = sorted(set(first))
    order = torch.randperm(len(classes), generator=generator).tolist()[:count]
    order += torch.randint(len(classes), (count - len(order),), generator=generator).tolist()
    chosen = []
    for place in order:
        members = [k for k, c in enumerate(first) if c == classes[place]]
        chosen.append(members[int(torch.randint(len(members), (1,), generator=generator))])
    return torch.tensor(chosen, device=ends.a.device)


def laid_out(whole: Subspace, found: Sequence[Found]) -> tuple[Tensor, Labels]:
    """Return the coordinates and labels of all samples in ``found``."""
    supports = [support for f in found for support in f.roots.classes]
    weights = [weight for f in found for weight in f.roots.weights]
    base = torch.tensor([f.family.base for f in found for _ in f.roots.a])
    labels = labels_of(whole.classes, supports, weights, base)
    return torch.cat([f.roots.a for f in found]), labels
