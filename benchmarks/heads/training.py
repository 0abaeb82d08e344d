"""Small networks trained to confidence on real images, with hard, smoothed and mixup targets.

Training is seeded and takes a minute or two on one core; the weights are kept in a folder that is
not under version control, by the settings that made them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.normalisation import normalise
from heads.tasks import Task, digits, photograph_crops

CACHE = ROOT / "build" / "heads"
TARGETS = ("hard", "smooth", "mixup")
SMOOTHING = 0.1


@dataclass(frozen=True)
class Recipe:
    """What a network is trained on and how; ``targets`` is one of ``TARGETS``."""

    network: str
    task: str
    targets: str
    epochs: int
    batch: int
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """The network and what its targets were."""
        titles = {
            "lenet": "LeNet",
            "resnet18": "ResNet-18",
            "resnet18-cifar": "ResNet-18, CIFAR stem",
        }
        return f"{titles[self.network]} on {self.task}, {self.targets} targets"

    def file(self) -> Path:
        """Return where the trained weights are kept."""
        key = hashlib.sha256(f"{asdict(self)} {torch.__version__}".encode()).hexdigest()[:12]
        return CACHE / f"{self.network}-{self.targets}-{key}.safetensors"


def recipes() -> list[Recipe]:
    """Return the recipes of the six trained networks."""
    lenets = [Recipe("lenet", "digits", t, epochs=80, batch=32, rate=3e-3) for t in TARGETS]
    epochs = {"hard": 12, "smooth": 7, "mixup": 7}
    resnets = [
        Recipe("resnet18", "photographs", t, epochs=epochs[t], batch=50, rate=1e-3) for t in TARGETS
    ]
    return [*lenets, *resnets]


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "photographs": photograph_crops}


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, its share right on held-out images, and how sure it is there.

    ``confidence`` is the median of the largest probability over the held-out images, ``seconds``
    the time of training, or of the run that left the weights behind.
    """

    recipe: Recipe
    model: nn.Module
    task: Task
    accuracy: float
    confidence: float


def inputs_of(network: str, images: Tensor) -> Tensor:
    """Normalise images (N, 3, H, W) in [0, 1] as the registry's network takes them."""
    entry = registry.entry(network)
    return normalise(images, entry.mean, entry.std)


def trained(recipe: Recipe, task: Task) -> Trained:
    """Train the network of a recipe, or load it if that was done before, and measure it."""
    model = build_model(
        recipe.network, classes=task.classes, size=task.images.shape[-1], seed=recipe.seed
    )
    file = recipe.file()
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        train(model, recipe, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    with torch.no_grad():
        p = torch.softmax(model.eval()(inputs_of(recipe.network, task.held_images)), 1)
    right = (p.argmax(1) == task.held_labels).double().mean()
    return Trained(recipe, model, task, float(right), float(p.amax(1).median()))


def train(model: nn.Module, recipe: Recipe, task: Task) -> None:
    """Train by Adam with a cosine schedule over mean cross-entropy; the order is the seed's."""
    dice = torch.Generator().manual_seed(recipe.seed)
    inputs = inputs_of(recipe.network, task.images)
    labels = F.one_hot(task.labels, task.classes).float()
    optimiser = torch.optim.Adam(model.parameters(), recipe.rate)
    steps = recipe.epochs * math.ceil(len(inputs) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(inputs), generator=dice).split(recipe.batch):
            x, y = inputs[rows], labels[rows]
            if recipe.targets == "smooth":
                y = (1.0 - SMOOTHING) * y + SMOOTHING / task.classes
            elif recipe.targets == "mixup":
                share = float(torch.rand((), generator=dice))
                other = torch.randperm(len(rows), generator=dice)
                x = share * x + (1.0 - share) * x[other]
                y = share * y + (1.0 - share) * y[other]
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            schedule.step()
    model.eval()


def main() -> None:
    """Train all six and print what became of them."""
    torch.set_num_threads(1)
    tasks = {name: make() for name, make in TASKS.items()}
    for recipe in recipes():
        start = time.perf_counter()
        made = trained(recipe, tasks[recipe.task])
        print(
            f"{recipe.name}: accuracy {made.accuracy:.3f}, median confidence "
            f"{made.confidence:.6f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
