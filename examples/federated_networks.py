"""The networks of the federated examples, and what each of their clients holds.

On the command line they are ``--model federated_networks:mlp`` and ``federated_networks:cnn``, with
this file in the current folder.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gradleak.images import load_image

SIZE = 32
CLASSES = ("astronaut", "brick", "coffee", "cat", "flower", "grass", "moon", "rocket", "temple")
# A client's photographs: package, file in it, class.
_CLIENTS = (
    (("", "cat.png", "cat"), ("skimage", "data/coffee.png", "coffee")),
    (("skimage", "data/astronaut.png", "astronaut"), ("skimage", "data/moon.png", "moon")),
    (("skimage", "data/rocket.jpg", "rocket"), ("sklearn", "datasets/images/flower.jpg", "flower")),
)
CLIENTS = len(_CLIENTS)


def mlp(classes: int = len(CLASSES), size: int = SIZE) -> nn.Module:
    """Three Linear layers with ReLUs: pictures (N, 3, size, size) in [0, 1] to logits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * size * size, 256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def cnn(classes: int = len(CLASSES), width: int = 24) -> nn.Module:
    """Two strided convolutions and a Linear layer, for pictures (N, 3, 32, 32) in [0, 1]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, stride=2, padding=2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(2 * width * (SIZE // 4) ** 2, classes),
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}


def initial(network: str, seed: int = 0) -> nn.Module:
    """Return the network as the server draws it, the caller's random state untouched."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return NETWORKS[network]()


def data_of(client: int, photographs: int = 1) -> tuple[Tensor, Tensor]:
    """Return a client's first ``photographs`` (N, 3, 32, 32) in [0, 1] and their labels (N,)."""
    held = _CLIENTS[client][:photographs]
    images = torch.stack([load_image(_file(*place), SIZE).pixels for *place, _ in held])
    return images, torch.tensor([CLASSES.index(kind) for *_, kind in held])


def _file(package: str, name: str) -> Path:
    """Find a file of an installed package without importing it, or one beside this one."""
    if not package:
        return Path(__file__).parent / name
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; pip install 'gradleak[examples]'")
    return Path(found.submodule_search_locations[0]) / name
