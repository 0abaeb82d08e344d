"""The certificate of a reconstruction: run the network on it again and compare the gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import InputError
from gradleak.normalisation import normalise
from gradleak.reconstruction.objectives import require_matching_tensors, soft_cross_entropy

# How many times its own rounding a residual may be and still count as rounding: the gradient may
# come from another machine, whose sums run in another order.
_ROUNDINGS = 4.0
# The same for a single tensor: of a hundred, a few are luckier or unluckier than the whole.
_ROUNDINGS_EACH = 16.0
# A tensor whose error is below this part of the whole gradient's epsilon is not judged singly:
# it may be a zero that only rounding fills.
_NEGLIGIBLE = 1e-2
# A gradient is zero if float64 leaves less than this part of what the dtype's rounding does.
_ZERO = 1e-3
# A tie at a ReLU or max-pool that falls differently in float64 looks like a rounding of percents;
# such a jump must not excuse a wrong image, so no rounding above this, or above √eps, counts.
_LARGEST_ROUNDING = 1e-2


@dataclass(frozen=True)
class GradientResidual:
    """How far the gradient of a reconstruction is from the given one.

    ``relative`` is ‖g(x) − g‖ / ‖g‖ over all tensors, ``per_tensor`` the same for each,
    ``precision`` the relative rounding error of a gradient of the given dtype at this image, and
    ``exact`` whether that rounding explains the residual, over all and tensor by tensor.
    """

    relative: float
    per_tensor: dict[str, float]
    precision: float
    exact: bool


def gradients_of(
    model: nn.Module, images_normalised: Tensor, labels: Tensor, names: Iterable[str]
) -> dict[str, Tensor]:
    """Differentiate the mean soft-label cross-entropy by the named parameters.

    ``images_normalised`` are (N, C, H, W) network input, ``labels`` (N, classes); the network is
    used in the mode and precision it is in. Raises ``InputError`` for a name that is no
    parameter.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise InputError(f"the network has no parameter {name}", "name the network captured")
    frozen = [known[name] for name in wanted if not known[name].requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.enable_grad():
            loss = soft_cross_entropy(model(images_normalised), labels.to(images_normalised))
            found = torch.autograd.grad(
                loss, [known[name] for name in wanted], allow_unused=True, materialize_grads=True
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return dict(zip(wanted, found, strict=True))


def check_reconstruction(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> GradientResidual:
    """Re-simulate the gradient of ``images`` (N, C, H, W) in [0, 1] and compare it.

    The original is not needed: the given gradient is what the true image produced, so an image
    that was not found is betrayed by a gradient of its own. The network runs in float64 and in
    the gradients' dtype, and the nearer gradient counts: ties at a kink fall as they fell at
    capture only in the same arithmetic. ``exact`` holds when the residual is at most four times
    the larger of the dtype's epsilon and its rounding at this very image (the latter counted up
    to √epsilon and 1e-2), and each tensor's own at most sixteen times: the head's large gradient
    alone would pass images that the first layers refuse. It never depends on the method that
    found the image.

    A small residual proves that the image *explains* the gradient. It does not prove that no
    other image does: where the network forgets (dead units, more pixels than equations, only a
    head's gradient shared) several images share one gradient, and the label is taken as given.
    The images' own rounding is part of the residual: a float32 image rarely explains a float64
    gradient exactly.

    Raises ``InputError`` where the gradients are not the network's, or labels do not fit.
    """
    require_matching_tensors(model, gradients)
    device = next(iter(gradients.values())).device
    images, labels = images.detach().to(device), labels.detach().to(device)
    exact_model = copy.deepcopy(model).to(device, torch.float64).eval()
    simulated = _simulate(exact_model, images.double(), labels, gradients, mean, std)
    given = {name: gradient.detach().double() for name, gradient in gradients.items()}

    # The coarsest dtype decides; float64 cannot show its own rounding, so float32 stands in.
    dtype = max((g.dtype for g in gradients.values()), key=lambda d: torch.finfo(d).eps)
    tried = torch.float32 if dtype == torch.float64 else dtype
    rounding_model = copy.deepcopy(model).to(device, tried).eval()
    rounded = _simulate(rounding_model, images.to(tried), labels, gradients, mean, std)
    eps = torch.finfo(dtype).eps
    finer = eps / torch.finfo(tried).eps
    nearest = min((simulated, rounded), key=lambda found: _relative(found, given))
    negligible = _NEGLIGIBLE * eps * _size(given)
    return judge_residual(
        _relative(nearest, given),
        {name: _relative(_only(nearest, name), _only(given, name)) for name in given},
        _relative(rounded, simulated) * finer,
        dtype,
        each={
            name: _relative(_only(rounded, name), _only(simulated, name)) * finer
            for name in given
            if _size({name: nearest[name] - given[name]}) > negligible
            and not _is_rounding(_only(given, name), _only(rounded, name), _only(simulated, name))
        },
    )


def judge_residual(
    relative: float,
    per_tensor: Mapping[str, float],
    precision: float,
    dtype: torch.dtype,
    *,
    each: Mapping[str, float] | None = None,
) -> GradientResidual:
    """Decide whether rounding explains a residual, by the rule of ``check_reconstruction``.

    ``relative``, ``per_tensor`` and ``precision`` are those of ``GradientResidual``, ``dtype``
    that of the gradients. ``each`` holds the precision of every tensor that is to be judged
    singly; None judges all of them by ``precision``.
    """
    singly = dict.fromkeys(per_tensor, precision) if each is None else each
    exact = relative <= _allowed(precision, dtype, _ROUNDINGS) and all(
        per_tensor[name] <= _allowed(own, dtype, _ROUNDINGS_EACH) for name, own in singly.items()
    )
    return GradientResidual(relative, dict(per_tensor), precision, exact)


def _is_rounding(
    given: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> bool:
    """Return whether a gradient is zero but for rounding, as that of a bias under BatchNorm is.

    The same arithmetic fills it with as much, and a finer one with far less.
    """
    noise = _size(rounded)
    return _size(exact) < _ZERO * noise and _size(given) <= _ROUNDINGS_EACH * noise


def _allowed(precision: float, dtype: torch.dtype, roundings: float) -> float:
    # The finished image is float32, whatever the gradients are.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return roundings * max(min(precision, math.sqrt(eps), _LARGEST_ROUNDING), eps)


def _only(gradients: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name: gradients[name]}


def _size(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))


def _simulate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    names: Iterable[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Tensor]:
    inputs = normalise(images, mean, std)
    found = gradients_of(model, inputs, labels, names)
    return {name: gradient.double() for name, gradient in found.items()}


def _relative(found: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> float:
    """‖found − given‖ / ‖given‖ over all tensors; 0 for two zeros, infinite for one."""
    error = _size({name: found[name] - given[name] for name in given})
    size = _size(given)
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size
