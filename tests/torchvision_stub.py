"""Imports torchvision where its compiled operators are missing: classifiers need none of them."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# `make test` puts it here, beside the environment's packages: torchmetrics, for one, imports any
# torchvision that it finds, and fails with one that was built for another torch.
REFERENCE = Path(sys.prefix) / "reference"

# The same for a process of its own: a file on PYTHONPATH that Python runs when it starts.
SITECUSTOMIZE = """
import torch

library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
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
    if not (REFERENCE / "torchvision").is_dir():
        pytest.skip("torchvision, the reference compared with, is installed by make test")
    sys.path.append(str(REFERENCE))
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        _schemas()
        return importlib.import_module("torchvision")
    finally:
        sys.path.remove(str(REFERENCE))
