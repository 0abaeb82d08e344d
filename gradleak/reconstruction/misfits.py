"""What an image's own gradient misses of the given one, tensor by tensor, for a last descent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.reconstruction.objectives import require_matching_tensors, soft_cross_entropy

# Roundings that a sum which should be zero may come to, beside its layer's largest gradient.
_ROUNDINGS = 64.0


def gradient_misfits(
    model: nn.Module, gradients: Mapping[str, Tensor], labels: Tensor
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return the function from network input (N, C, H, W) float64 to (g(x) − g) / ‖g‖.

    One tensor a parameter, each relative to its own norm; ``labels`` (N, classes) stay fixed.
    Gradients that are zero but for rounding are left out: of a bias under BatchNorm with batch
    statistics, of which nothing is left to miss. Raises ``InputError`` for gradients that are not
    the network's.
    """
    require_matching_tensors(model, gradients)
    network = copy.deepcopy(model).double().eval()
    norms = {name: float(g.double().norm()) for name, g in gradients.items()}
    given = {n: g.double() for n, g in gradients.items() if norms[n] > _rounding(n, g, norms)}
    sizes = {name: norms[name] for name in given}
    whole = dict(network.named_parameters(remove_duplicate=False))
    state = {name: parameter.detach() for name, parameter in whole.items()}

    def misfits(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = {name: state[name].clone().requires_grad_() for name in given}
            logits = functional_call(network, {**state, **own}, (inputs,))
            loss = soft_cross_entropy(logits, labels.to(inputs))
            found = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        pairs = zip(found, given.items(), strict=True)
        return tuple((own_gradient - g) / sizes[name] for own_gradient, (name, g) in pairs)

    return misfits


def _rounding(name: str, gradient: Tensor, norms: Mapping[str, float]) -> float:
    """Return what rounding alone makes of a parameter's gradient, by those of its module."""
    module = name.rpartition(".")[0]
    largest = max(norm for other, norm in norms.items() if other.rpartition(".")[0] == module)
    return _ROUNDINGS * torch.finfo(gradient.dtype).eps * largest
