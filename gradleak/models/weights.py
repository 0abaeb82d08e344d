"""Reading saved tensors and model weights, and loading them into a network.

No pickled code is run.
"""

import errno
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from gradleak.errors import InputError

T = TypeVar("T")


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a state dict from ``path`` (.pth, .pt or .safetensors) into ``model``, in place.

    A checkpoint that holds the weights under ``state_dict`` and the ``module.`` prefix of a
    network wrapped in DataParallel are understood; BatchNorm's step counters may be missing.
    No pickled code is run. Raises ``InputError`` when the file cannot be read or its parameters
    are not those of ``model``, naming the first few.
    """
    found = read_weights(path)
    wanted = model.state_dict()
    # Files older than PyTorch 0.4.1, public ones among them, know no step counters.
    missing = [k for k in wanted.keys() - found.keys() if not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} is {tuple(found[k].shape)} for {tuple(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    wrong = [
        f"{what} {_first_few(which)}"
        for what, which in (
            ("missing:", [k for k in wanted if k in missing]),
            ("unexpected:", [k for k in found if k not in wanted]),
            ("of another shape:", shapes),
        )
        if which
    ]
    if wrong:
        raise InputError(
            f"{path} does not fit the network ({'; '.join(wrong)})",
            "build the network that the weights belong to, with as many classes",
        )
    model.load_state_dict(found, strict=False)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read the parameters of a weights file (.pth, .pt, .safetensors or .npz) by name.

    Raises ``InputError`` when it cannot be read, holds pickled code, or is no state dict.
    """
    return _unwrapped(read_saved(path), path)


def read_saved(path: Path | str) -> object:
    """Read whatever holds tensors in ``path`` (.pth, .pt, .bin, .safetensors or .npz).

    NumPy's arrays come back as tensors. Raises ``InputError`` when the file cannot be read or
    needs pickled code to be run.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], object]] = {
        ".safetensors": safetensors.torch.load_file,
        ".pth": _read_torch,
        ".pt": _read_torch,
        ".bin": _read_torch,
        ".npz": _read_numpy,
    }
    if path.suffix not in readers:
        raise InputError(f"{path} is no weights file", f"give one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}", "check the name") from error
    except _PickledArrayError as error:
        raise InputError(
            f"{path} holds arrays of Python objects, which need pickled code to be read",
            "save arrays of numbers alone, with numpy.savez(path, *gradients)",
        ) from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged or holds pickled code, which is not run",
            "save tensors alone, with torch.save(model.state_dict(), path), "
            "torch.save([p.grad for p in model.parameters()], path) or as safetensors",
        ) from error
    except Exception as error:  # a file of anything makes the readers fail in any way
        reason = one_line(error)
        # torch reads what is no archive as its older format, and the end of a short one nowhere.
        if "zip archive" in reason or getattr(error, "errno", None) == errno.EINVAL:
            raise InputError(f"{path} is cut short or damaged", "copy it again") from error
        raise InputError(
            f"{path} cannot be read ({reason})", "give a complete file of tensors"
        ) from error


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict without the prefix of a network wrapped in DataParallel."""
    prefix = "module." if state and all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _read_torch(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


class _PickledArrayError(Exception):
    pass


def _read_numpy(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        try:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        except ValueError as error:
            if "allow_pickle" in str(error):
                raise _PickledArrayError from error
            raise


def _unwrapped(state: object, path: Path | str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"{path} holds no state dict",
            "save the weights alone, with torch.save(model.state_dict(), path) or as safetensors",
        )
    return plain_names(state)


def _first_few(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def one_line(error: BaseException) -> str:
    """Return an exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
