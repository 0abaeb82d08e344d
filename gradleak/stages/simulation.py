"""A gradient to try an attack on: of synthetic pictures, where nobody has shared one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.calculus.trace import trace
from gradleak.errors import IncompleteError
from gradleak.models.spec import ModelSpec
from gradleak.normalisation import denormalise, normalise
from gradleak.stages.network import input_shape, normalisation_of

# The pictures: grids from so many blots a side, the coarsest of this spread around this grey.
_COARSEST, _GREY, _SPREAD = 2, 0.5, 0.25
# An image with all pixels nearer than half a level is the same in 8 bits.
_HALF_LEVEL = 0.5 / 255.0


class Simulated:
    """Smooth pictures with drawn labels, and their way through a network in float64.

    ``labels`` (N, classes) are hard, of as many different classes as there are; ``trace`` and
    ``state`` are those of the network.
    """

    def __init__(
        self, network: nn.Module, spec: ModelSpec, samples: int, device: torch.device, seed: int
    ) -> None:
        """Draw ``samples`` pictures from ``seed`` and run the ``network`` on them."""
        dice = torch.Generator().manual_seed(seed)
        shape = input_shape(spec)
        self._normalisation = normalisation_of(spec)
        self._pictures = smooth_pictures(samples, shape, dice).to(device)
        inputs = normalise(self._pictures, *self._normalisation)
        self._network = copy.deepcopy(network).double().to(device).eval()
        self.trace = trace(self._network, inputs)
        self.state = self._network.state_dict()
        with torch.enable_grad():
            self._logits: Tensor = self._network(inputs)
        classes = self._logits.shape[1]
        order = torch.randperm(classes, generator=dice).to(device)
        drawn = order[torch.arange(samples, device=device) % classes]
        self.labels = F.one_hot(drawn, classes).double()
        self._inputs = inputs

    @property
    def feature(self) -> Tensor:
        """The head's input (N, D)."""
        head = self.trace.producer(self.trace.logits)
        if head is None:
            raise IncompleteError("the network computes nothing", "give a classifier")
        values = {0: self._inputs}
        with torch.no_grad():
            for operation in self.trace.operations:
                if operation is head:
                    break
                given = [values[number] for number in operation.inputs]
                values[operation.output] = operation.run(given, self.state)
        return values[head.inputs[0]]

    def gradients(self, dtype: torch.dtype, shared: Collection[str]) -> Mapping[str, Tensor]:
        """Return the gradient rounded to ``dtype``, of the ``shared`` parameters alone (or all)."""
        named = {n: p for n, p in self._network.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            loss = F.cross_entropy(self._logits, self.labels)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            name: gradient.to(dtype)
            for name, gradient in zip(named, found, strict=True)
            if gradient is not None and (not shared or name in shared)
        }

    def recovers(self, inputs: Tensor) -> bool:
        """Return whether network inputs (N, C, H, W) are the pictures, in 8 bits."""
        off = denormalise(inputs, *self._normalisation) - self._pictures
        return float(off.abs().max()) < _HALF_LEVEL


def smooth_pictures(
    samples: int, shape: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Draw pictures (N, C, H, W) in [0, 1], float64, whose details are the fainter the finer."""
    channels, height, width = shape
    pictures = torch.full((samples, *shape), _GREY, dtype=torch.float64)
    grid, spread = _COARSEST, _SPREAD
    while grid <= min(height, width):
        size = (samples, channels, grid, grid)
        blots = spread * torch.randn(size, generator=generator, dtype=torch.float64)
        pictures += F.interpolate(blots, (height, width), mode="bicubic", align_corners=False)
        grid, spread = 2 * grid, spread / 2
    return pictures.clamp(0.0, 1.0)
