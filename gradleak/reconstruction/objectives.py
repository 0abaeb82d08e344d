"""What gradient matching minimises, as a function of the image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InputError, UsageError
from gradleak.normalisation import normalise

# Added for leaving the box; too small to bend the valley, enough to bring a pixel back into it.
BOX_WEIGHT = 1e-3


def cosine_distance(found: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos of the angle between two gradients, all tensors joined; in [0, 2].

    Source: Inverting Gradients, arXiv 2003.14053, equation 4.
    """
    dot = torch.stack([(a * b).sum() for a, b in zip(found, given, strict=True)]).sum()
    sizes: Tensor = _norms(found).norm() * _norms(given).norm()
    return 1 - dot / sizes


def l2_distance(found: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """Return Σ_t ‖found_t − given_t‖² / ‖given_t‖ over Σ_t ‖given_t‖; 1 for a gradient of zero.

    Dividing each tensor's term by its norm stands midway between plain L2, which the head's
    large gradient rules, and equal weights, which follow the vanishing first layers too early.
    """
    norms = _norms(given)
    weights = norms.clamp_min(norms[norms > 0].min()).reciprocal()
    squares = torch.stack([(a - b).square().sum() for a, b in zip(found, given, strict=True)])
    return (weights * squares).sum() / norms.sum()


def total_variation(inputs: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, down plus across.

    ``inputs`` are (N, C, H, W); the anisotropic total variation over the number of pixels.
    """
    down = inputs[..., 1:, :] - inputs[..., :-1, :]
    across = inputs[..., 1:] - inputs[..., :-1]
    parts = [part.abs().mean() for part in (down, across) if part.numel()]
    return torch.stack(parts).sum() if parts else inputs.new_zeros(())


class MatchingObjective:
    """Gradient distance + tv × total variation + feature_weight × ‖f(x) − x*‖² / ‖x*‖².

    Holds a copy of the network in ``dtype``, so the caller's stays as it is. The last term is
    that of arXiv 2402.03124; f(x) is the input of the Linear layer ``head``. Raises
    ``InputError`` where gradients, labels or features do not fit the network or each other.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        distance: str,
        tv: float,
        feature_weight: float,
        head: str | None,
        features: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        require_matching_tensors(model, gradients)
        if not any(bool(gradient.any()) for gradient in gradients.values()):
            raise InputError("every gradient is zero", "there is nothing to match")
        device = next(iter(gradients.values())).device
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(device, dtype).eval()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.parameters = [parameters[name].requires_grad_() for name in gradients]
        self.given = [gradient.detach().to(device, dtype) for gradient in gradients.values()]
        self.labels = labels.to(device, dtype)
        channels = len(mean)
        ends = torch.tensor([0.0, 1.0], dtype=dtype, device=device).view(2, 1, 1, 1)
        self.low, self.high = normalise(ends.expand(2, channels, 1, 1), mean, std)
        self.distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] = (
            cosine_distance if distance == "cosine" else l2_distance
        )
        self.tv = tv
        self.feature_weight = 0.0 if features is None else feature_weight
        self.seen: list[Tensor] = []
        if self.feature_weight > 0 and features is not None:
            self.features = features.detach().to(device, dtype)
            if self.features.shape[0] != self.labels.shape[0]:
                raise InputError(
                    f"{self.features.shape[0]} features for {self.labels.shape[0]} labels",
                    "give one feature a sample",
                )
            if not bool(self.features.any()):
                raise InputError("the given features are zero", "set the feature weight to 0")
            linear_named(self.model, head).register_forward_pre_hook(self._remember)

    def clamp(self, inputs: Tensor) -> Tensor:
        """Clamp network input (N, C, H, W) to the pictures' box [0, 1], in normalised space."""
        return torch.clamp(inputs, self.low, self.high)

    def __call__(self, inputs: Tensor) -> tuple[float, Tensor]:
        """Return the objective of the clamped ``inputs`` and the direction (N, C, H, W) uphill.

        The direction is the gradient of objective + penalty on leaving the box. The objective
        itself is that of the picture which would be written, so its best iterate is the best
        picture.
        """
        x = inputs.detach().requires_grad_()
        inside = self.clamp(x)
        self.seen.clear()
        loss = soft_cross_entropy(self.model(inside), self.labels)
        found = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        value = self.distance(found, self.given)
        if self.tv > 0:
            value = value + self.tv * total_variation(inside)
        if self.feature_weight > 0:
            value = value + self.feature_weight * self._feature_error()
        outside = (x - inside.detach()).square().mean()
        (uphill,) = torch.autograd.grad(value + BOX_WEIGHT * outside, x)
        self.seen.clear()
        return value.item(), uphill

    def _remember(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(inputs[0])

    def _feature_error(self) -> Tensor:
        if not self.seen or self.seen[-1].shape != self.features.shape:
            found = tuple(self.seen[-1].shape) if self.seen else "none"
            raise InputError(
                f"features of shape {tuple(self.features.shape)}, the head's input is {found}",
                "give the feature of the layer named as head",
            )
        return (self.seen[-1] - self.features).square().sum() / self.features.square().sum()


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −Σ_i y_i log softmax(z)_i, averaged over the batch; both are (N, C)."""
    if logits.shape != labels.shape:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}",
            "give one distribution over the network's classes a sample",
        )
    return -(labels * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def require_matching_tensors(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` unless every gradient is finite and has its parameter's shape."""
    if not gradients:
        raise InputError("there are no gradients to match", "give at least one")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, gradient in gradients.items():
        if name not in parameters:
            raise InputError(f"the network has no parameter {name}", "name the network captured")
        if gradient.shape != parameters[name].shape:
            raise InputError(
                f"the gradient of {name} is {tuple(gradient.shape)}, "
                f"the parameter {tuple(parameters[name].shape)}",
                "name the network captured",
            )
        if not bool(torch.isfinite(gradient).all()):
            raise InputError(f"the gradient of {name} holds NaN or infinity", "capture it again")


def linear_named(model: nn.Module, head: str | None) -> nn.Linear:
    """Return the Linear layer with the qualified name ``head``; ``UsageError`` if there is none."""
    module = dict(model.named_modules()).get(head) if head is not None else None
    if not isinstance(module, nn.Linear):
        raise UsageError(
            f"the network has no Linear layer named {head!r}", "name the classifier's head"
        )
    return module


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors])
