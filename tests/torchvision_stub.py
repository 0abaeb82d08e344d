"""Imports torchvision where its compiled operators are missing: classifiers need none of them."""

import functools
import importlib
from types import ModuleType

import torch

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def _schemas() -> torch.library.Library:
    # Torchvision registers meta kernels for operators that a build without them does not define.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"nms{NMS}")
    library.define(f"qnms{NMS}")
    return library


def import_torchvision() -> ModuleType:
    """Import torchvision, with the schemas of its missing operators defined first if need be."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        _schemas()
        return importlib.import_module("torchvision")
