"""The equations M x = t of one layer's input, weighted, from its gradient and output (§6b).

A batch of inputs is (K, N, C, places). The gradient's part of MᵀM is one matrix over samples and
places, the same for all channels; the output's part is sparse, and couples the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.calculus.layer import pulled_back
from gradleak.calculus.solve import LayerEquations
from gradleak.calculus.window import Window

# Unknowns of one sample pushed through a layer at a time.
_CHUNK = 512


@dataclass(frozen=True)
class Taps:
    """The ``weight`` (O, C, T) with which a layer's outputs read the windows of its input."""

    window: Window
    weight: Tensor


@dataclass(frozen=True)
class ForwardEquations:
    """A layer's ``output`` (N, …), where ``known``, with errors ``std``; ``apply`` is the layer.

    ``taps`` say which inputs an output reads, where that is known.
    """

    apply: Callable[[Tensor], Tensor]
    output: Tensor
    std: Tensor
    known: Tensor
    taps: Taps | None = None

    def count(self) -> int:
        """Return how many equations these are."""
        return int(self.known.sum())


class Equations:
    """All the equations of an input of ``shape`` (N, C, …)."""

    def __init__(
        self,
        gradient: Sequence[LayerEquations],
        forward: Sequence[ForwardEquations],
        shape: tuple[int, ...],
        precision: float,
    ) -> None:
        """Weight the equations by their errors; ``precision`` is the gradients' relative one."""
        self.samples, self.channels, self.places = *shape[:2], math.prod(shape[2:])
        self.outputs = [_Output(part, shape, precision) for part in forward]
        rows, targets = [], []
        for part in gradient:
            size = float(part.gradient.square().mean().sqrt())
            weight = 1.0 / max(precision * size, 1e-300)
            rows.append(weight * part.matrix())
            targets.append(weight * part.target())
        like = forward[0].output
        width = self.samples * self.places
        self._matrix = torch.cat(rows) if rows else like.new_zeros(0, width)
        self._target = torch.cat(targets) if rows else like.new_zeros(0, self.channels)
        self.gram = self._matrix.mT @ self._matrix  # (N·places, N·places)
        self.count = self._target.numel() + sum(part.count for part in self.outputs)
        self.size = math.sqrt(self.left(self.zeros()))

    @property
    def gradient_suffices(self) -> bool:
        """Whether the gradient has as many equations as there are unknowns, by their number."""
        taps_known = all(part.taps_known for part in self.outputs)
        return taps_known and len(self._target) >= self.samples * self.places

    @property
    def unknowns(self) -> int:
        """How many entries the input has."""
        return self.samples * self.channels * self.places

    def zeros(self) -> Tensor:
        """Return the input zero (1, N, C, places)."""
        return self.gram.new_zeros(1, self.samples, self.channels, self.places)

    def by_channel(self, x: Tensor) -> Tensor:
        """Return a batch as (K, C, N·places), in which the gradient's equations part."""
        return x.transpose(1, 2).reshape(len(x), self.channels, -1)

    def by_sample(self, x: Tensor) -> Tensor:
        """Undo :meth:`by_channel`."""
        return x.view(len(x), self.channels, self.samples, -1).transpose(1, 2)

    def left(self, x: Tensor) -> float:
        """Return ‖t − M x‖² for one input (1, N, C, places)."""
        rest = self._target - self._matrix @ self.by_channel(x)[0].mT
        outputs = sum(float(part.rest(x).square().sum()) for part in self.outputs)
        return float(rest.square().sum()) + outputs

    def pull(self, x: Tensor) -> Tensor:
        """Return Mᵀ(t − M x) for one input (1, N, C, places)."""
        rest = self._target - self._matrix @ self.by_channel(x)[0].mT
        found = self.by_sample((self._matrix.mT @ rest).mT[None])
        for part in self.outputs:
            found = found + part.back(part.rest(x))
        return found

    def normal(self, x: Tensor) -> Tensor:
        """Return MᵀM x for a batch."""
        return self.by_sample(self.by_channel(x) @ self.gram) + self.of_outputs(x)

    def of_outputs(self, x: Tensor) -> Tensor:
        """Return the outputs' part of MᵀM x for a batch."""
        found = torch.zeros_like(x)
        for part in self.outputs:
            found = found + part.back(part.forward(x))
        return found

    def noise(self, number: int, dice: torch.Generator) -> Tensor:
        """Return a batch of ``number`` draws Mᵀe, the entries of e standard normal."""
        shape = (number, self.channels, len(self._matrix))
        found = self.by_sample(_normal(shape, dice, self.gram) @ self._matrix)
        for part in self.outputs:
            found = found + part.back(_normal((number, *part.shape), dice, self.gram))
        return found

    def matrix(self) -> Tensor:
        """Return MᵀM (n, n), its rows as the entries of x (N, C, places)."""
        n, c, p = self.samples, self.channels, self.places
        whole = self.gram.new_zeros(n, c, p, n, c, p)
        for part in self.outputs:
            part.add_normal(whole)
        blocks = self.gram.view(n, p, n, p)
        for channel in range(c):
            whole[:, channel, :, :, channel] += blocks
        return whole.view(self.unknowns, self.unknowns)

    def traces(self) -> tuple[Tensor, Tensor]:
        """Return the outputs' part of MᵀM as a mean over channels and a mean over places.

        The first is (N·places, N·places); the second (C, C), of trace C, so that their Kronecker
        product stands for the whole.
        """
        width = self.samples * self.places
        across = self.gram.new_zeros(self.samples, self.places, self.samples, self.places)
        along = self.gram.new_zeros(self.channels, self.channels)
        for part in self.outputs:
            part.add_traces(across, along)
        mean = float(along.trace()) / self.channels
        return across.view(width, width) / self.channels, along / max(mean, 1e-300)

    def diagonal(self) -> Tensor:
        """Return the diagonal of MᵀM (N, C, places)."""
        own = self.gram.diagonal().view(self.samples, 1, self.places)
        found = own.expand(-1, self.channels, -1).clone()
        for part in self.outputs:
            part.add_diagonal(found)
        return found


