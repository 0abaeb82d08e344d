"""Two classification tasks from installed packages: handwritten digits and crops of photographs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import labelled_crops, photographs
from torch import Tensor
from torch.nn import functional as F

CROPS, HELD_OUT_CROPS = 900, 360
HELD_OUT_DIGITS = 360


@dataclass(frozen=True)
class Task:
    """Images (N, 3, size, size) in [0, 1] with classes (N,), to train on and held out."""

    name: str
    classes: int
    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def digits(size: int = 32) -> Task:
    """Return scikit-learn's 1797 handwritten digits, enlarged from 8×8, a fifth held out."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16.0
    images = F.interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[:HELD_OUT_DIGITS], order[HELD_OUT_DIGITS:]
    return Task("digits", 10, images[kept], labels[kept], images[held], labels[held])


def photograph_crops(size: int = 32) -> Task:
    """Return random squares of the installed photographs: the class is the photograph."""
    images, labels = labelled_crops(size, CROPS, torch.Generator().manual_seed(1))
    held, held_labels = labelled_crops(size, HELD_OUT_CROPS, torch.Generator().manual_seed(2))
    return Task("photographs", len(photographs()), images, labels, held, held_labels)
