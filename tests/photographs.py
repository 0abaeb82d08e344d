"""Real photographs from installed packages, and squares cut from them."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.images import load_image

_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_NAMES = {
    "skimage": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}


def photographs() -> list[Path]:
    """Return the files of the photographs, always in the same order; none is drawn or generated."""
    return [_folder(package) / name for package, names in _NAMES.items() for name in names]


def photograph(name: str) -> Path:
    """Return the photograph called ``name``, without its suffix."""
    return next(path for path in photographs() if path.stem == name)


def crops(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Cut (count, 3, size, size) in [0, 1]: random squares of random photographs, resized.

    A square has at least half the shorter side of its photograph, so it shows something.
    """
    return labelled_crops(size, count, generator)[0]


def labelled_crops(
    size: int, count: int, generator: torch.Generator, files: Sequence[Path] | None = None
) -> tuple[Tensor, Tensor]:
    """Cut ``crops`` and say of which photograph each is: (count,) places in ``files``.

    They are all of ``photographs()`` unless given.
    """
    files = files or photographs()
    chosen, squares = [], []
    for _ in range(count):
        chosen.append(_draw(len(files), generator))
        squares.append(_crop(files[chosen[-1]], size, generator))
    return torch.stack(squares), torch.tensor(chosen)


def centre(name: str, size: int) -> Tensor:
    """Return the middle of the photograph ``name`` as (1, 3, size, size) in [0, 1]."""
    return load_image(photograph(name), size).pixels[None]


def _crop(path: Path, size: int, generator: torch.Generator) -> Tensor:
    pixels = _pixels(path)
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    side = shorter // 2 + _draw(shorter - shorter // 2, generator)
    top = _draw(height - side + 1, generator)
    left = _draw(width - side + 1, generator)
    square = pixels[None, :, top : top + side, left : left + side]
    small = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return small[0].clamp(0, 1)


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


@lru_cache(maxsize=32)
def _pixels(path: Path) -> Tensor:
    return load_image(path, None).pixels


@lru_cache(maxsize=2)
def _folder(package: str) -> Path:
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / _FOLDERS[package]
