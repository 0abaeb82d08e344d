"""The photographs of the image benchmarks: ten that everybody knows, five kept back.

Nothing in tests, examples or other benchmarks names one of ``HELD_OUT`` (a test looks), no network
is trained on it, and no attack was tuned on it: it is what first shows whether a method holds.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from common import photograph
from PIL import Image
from torch import Tensor

from gradleak.images import load_image

KNOWN = (
    "chelsea",
    "astronaut",
    "coffee",
    "rocket",
    "china",
    "flower",
    "retina",
    "ihc",
    "hubble_deep_field",
    "motorcycle_left",
)
# Package, file in it: a portrait, another, a stairway, fields from the air, a printed page.
_KEPT_BACK = {
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "luispedro": ("mahotas", "demos/data/luispedro.jpg"),
    "ascent": ("pywt", "data/ascent.npz"),
    "aero": ("pywt", "data/aero.npz"),
    "page": ("skimage", "data/page.png"),
}
HELD_OUT = tuple(_KEPT_BACK)


def targets(count: int | None = None) -> list[str]:
    """Return the names of the photographs, all or the first ``count``.

    Known ones and held-out ones take turns, so that every number of them has some of both.
    """
    pairs = [pair for pair in zip(KNOWN, HELD_OUT, strict=False)]
    mixed = [name for pair in pairs for name in pair] + list(KNOWN[len(HELD_OUT) :])
    return mixed[:count]


def is_held_out(name: str) -> bool:
    """Say whether the photograph was kept back while the attacks were built."""
    return name in _KEPT_BACK


def picture(name: str, size: int) -> Tensor:
    """Return the middle of the photograph as 8-bit values (3, size, size) in [0, 1]."""
    if name not in _KEPT_BACK:
        return load_image(photograph(name), size).pixels
    path = _file(*_KEPT_BACK[name])
    if path.suffix != ".npz":
        return load_image(path, size).pixels
    with tempfile.TemporaryDirectory() as folder:  # an array is made a file, to be read like one
        png = Path(folder) / f"{name}.png"
        Image.fromarray(_grey(path)).save(png)
        return load_image(png, size).pixels


def known_files() -> list[Path]:
    """Return the files of the known photographs: the classes of the photograph task."""
    return [photograph(name) for name in KNOWN]


def batch_of_crops(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Cut (count, 3, size, size): quadrant-like squares of the known photographs.

    A square has half to all of the side of its photograph; values are 8-bit in [0, 1].
    """
    squares = []
    for _ in range(count):
        name = KNOWN[_draw(len(KNOWN), generator)]
        whole = picture(name, 2 * size)
        side = size + _draw(size + 1, generator)
        top, left = (_draw(2 * size - side + 1, generator) for _ in range(2))
        square = whole[None, :, top : top + side, left : left + side]
        small = torch.nn.functional.interpolate(
            square, size=(size, size), mode="bilinear", antialias=True
        )
        squares.append((small[0].clamp(0, 1) * 255).round() / 255)
    return torch.stack(squares)


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _grey(path: Path):  # type: ignore[no-untyped-def]
    import numpy as np

    with np.load(path) as arrays:
        return arrays["data"].astype(np.uint8)


def _file(package: str, inside: str) -> Path:
    found = find_spec(package)
    assert found is not None, f"install {package}"
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / inside
