"""gradleak shows what a saved gradient gives away: the label, the features and the image.

The stages of the command line as functions, each taking a :class:`Bundle` and returning it with
what it found (``outcome.bundle``)::

    captured = gradleak.capture(model, images, labels)
    labelled = gradleak.recover_label(captured.bundle)
    features = gradleak.recover_feature(labelled.bundle)
    pictures = gradleak.reconstruct(features.bundle)

``count_leak`` says beforehand how much of an image a network's gradient gives away;
``watch`` keeps a training loop's newest step, ``Bundle.from_gradients`` and ``Bundle.from_update``
make a bundle of gradients or of the weights before and after, ``import_gradients`` one of another
program's files. ``recover_labels`` takes many bundles at once. Names are imported when first used:
importing gradleak does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradleak.bundle import Bundle
    from gradleak.errors import GradleakError, IncompleteError, InputError, UsageError
    from gradleak.models.spec import ModelSpec
    from gradleak.stages.capture import capture
    from gradleak.stages.counting import count_leak
    from gradleak.stages.defend import defend
    from gradleak.stages.feature import recover_feature
    from gradleak.stages.importing import import_gradients
    from gradleak.stages.label import recover_label, recover_labels
    from gradleak.stages.reconstruct import reconstruct
    from gradleak.watching import watch

__all__ = [
    "Bundle",
    "GradleakError",
    "IncompleteError",
    "InputError",
    "ModelSpec",
    "UsageError",
    "__version__",
    "capture",
    "count_leak",
    "defend",
    "import_gradients",
    "reconstruct",
    "recover_feature",
    "recover_label",
    "recover_labels",
    "watch",
]

_HOMES = {
    "Bundle": "gradleak.bundle",
    "capture": "gradleak.stages.capture",
    "count_leak": "gradleak.stages.counting",
    "defend": "gradleak.stages.defend",
    "GradleakError": "gradleak.errors",
    "IncompleteError": "gradleak.errors",
    "InputError": "gradleak.errors",
    "UsageError": "gradleak.errors",
    "ModelSpec": "gradleak.models.spec",
    "import_gradients": "gradleak.stages.importing",
    "recover_feature": "gradleak.stages.feature",
    "recover_label": "gradleak.stages.label",
    "recover_labels": "gradleak.stages.label",
    "reconstruct": "gradleak.stages.reconstruct",
    "watch": "gradleak.watching",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gradleak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
