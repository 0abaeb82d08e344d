"""At which noise of DP-SGD does the recovery stop? A step by Opacus, captured and attacked.

    python examples/dp_sgd.py [--network mlp|cnn] [--clip NORM] [--noise Z Z …]

A client trains one step on one photograph, its optimiser made private by Opacus's PrivacyEngine:
the gradient of every sample is clipped to a norm, and Gaussian noise of Z times that norm is added.
What the optimiser steps with is what a server would receive, and it is attacked; the attack knows
that there was clipping, and neither its factor nor the noise. ε is what Opacus's accountant says of
that one step at δ = 1e-5. The photograph and its label are looked at again only to say how close an
answer came.

Needs opacus: pip install 'gradleak[examples]'.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from federated_networks import CLASSES, NETWORKS, data_of, initial
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradleak
from gradleak.metrics import pixels_that_differ, psnr
from gradleak.reconstruction.options import MatchSettings

NOISES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DELTA, CLIENT = 1e-5, 0
RECOGNISABLE = 20.0  # dB


@dataclass(frozen=True)
class Attacked:
    """What was recovered of a step with noise multiplier ``noise``.

    ``label`` and ``picture`` are for people; ``psnr`` in dB, nan without a picture; ``differing``
    8-bit values are wrong.
    """

    noise: float
    epsilon: float
    label: str
    picture: str
    class_right: bool
    psnr: float
    differing: int


def private_step(network: str, noise: float, clip: float) -> tuple[gradleak.Bundle, float]:
    """Take one DP-SGD step; return what a server would make of it, and ε."""
    from opacus import PrivacyEngine

    model, (images, labels) = initial(network), data_of(CLIENT)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        # Opacus: this is an experiment, without secure random numbers or Poisson sampling.
        warnings.simplefilter("ignore")
        engine = PrivacyEngine(accountant="rdp")
        private, optimiser, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(images, labels), batch_size=len(images)),
            noise_multiplier=noise,
            max_grad_norm=clip,
            poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(0),
        )
        for x, y in loader:
            F.cross_entropy(private(x), y).backward()
            optimiser.step()
        epsilon = engine.get_epsilon(DELTA) if noise > 0.0 else math.inf
    stepped_with = [parameter.grad for parameter in model.parameters()]
    return gradleak.Bundle.from_gradients(before, stepped_with), epsilon


def attack(network: str, noise: float, clip: float) -> Attacked:
    """Recover label and picture from one private step, and compare them with the client's."""
    bundle, epsilon = private_step(network, noise, clip)
    images, labels = data_of(CLIENT)
    outcome = gradleak.recover_label(bundle, loss_scale="unknown")
    found = outcome.result
    if found.labels is None or len(found.labels) != 1:
        return Attacked(noise, epsilon, found.verdict, "none", False, math.nan, images.numel())
    k = int(found.labels[0].argmax())
    label = f"{CLASSES[k]} {float(found.labels[0, k]):.3f}, {found.verdict}"
    featured = gradleak.recover_feature(outcome.bundle).bundle
    # Where noise stops an MLP's features above the first layer, matching is what is left, soonest.
    reached = f"feature/{featured.model.layers[0].name}" in featured
    picture = gradleak.reconstruct(
        featured,
        model=initial(network),
        method="auto" if reached else "match",
        settings=MatchSettings(steps=150),
    )
    quality = float(psnr(picture.images.double(), images.double())[0])
    differing = int(pixels_that_differ(picture.images, images)[0])
    return Attacked(
        noise,
        epsilon,
        label,
        f"{quality:.1f} dB, {picture.verdict}, by {picture.method}",
        k == int(labels),
        quality,
        differing,
    )


def last(rows: Sequence[Attacked], holds: Callable[[Attacked], bool]) -> str:
    """Say up to which noise something holds without a gap."""
    held = []
    for row in rows:
        if not holds(row):
            break
        held.append(row.noise)
    return f"up to noise {held[-1]:g}" if held else "at no noise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--clip", type=float, default=1.0, help="the norm that Opacus clips to")
    parser.add_argument("--noise", type=float, nargs="+", default=NOISES, help="multipliers")
    given = parser.parse_args()
    logging.getLogger("opacus").setLevel(logging.ERROR)
    print(f"{'noise':>6}  {'ε':>8}  {'label':24}  picture")
    rows = []
    for noise in sorted(given.noise):
        rows.append(row := attack(given.network, noise, given.clip))
        print(f"{row.noise:6g}  {row.epsilon:8.2g}  {row.label:24}  {row.picture}", flush=True)
    print(f"the class is right {last(rows, lambda row: row.class_right)}")
    print(f"no 8-bit value of the picture differs {last(rows, lambda row: row.differing == 0)}")
    clear = last(rows, lambda row: row.psnr >= RECOGNISABLE)
    print(f"the picture is above {RECOGNISABLE:g} dB {clear}")


if __name__ == "__main__":
    main()
