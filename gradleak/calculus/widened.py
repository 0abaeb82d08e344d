"""Tensors of any precision, seen in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor


class Widened(Mapping[str, Tensor]):
    """Tensors by name, in float64 while somebody looks at them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Wrap ``tensors`` of any dtype."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.double() if tensor.is_floating_point() else tensor

    def __contains__(self, name: object) -> bool:
        """Say whether there is a tensor of that name, without widening it."""
        return name in self._tensors

    def unwidened(self, name: str) -> Tensor:
        """Return a tensor in its own precision."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
