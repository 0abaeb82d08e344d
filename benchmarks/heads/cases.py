"""Gradients of single real samples with labels of four families, as float32 autograd makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.softlabels import soft_label
from heads.sources import Source

FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
LARGEST_SMOOTHING = 0.5


@dataclass(frozen=True)
class Case:
    """One gradient (C, D), and the truth behind it: ``feature`` (D,), ``label`` (C,) float64."""

    source: Source
    family: str
    choice: str
    gradient: Tensor
    feature: Tensor
    label: Tensor


def cases(source: Source, each: int, seed: int) -> Iterator[Case]:
    """Yield ``each`` gradients of every family and choice of classes.

    α ~ U(0, 0.5), λ ~ U(0, 1); for mixup two images are mixed by λ and the network sees the
    mixture, as while training. The predicted classes are those of the images before mixing.
    """
    single = source.features(source.images)
    logits = F.linear(single, source.weight, source.bias)
    predicted = logits.argmax(1)
    for place, family in enumerate(FAMILIES):
        for choice in source.choices:
            dice = torch.Generator().manual_seed(1000 * seed + 10 * place + len(choice))
            mixed = "mixup" in family
            apart = predicted if choice == "predicted" else torch.arange(len(predicted))
            rows = _pairs(apart, each, dice) if mixed else _rows(len(single), each, dice)
            shares = _uniform(each, dice) if mixed else torch.ones(each, dtype=torch.float64)
            alphas = LARGEST_SMOOTHING * _uniform(each, dice)
            if mixed:
                share = shares.float()[:, None, None, None]
                first, second = source.images[rows[:, 0]], source.images[rows[:, 1]]
                features = source.features(share * first + (1.0 - share) * second)
            else:
                features = single[rows[:, 0]]
            for row, feature, share, alpha in zip(
                rows, features, shares.tolist(), alphas.tolist(), strict=True
            ):
                if choice == "predicted":
                    classes = predicted[row].tolist()
                else:
                    classes = torch.randperm(source.classes, generator=dice)[: len(row)].tolist()
                weights = list(zip(classes, (share, 1.0 - share), strict=False))
                label = soft_label(weights, source.classes, alpha if "smooth" in family else 0.0)
                gradient = head_gradient(feature, label, source.weight, source.bias)
                yield Case(source, family, choice, gradient, feature, label)


def head_gradient(feature: Tensor, label: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return (C, D) ∂ cross-entropy / ∂ weight for one sample, by autograd in float32."""
    leaf = weight.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(feature[None], leaf, bias), label[None].float())
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _uniform(count: int, dice: torch.Generator) -> Tensor:
    return torch.rand(count, generator=dice, dtype=torch.float64)


def _rows(images: int, count: int, dice: torch.Generator) -> Tensor:
    """Return (count, 1) places of images, every image as often as any other."""
    rounds = [torch.randperm(images, generator=dice) for _ in range(-(-count // images))]
    return torch.cat(rounds)[:count, None]


def _pairs(kind: Tensor, count: int, dice: torch.Generator) -> Tensor:
    """Return (count, 2) random places of images that are of two kinds (N,)."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        first, second = torch.randint(len(kind), (2,), generator=dice).tolist()
        if kind[first] != kind[second]:
            pairs.append((first, second))
    return torch.tensor(pairs)
