"""Reading and writing safetensors files piece by piece, without holding a large one in memory.

Reading is the safetensors library's (memory-mapped, validated); writing is here, because a stage
that adds one small tensor to a large bundle copies the rest byte by byte, also into a pipe, where
the library wants every tensor in memory. Nothing here imports torch until a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from gradleak.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes per element of the safetensors dtypes.
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor: safetensors ``dtype``, ``shape``, and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class TensorFile:
    """A safetensors file opened for reading: ``infos`` by name, and ``metadata``.

    Raises :class:`InputError` for a file that is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path | str, *, name: str | None = None) -> None:
        """Open ``path``, called ``name`` in errors."""
        self.name = name or str(path)
        self._handle: Any = None
        self._file = self._open(Path(path))
        self._close = weakref.finalize(self, self._file.close)
        # Another name of the open file, which stays right when the path is replaced or removed.
        self._link = f"/dev/fd/{self._file.fileno()}"
        self._validate()
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        unknown = sorted({entry["dtype"] for entry in header.values()} - ITEM_SIZE.keys())
        if unknown:
            raise InputError(
                f"{self.name} holds tensors of dtype {', '.join(unknown)}",
                "convert them to a floating-point type of 16 to 64 bits",
            )
        self.infos = {
            name: TensorInfo(
                entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }

    @classmethod
    def from_stream(cls, stream: BinaryIO, name: str = "standard input") -> TensorFile:
        """Spool ``stream`` to a temporary file without a name, and open it."""
        with tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(stream, spool, _CHUNK)
            spool.flush()
            return cls(f"/dev/fd/{spool.fileno()}", name=name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; the file is memory-mapped, so only the pages it needs are touched."""
        if self._handle is None:
            from safetensors import safe_open

            self._handle = safe_open(self._link, framework="pt")
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def copy_to(self, name: str, out: IO[bytes]) -> None:
        """Copy the raw bytes of one tensor to ``out``."""
        info = self.infos[name]
        self._file.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            if not chunk:
                raise InputError(f"{self.name} was cut short while it was read", "try again")
            out.write(chunk)
            left -= len(chunk)

    def _open(self, path: Path) -> BinaryIO:
        try:
            if path.is_dir():
                raise InputError(f"{self.name} is a folder", "give a safetensors file")
            return path.open("rb")
        except FileNotFoundError as error:
            raise InputError(f"{self.name} does not exist", "check the path") from error
        except OSError as error:
            raise InputError(
                f"{self.name} cannot be read ({error.strerror or error})",
                "check its name and permissions",
            ) from error

    def _validate(self) -> None:
        from safetensors import SafetensorError, safe_open

        if not os.fstat(self._file.fileno()).st_size:
            raise InputError(f"{self.name} is empty", "give a safetensors file")
        try:
            safe_open(self._link, framework="np")
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
            raise InputError(
                f"{self.name} is not a complete safetensors file ({reason})",
                "write it again, or import it from its own format",
            ) from error


def tensor_info(tensor: Tensor) -> TensorInfo:
    """Return the header entry of an in-memory tensor."""
    import torch

    names = {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
        torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float32: "F32", torch.float64: "F64",
    }  # fmt: skip
    if tensor.dtype not in names:
        raise InputError(f"a bundle cannot hold tensors of {tensor.dtype}", "convert it first")
    return TensorInfo(names[tensor.dtype], tuple(tensor.shape))


def write_tensors(
    out: IO[bytes],
    tensors: Mapping[str, Tensor | TensorFile],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file to ``out``, which need not be seekable.

    A value that is a :class:`TensorFile` stands for its tensor of that name and is copied raw.
    """
    infos = {
        name: value.infos[name] if isinstance(value, TensorFile) else tensor_info(value)
        for name, value in tensors.items()
    }
    # Widest elements first keeps every tensor aligned, as the format asks.
    order = sorted(infos, key=lambda name: (-ITEM_SIZE[infos[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        info = infos[name]
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        value = tensors[name]
        if isinstance(value, TensorFile):
            value.copy_to(name, out)
        elif value.numel():
            out.write(_bytes_of(value))


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)
