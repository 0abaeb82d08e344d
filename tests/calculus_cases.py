"""Networks on photographs, with what a walk through them starts from and what it should find."""

from __future__ import annotations

import torch
from photographs import crops
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.calculus.trace import trace
from gradleak.calculus.walk import Walk, walk_down
from gradleak.normalisation import normalise


class Case:
    """A network on photographs, its gradient, and every tensor of its forward pass."""

    def __init__(
        self, model: nn.Module, size: int, samples: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model.eval().to(dtype)
        dice = torch.Generator().manual_seed(samples)
        self.images = normalise(crops(size, samples, dice), (0.5,) * 3, (0.25,) * 3).to(dtype)
        seen: list[Tensor] = []
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        handle = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        logits = self.model(self.images)
        handle.remove()
        self.feature = seen[0].detach()
        classes = logits.shape[1]
        self.labels = F.one_hot(torch.arange(samples) % classes, classes).double()
        loss = F.cross_entropy(logits, self.labels.to(dtype))
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        self.gradients = dict(zip(named, found, strict=True))

    def walk(self) -> Walk:
        example = torch.zeros_like(self.images)
        return walk_down(self.model, example, self.gradients, self.labels, self.feature)

    def truth(self) -> dict[str, Tensor]:
        """Return what every layer with a weight read, by its name."""
        read: dict[str, Tensor] = {}
        steps = trace(self.model, self.images)
        state = {n: t.double() for n, t in self.model.state_dict().items()}
        values = {0: self.images.double()}
        for operation in steps.operations:
            inputs = [values[number] for number in operation.inputs]
            values[operation.output] = operation.run(inputs, state)
            read[operation.name] = inputs[0]
        return read

    def check(self, walk: Walk, tolerance: float) -> list[str]:
        """Compare every map with the truth, and return the names of their layers."""
        truth = self.truth()
        for found in walk.maps:
            true = truth[found.names[0]]
            off = float((found.estimate.value - true).norm() / true.norm())
            assert off < tolerance, f"{found.names}: {off:.1e}"
        return [name for found in walk.maps for name in found.names]
