"""From a name to a network."""

import importlib
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path

from torch import nn

from gradleak.errors import GradleakError, UsageError
from gradleak.models import registry
from gradleak.models.output import giving_logits
from gradleak.models.providers import build_provided, is_provided
from gradleak.models.trace import describe, seeded
from gradleak.models.weights import load_weights, one_line

__all__ = ["build_model", "describe", "is_own", "load_weights"]

DEFAULTS: dict[str, object] = {"init": "default", "head_bias": True, "bias": False}


def is_own(name: str) -> bool:
    """Return whether ``name`` is ``module:factory``: code of the user's, not of a known library."""
    return ":" in name and not is_provided(name)


def build_model(
    name: str,
    *,
    classes: int | None = None,
    size: int | None = None,
    options: Mapping[str, object] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a network in eval mode, its weights drawn from ``seed``.

    ``name`` is a registry name; ``torchvision:NAME``, ``timm:NAME`` or ``transformers:NAME`` for a
    network of those libraries; or ``module:factory`` with a module that can be imported from the
    search path or the current folder. The latter two are called with ``classes`` if given and with
    the ``options`` that differ from their defaults, and decide on ``size`` (pixels) themselves. A
    network that returns a record or a tuple is made to return its logits alone. The global random
    state is left as it was. Raises ``UsageError`` for an unknown name or option, for ``classes`` or
    a ``size`` the network cannot take, and for a factory that cannot be imported, fails, or returns
    something else than a network.
    """
    if classes is not None and classes < 2:
        raise UsageError(f"{classes} classes are too few for a classifier", "use 2 or more")
    if size is not None and size < 1:
        raise UsageError(f"images cannot have a size of {size} pixels", "use 1 or more")
    chosen = {k: v for k, v in (options or {}).items() if k not in DEFAULTS or v != DEFAULTS[k]}
    made: object
    if is_provided(name):
        with seeded(seed):
            made = _call(name, build_provided, name, classes, chosen)
    elif ":" in name:
        factory = _import_factory(name, from_here=True)
        asked: dict[str, object] = {} if classes is None else {"classes": classes}
        with seeded(seed):
            made = _call(name, factory, **(chosen | asked))
    else:
        entry = registry.entry(name)
        taken = _taken(entry, chosen)
        factory = _import_factory(entry.factory)
        with seeded(seed):
            made = _call(name, factory, classes or entry.classes, size or entry.size, **taken)
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name} returned {type(made).__name__}", "return a torch.nn.Module")
    return giving_logits(made).eval()


def _taken(entry: registry.ModelEntry, chosen: Mapping[str, object]) -> dict[str, object]:
    for option, value in chosen.items():
        if option in DEFAULTS and type(value) is not type(DEFAULTS[option]):
            raise UsageError(
                f"the model option {option} cannot be {value!r}",
                f"its default is {DEFAULTS[option]!r}",
            )
        takers = [n for n in registry.names() if option in registry.entry(n).options]
        if option not in entry.options and option != "head_bias":
            raise UsageError(
                f"{entry.name} takes no option {option!r}",
                f"it is one of {', '.join(takers)}" if takers else "leave it out",
            )
    return {k: v for k, v in chosen.items() if k in entry.options}


def _import_factory(name: str, *, from_here: bool = False) -> Callable[..., object]:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = from_here and here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        with seeded(0):  # what a module draws while it is imported must not shift the weights
            factory = attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:
        raise UsageError(
            f"cannot import {name!r} ({one_line(error)})",
            "give module:factory with a module on the search path or in the current folder",
        ) from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not callable(factory):
        raise UsageError(f"{name!r} is not callable", "name a function that returns the network")
    return factory  # type: ignore[no-any-return]


def _call(name: str, factory: Callable[..., object], /, *args: object, **kwargs: object) -> object:
    try:
        return factory(*args, **kwargs)
    except GradleakError:
        raise
    except Exception as error:
        given = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
        raise UsageError(
            f"{name} could not be built with ({given}): {one_line(error)}",
            "change the size, the options or the factory",
        ) from error
