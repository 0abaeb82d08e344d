"""At which noise of DP-SGD does the recovery stop? A step by Opacus, captured and attacked.

    python examples/dp_sgd.py [--network mlp|cnn] [--clip NORM]

A client trains one step on one photograph, its optimiser made private by Opacus's PrivacyEngine:
the gradient of every sample is clipped to a norm, and Gaussian noise of a multiple of that norm is
added. What the optimiser steps with is what a server would receive, and it is attacked. ε is what
Opacus's accountant says of that one step, at δ = 1e-5. The photograph and its label are looked at
again only to say how close an answer came.

Needs opacus: pip install 'gradleak[examples]'.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from dataclasses import dataclass

import torch
from federated_networks import CLASSES, NETWORKS, data_of, initial
from opacus import PrivacyEngine
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradleak
from gradleak.errors import GradleakError
from gradleak.metrics import psnr
from gradleak.reconstruction.options import MatchSettings

MULTIPLIERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DELTA = 1e-5
CLIENT = 0


@dataclass(frozen=True)
class Attacked:
    """What one noise multiplier left: whether the label is right, and the picture's PSNR (dB)."""

    multiplier: float
    epsilon: float
    label: str
    right: bool
    image: str
    psnr: float


def private_step(network: str, multiplier: float, clip: float, seed: int) -> tuple:
    """Take one DP-SGD step; return the bundle that a server could make of it, and ε."""
    images, labels = data_of(CLIENT)
    model = initial(network)
    before = copy.deepcopy(model)
    engine = PrivacyEngine()
    private, optimiser, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=len(images)),
        noise_multiplier=multiplier,
        max_grad_norm=clip,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(seed),
    )
    for x, y in loader:
        F.cross_entropy(private(x), y).backward()
        optimiser.step()
    noisy = [parameter.grad for parameter in model.parameters()]
    epsilon = engine.get_epsilon(DELTA) if multiplier > 0.0 else math.inf
    return gradleak.Bundle.from_gradients(before, noisy), epsilon


def attack(network: str, multiplier: float, clip: float, seed: int = 0) -> Attacked:
    """Attack one private step: label, features and picture."""
    bundle, epsilon = private_step(network, multiplier, clip, seed)
    images, labels = data_of(CLIENT)
    label, right, image, quality = "none", False, "none", math.nan
    try:
        labelled = gradleak.recover_label(bundle)
        found = labelled.result
        if found.labels is not None and len(found.labels) == 1:
            k = int(found.labels[0].argmax())
            weight = float(found.labels[0, k])
            label, right = f"{CLASSES[k]} {weight:.3f}, {found.verdict}", k == int(labels[0])
        featured = gradleak.recover_feature(labelled.bundle)
        outcome = gradleak.reconstruct(
            featured.bundle, model=before_of(network), settings=MatchSettings(iterations=300)
        )
        quality = float(psnr(outcome.images.double(), images.double())[0])
        image = f"{outcome.verdict}, by {outcome.method}"
    except GradleakError as error:
        image = f"none: {error}"
    return Attacked(multiplier, epsilon, label, right, image, quality)


