"""Stage ``capture``: the gradient that a client would share, from a network, images and labels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradleak.bundle import BUFFER, GRAD, LOSS, PARAM, Bundle, StageRecord
from gradleak.device import resolve_device
from gradleak.errors import InputError, UsageError
from gradleak.head import parameter_name
from gradleak.models.output import logits_in
from gradleak.models.recording import recorded
from gradleak.models.spec import ModelSpec
from gradleak.models.trace import seeded
from gradleak.models.training import untouched_buffers
from gradleak.normalisation import normalise
from gradleak.softlabels import soft_label
from gradleak.truth import Truth


@dataclass(frozen=True)
class Capture:
    """The gradient ``bundle`` and, apart from it, the ``truth`` it was taken from."""

    bundle: Bundle
    truth: Truth


@dataclass(frozen=True)
class Prediction:
    """The network's own answer: the largest class of each image, out of ``count``."""

    classes: list[int]
    count: int


def capture(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    spec: ModelSpec | None = None,
    weights: bool = True,
    head_only: bool = False,
    withhold_bias: bool = False,
    mode: str = "eval",
    device: str = "auto",
    seed: int = 0,
) -> Capture:
    """Compute the gradient of the mean soft-label cross-entropy, as a bundle.

    ``images`` (N, 3, H, W) in [0, 1] are normalised by the mean and std of ``spec``, if it has
    any; ``labels`` are classes (N,) int64 or soft labels (N, C). ``spec`` adds what only the caller
    knows (name, mean, std, options). ``weights=False`` leaves the model state out, ``head_only``
    keeps the gradient and weights of the head alone, ``withhold_bias`` drops the head's bias
    gradient (its bias stays). In ``mode`` "train" BatchNorm normalises by the batch and dropout
    draws from ``seed``; the bundle keeps the buffers from before. The model is left in the mode and
    on the device it was in.

    Raises :class:`InputError` for shapes that do not fit or a network without a Linear head.
    """
    if mode not in ("eval", "train"):
        raise UsageError(f"there is no mode {mode!r}", "use eval or train")
    where = resolve_device(device)
    known = spec or ModelSpec()
    if images.dim() != 4 or not len(images):
        raise InputError(f"images of shape {list(images.shape)}", "give (N, C, H, W), N from 1")
    first = next((p for p in model.parameters() if p.requires_grad), None)
    if first is None:
        raise InputError("no parameter of the network requires a gradient", "unfreeze one")
    home = first.device
    training = {module: module.training for module in model.modules()}
    model = model.to(where).eval()
    start = time.perf_counter()
    try:
        pixels = images.to(where, torch.float32)
        inputs = pixels
        if known.mean is not None and known.std is not None:
            inputs = normalise(pixels, known.mean, known.std)
        inputs = inputs.to(first.dtype)
        full = recorded(model, known, inputs)
        layers, head = full.layers, str(full.head)
        chosen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not head_only or name.rpartition(".")[0] == head
        }
        model.train(mode == "train")
        with torch.enable_grad(), untouched_buffers(model), seeded(seed):
            logits, features = _forward(model, inputs, [layer.name for layer in layers])
            targets = _as_soft_labels(labels, logits)
            gradients = _gradients(logits, targets, chosen)
    finally:
        for module, flag in training.items():
            module.training = flag
        model.to(home)
    if withhold_bias:
        gradients.pop(parameter_name(head, "bias"), None)
    full = replace(full, classes=logits.shape[1])
    tensors = {GRAD + name: gradient for name, gradient in gradients.items()}
    if weights:
        tensors |= {PARAM + name: parameter.detach() for name, parameter in chosen.items()}
        if not head_only:
            tensors |= {BUFFER + name: buffer for name, buffer in model.named_buffers()}
    arguments: dict[str, object] = {
        "head_only": head_only,
        "withhold_bias": withhold_bias,
        "mode": mode,
    }
    record = StageRecord(
        "capture",
        arguments,
        seed=seed,
        device=str(where),
        seconds=time.perf_counter() - start,
    )
    metadata = {
        "model": full.to_json(),
        "loss": LOSS,
        "batch_size": str(len(inputs)),
        "mode": mode,
        "defenses": "[]",
    }
    # Copied: the model may be trained on, and the bundle must keep the state at capture.
    bundle = Bundle({name: t.to("cpu", copy=True) for name, t in tensors.items()}, metadata)
    truth = Truth(
        labels=targets.detach().double().cpu(),
        images=pixels.cpu(),
        features={name: x.detach().cpu() for name, x in features.items()},
    )
    return Capture(bundle.extended(record=record), truth)


