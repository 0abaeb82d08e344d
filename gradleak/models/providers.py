"""Networks of installed libraries: ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME``.

Nothing is downloaded: weights are random until a file of them is loaded. A name reaches no further
than the library's own table of networks, so that a bundle's word for it may be taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gradleak.errors import UsageError
from gradleak.models.registry import IMAGENET_MEAN, IMAGENET_STD

_IMAGENET_SIZE = 224


@dataclass(frozen=True)
class Expected:
    """What a library's network was made for: ``size`` in pixels, and the images' normalisation."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_provided(name: str) -> bool:
    """Return whether ``name`` is of one of these libraries."""
    return name.partition(":")[0] in _PROVIDERS


def build_provided(name: str, classes: int | None, arguments: Mapping[str, object]) -> nn.Module:
    """Build ``library:network`` with random weights, for ``classes`` if given.

    ``arguments`` go to the library's own builder. Raises ``UsageError`` where the library is not
    installed or does not know the network.
    """
    library, _, network = name.partition(":")
    try:
        module = importlib.import_module(library)
    except Exception as error:  # also an installed one that does not fit the installed torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{library} cannot be imported ({reason})", f"install it: pip install {library}"
        ) from error
    return _PROVIDERS[library](module, network, classes, arguments)


def expected_of(model: nn.Module) -> Expected | None:
    """Return what a network of one of these libraries says it takes, None if it says nothing."""
    recorded = getattr(model, "default_cfg", None)
    if isinstance(recorded, Mapping) and "input_size" in recorded:  # timm
        return Expected(
            int(recorded["input_size"][-1]), tuple(recorded["mean"]), tuple(recorded["std"])
        )
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):  # transformers, whose image processors mostly take 0.5 and 0.5
        return Expected(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    if type(model).__module__.startswith(("torchvision.", "transformers.")):
        size = getattr(model, "image_size", _IMAGENET_SIZE)
        assert isinstance(size, int)
        return Expected(size, IMAGENET_MEAN, IMAGENET_STD)
    return None


def _torchvision(
    library: ModuleType, name: str, classes: int | None, arguments: Mapping[str, object]
) -> nn.Module:
    known = library.models.list_models(module=library.models)
    if name not in known:
        raise UsageError(
            f"torchvision has no classifier {name!r}", f"use one of {_near(name, known)}"
        )
    asked = {} if classes is None else {"num_classes": classes}
    made: nn.Module = library.models.get_model(name, weights=None, **asked, **arguments)
    return made


def _timm(
    library: ModuleType, name: str, classes: int | None, arguments: Mapping[str, object]
) -> nn.Module:
    if not library.is_model(name):
        raise UsageError(
            f"timm has no network {name!r}", f"use one of {_near(name, library.list_models())}"
        )
    asked = {} if classes is None else {"num_classes": classes}
    made: nn.Module = library.create_model(name, pretrained=False, **asked, **arguments)
    return made


def _transformers(
    library: ModuleType, name: str, classes: int | None, arguments: Mapping[str, object]
) -> nn.Module:
    asked = {} if classes is None else {"num_labels": classes}
    folder = Path(name)
    if (folder / "config.json").is_file():
        config = library.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, **asked, **arguments
        )
        auto: nn.Module = library.AutoModelForImageClassification.from_config(config)
        return auto
    known = [n for n in dir(library) if n.endswith("ForImageClassification")]
    known.remove("AutoModelForImageClassification")
    if name not in known:
        raise UsageError(
            f"transformers has no image classifier {name!r}",
            f"name a folder with config.json, or one of {_near(name, known)}",
        )
    kind: Any = getattr(library, name)
    made: nn.Module = kind(kind.config_class(**asked, **arguments))
    return made


def _near(name: str, known: list[str]) -> str:
    import difflib

    return ", ".join(difflib.get_close_matches(name, known, 5, 0.0))


_PROVIDERS: dict[str, Callable[[ModuleType, str, int | None, Mapping[str, object]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