class _Output:
    """The equations of one known output, weighted; y is a batch of outputs (K, N, …)."""

    def __init__(self, given: ForwardEquations, shape: tuple[int, ...], precision: float) -> None:
        floor = precision * float(given.output[given.known].abs().amax())
        self._root = given.known / given.std.clamp(min=floor)
        self._given, self._input = given, shape
        self._offset = given.apply(given.output.new_zeros(1, *shape[1:]))
        self._target = self._root * (given.output - self._offset)
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self.taps_known = given.taps is not None
        self.count, self.shape = given.count(), tuple(given.output.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return M x."""
        output = self._given.apply(x.reshape(-1, *self._input[1:])) - self._offset
        return self._root * output.reshape(len(x), *self.shape)

    def rest(self, x: Tensor) -> Tensor:
        """Return t − M x."""
        return self._target - self.forward(x)

    def back(self, y: Tensor) -> Tensor:
        """Return Mᵀ y."""
        if len(y) not in self._graphs:  # of an affine layer one serves all
            with torch.enable_grad():
                start = y.new_zeros(len(y) * self._input[0], *self._input[1:]).requires_grad_()
                self._graphs[len(y)] = start, self._given.apply(start)
        start, output = self._graphs[len(y)]
        (found,) = pulled_back(output, [start], (self._root * y).reshape(output.shape))
        return found.reshape(len(y), *self._input[:2], -1)

    def add_normal(self, whole: Tensor) -> None:
        """Add MᵀM to ``whole`` (N, C, places, N, C, places)."""
        taps = self._given.taps
        if taps is None:
            self._push_identity(whole)
            return
        window, weight = taps.window, taps.weight
        channels, places = self._input[1], window.places
        for sample, square in enumerate(self._squares()):
            own = torch.zeros(
                channels * places, channels * places, dtype=whole.dtype, device=whole.device
            )
            start = places * torch.arange(channels, device=whole.device)[:, None]
            for reads, at in zip(window.index.mT.to(whole.device), square.mT, strict=True):
                inside = reads < places
                index = (start + reads[inside]).flatten()
                columns = weight[:, :, inside].flatten(1)
                own[index[:, None], index] += (columns * at[:, None]).mT @ columns
            whole[sample, :, :, sample] += own.view(channels, places, channels, places)

    def _push_identity(self, whole: Tensor) -> None:
        samples, channels = self._input[:2]
        eye = torch.eye(channels * whole.shape[2], dtype=whole.dtype, device=whole.device).view(
            -1, 1, channels, whole.shape[2]
        )
        for first in range(0, len(eye), _CHUNK):
            part = eye[first : first + _CHUNK].expand(-1, samples, -1, -1)
            rows = self.back(self.forward(part))  # (k, N, C, places)
            self._graphs.clear()
            for sample in range(samples):
                own = whole[sample, :, :, sample].flatten(0, 1)
                own[first : first + _CHUNK] += rows[:, sample]

    def add_traces(self, across: Tensor, along: Tensor) -> None:
        """Add the traces over channels and over places, (N, places, N, places) and (C, C)."""
        window, weight = self._taps()
        index, places = window.index.mT.to(across.device), window.places  # (P, T)
        inside = (index < places).to(across.dtype)
        pairs = (index[:, :, None] * (places + 1) + index[:, None]).flatten()
        square_of_weight = torch.einsum("oct,ocs->ots", weight, weight)
        for sample, square in enumerate(self._squares()):
            local = torch.einsum("op,ots->pts", square, square_of_weight).flatten()
            own = local.new_zeros((places + 1) ** 2).index_add_(0, pairs, local)
            across[sample, :, sample] += own.view(places + 1, places + 1)[:-1, :-1]
            along += torch.einsum("oct,ot,odt->cd", weight, square @ inside, weight)

    def add_diagonal(self, found: Tensor) -> None:
        """Add the diagonal of MᵀM to ``found`` (N, C, places)."""
        window, weight = self._taps()
        index = window.index.mT.to(found.device)
        for own, square in zip(found, self._squares(), strict=True):
            local = torch.einsum("oct,op->cpt", weight.square(), square).flatten(1)
            whole = own.new_zeros(len(own), window.places + 1)
            own += whole.index_add_(1, index.flatten(), local)[:, :-1]

    def _squares(self) -> Tensor:
        """Return the weights (N, O, places) of the equations; a Linear layer has one place."""
        return self._root.square().reshape(*self._root.shape[:2], -1)

    def _taps(self) -> tuple[Window, Tensor]:
        if self._given.taps is None:
            raise ValueError("which inputs the layer reads is not known")
        return self._given.taps.window, self._given.taps.weight


def _normal(shape: tuple[int, ...], dice: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=dice, dtype=like.dtype, device=like.device)