def predict(model: nn.Module, images: Tensor, spec: ModelSpec, device: str = "auto") -> Prediction:
    """Run the network in eval mode on ``images`` (N, 3, H, W) in [0, 1]."""
    where = resolve_device(device)
    model = model.to(where).eval()
    inputs = images.to(where)
    if spec.mean is not None and spec.std is not None:
        inputs = normalise(inputs, spec.mean, spec.std)
    with torch.no_grad():
        logits, _ = _forward(model, inputs.to(next(model.parameters()).dtype), ())
    return Prediction(logits.argmax(1).tolist(), logits.shape[1])


def mix_pairs(images: Tensor, weight: float) -> Tensor:
    """Mix consecutive pairs of ``(2N, 3, H, W)``: λ of the first and 1 − λ of the second.

    Raises :class:`UsageError` for an odd number of images or a λ outside [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise UsageError(f"mixup weight {weight} is outside [0, 1]", "give λ between 0 and 1")
    if len(images) % 2:
        raise UsageError(
            f"mixup takes pairs of images, and {len(images)} were given",
            "give an even number of --image",
        )
    return weight * images[::2] + (1.0 - weight) * images[1::2]


def label_samples(
    classes: Sequence[int], count: int, *, smooth: float = 0.0, mixup: float | None = None
) -> Tensor:
    """Build the soft labels (N, C) of ``count`` classes, one per image, or one per mixed pair."""
    if mixup is None:
        rows = [soft_label([(k, 1.0)], count, smooth) for k in classes]
    else:
        pairs = zip(classes[::2], classes[1::2], strict=True)
        rows = [soft_label([(i, mixup), (j, 1.0 - mixup)], count, smooth) for i, j in pairs]
    return torch.stack(rows)


def _forward(
    model: nn.Module, inputs: Tensor, layers: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits (N, C) and the inputs (N, D) of the named Linear layers."""
    features: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(
            lambda _, args, name=name: features.__setitem__(name, args[0])
        )
        for name in layers
    ]
    try:
        logits = logits_in(model(inputs))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the network refused images of shape {list(inputs.shape[1:])} "
            f"({str(error).splitlines()[0]})",
            "give two images or more"
            if "per channel when training" in str(error)
            else "use the size that it takes (--size)",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InputError("the network does not return logits (N, classes)", "return a 2-D tensor")
    return logits, features


def _as_soft_labels(labels: Tensor, logits: Tensor) -> Tensor:
    labels = labels.to(logits.device)
    count = logits.shape[1]
    if labels.dim() == 1 and not labels.is_floating_point():
        if len(labels) == len(logits) and 0 <= int(labels.min()) <= int(labels.max()) < count:
            return functional.one_hot(labels, count).to(torch.float64)
    elif labels.shape == logits.shape:
        return labels
    raise InputError(
        f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}",
        f"give classes (N,) below {count}, or soft labels (N, {count})",
    )


def _gradients(
    logits: Tensor, targets: Tensor, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return ∂loss/∂parameter for every parameter that takes part in the loss."""
    loss = functional.cross_entropy(logits, targets.to(logits.dtype), reduction="mean")
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
