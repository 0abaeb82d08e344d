"""Train the networks of the image benchmarks, a few minutes each on one core, and keep them.

The tasks are scikit-learn's digits, enlarged to 32×32, and crops of photographs: ten photographs
are ten classes (``image_photographs.KNOWN``; a held-out photograph is never trained on), a sample
is a random square of half to all of the shorter side at 32×32. Training is seeded. Weights go to
``$XDG_CACHE_HOME/gradleak-benchmarks`` (``~/.cache`` unless set), with the accuracy on held-out
images beside them; a network that is there already is not trained again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from common import labelled_crops
from heads.tasks import Task, digits
from heads.training import Recipe, inputs_of, train
from image_photographs import KNOWN, known_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gradleak.models.build import build_model

CROPS, HELD_OUT_CROPS = 1500, 400
# Asked of a network on held-out images, by task.
ASKED = {"digits": 0.97, "photographs": 0.90}
_SIZE, _CHUNK = 32, 50


RECIPES = {
    "lenet-digits": Recipe("lenet", "digits", "hard", epochs=60, batch=32, rate=3e-3),
    "resnet18-photographs": Recipe(
        "resnet18", "photographs", "hard", epochs=8, batch=25, rate=1e-3
    ),
    "resnet18-cifar-digits": Recipe(
        "resnet18-cifar", "digits", "hard", epochs=3, batch=16, rate=1e-3
    ),
    "resnet18-cifar-photographs": Recipe(
        "resnet18-cifar", "photographs", "hard", epochs=3, batch=16, rate=1e-3
    ),
}


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, and the share of the held-out images of its task it names right."""

    model: nn.Module
    classes: int
    accuracy: float
    task: str


@lru_cache(maxsize=8)
def trained(name: str) -> Trained:
    """Return the network of ``RECIPES[name]``, trained now unless that was done before."""
    recipe = RECIPES[name]
    classes = _classes(recipe.task)
    model = build_model(recipe.network, classes=classes, size=_SIZE, seed=recipe.seed)
    file = weights_file(name)
    if not file.exists():
        task = task_of(recipe.task)
        train(model, recipe, task)
        accuracy = _accuracy(model, recipe, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, file, {"accuracy": repr(accuracy)})
    with safe_open(file, "pt") as opened:
        accuracy = float(opened.metadata()["accuracy"])
    model.load_state_dict(load_file(file))
    return Trained(model.eval(), classes, accuracy, recipe.task)


def weights_file(name: str) -> Path:
    """Return where the weights of ``RECIPES[name]`` are kept, by the settings that made them."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gradleak-benchmarks" / f"{name}-{RECIPES[name].file().name}"


@lru_cache(maxsize=2)
def task_of(name: str) -> Task:
    """Return the images of a task, to train on and held out."""
    if name == "digits":
        return digits(_SIZE)
    files = known_files()
    dice = torch.Generator().manual_seed(11)
    images, labels = labelled_crops(_SIZE, CROPS, dice, files)
    held, held_labels = labelled_crops(_SIZE, HELD_OUT_CROPS, dice, files)
    return Task("photographs", len(files), images, labels, held, held_labels)


def _classes(task: str) -> int:
    return 10 if task == "digits" else len(KNOWN)


def _accuracy(model: nn.Module, recipe: Recipe, task: Task) -> float:
    with torch.no_grad():
        parts = [
            model.eval()(inputs_of(recipe.network, images)).argmax(1)
            for images in torch.split(task.held_images, _CHUNK)
        ]
    return float((torch.cat(parts) == task.held_labels).double().mean())


def main() -> None:
    """Train what is not there and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)} (default: all)")
    for name in parser.parse_args().names or RECIPES:
        start = time.perf_counter()
        made = trained(name)
        print(
            f"{name}: {made.accuracy:.1%} of held-out {made.task} (asked: "
            f"{ASKED[made.task]:.0%}), {time.perf_counter() - start:.0f} s, {weights_file(name)}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
