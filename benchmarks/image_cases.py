"""The cases of the image benchmarks: one network, pictures with their labels, one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from image_networks import Built, Network, build
from image_photographs import KNOWN, batch_of_crops, is_held_out, picture, targets
from torch import Tensor
from train_networks import task_of

import gradleak
from gradleak.bundle import GRAD, Bundle
from gradleak.softlabels import soft_label
from gradleak.truth import Truth

CROP, DIGIT = "crop", "digit"
FAMILIES = ("smooth", "hard", "mixup")


@dataclass(frozen=True)
class Case:
    """One gradient: ``pictures`` are photographs by name, ``digit 3`` of those held out, or crops.

    ``seed`` draws the initialisation (of a network that was not trained), the labels, the crops and
    the noise; the label family goes round with it. ``noise`` is the standard deviation of Gaussian
    noise on every entry of a gradient, relative to that tensor's root mean square; ``dtype`` is
    what the gradient is rounded to. ``label_error`` and ``feature_error`` are relative errors put
    on the recovered label and feature before the next stage reads them; ``maps`` asks for the
    feature maps to be compared.
    """

    network: Network
    pictures: tuple[str, ...]
    seed: int = 0
    noise: float = 0.0
    dtype: str = "float32"
    label_error: float = 0.0
    feature_error: float = 0.0
    maps: bool = False

    @property
    def held_out(self) -> bool:
        """Whether its picture was not looked at while the attacks were built."""
        return all(is_held_out(name) for name in self.pictures)

    @property
    def name(self) -> str:
        """What the tables call it."""
        first = self.pictures[0]
        return first if len(self.pictures) == 1 else f"{len(self.pictures)} × {first}, {self.seed}"


@dataclass(frozen=True)
class Captured:
    """The gradient of a case, which is all an attack gets beside the network, and the truth."""

    bundle: Bundle
    truth: Truth
    built: Built


def of_photographs(network: Network, count: int | None = None) -> list[Case]:
    """Return one case a photograph, each with another initialisation."""
    return [Case(network, (name,), seed) for seed, name in enumerate(targets(count))]


def of_digits(network: Network, count: int | None = None) -> list[Case]:
    """Return one case a held-out digit, as many as there are photographs unless ``count`` says."""
    return [Case(network, (f"{DIGIT} {k}",), k) for k in range(len(targets(count)))]


def of_batches(network: Network, samples: int, draws: int, first: int = 1000) -> list[Case]:
    """Return ``draws`` batches of random crops of all photographs, numbered from ``first``."""
    return [Case(network, (CROP,) * samples, first + draw) for draw in range(draws)]


def with_change(cases: Sequence[Case], **changes: float | str | bool) -> list[Case]:
    """Return the cases with noise, another dtype, or errors."""
    return [replace(case, **changes) for case in cases]  # type: ignore[arg-type]


def captured(case: Case) -> Captured:
    """Take the gradient of a case in float32 by autograd in eval mode, then spoil it if asked."""
    built = build(case.network, case.seed)
    dice = torch.Generator().manual_seed(1000003 * len(case.pictures) + case.seed)
    images = _images(case, dice)
    labels = torch.stack(
        [_label(case, place, built.classes, dice) for place in range(len(case.pictures))]
    )
    found = gradleak.capture(built.model, images, labels, spec=built.spec)
    return Captured(spoiled(found.bundle, case, dice), found.truth, built)


def spoiled(bundle: Bundle, case: Case, dice: torch.Generator) -> Bundle:
    """Return the bundle with the case's noise on its gradients, in the case's dtype."""
    changed = {}
    for name in bundle.names(GRAD):
        gradient = bundle.tensor(GRAD + name)
        if case.noise:
            spread = case.noise * gradient.double().square().mean().sqrt()
            draw = torch.randn(gradient.shape, generator=dice, dtype=torch.float64)
            gradient = (gradient + spread * draw).to(gradient.dtype)
        changed[GRAD + name] = gradient.to(getattr(torch, case.dtype))
    return bundle.extended(changed)


def _images(case: Case, dice: torch.Generator) -> Tensor:
    size = case.network.size
    if case.pictures[0] == CROP:
        return batch_of_crops(size, len(case.pictures), dice)
    return torch.stack([_picture(name, size) for name in case.pictures])


def _picture(name: str, size: int) -> Tensor:
    if not name.startswith(DIGIT):
        return picture(name, size)
    enlarged = task_of("digits").held_images[int(name.split()[1])]
    return (enlarged * 255).round() / 255


def _label(case: Case, place: int, classes: int, dice: torch.Generator) -> Tensor:
    """Draw one soft label (C,); of what a trained network knows, its class is the largest."""
    first, second = torch.randperm(classes, generator=dice)[:2].tolist()
    own = _own_class(case, case.pictures[place])
    if own is not None:
        first, second = own, (second if second != own else (own + 1) % classes)
    family = FAMILIES[(case.seed + place) % len(FAMILIES)]
    share = float(torch.rand((), generator=dice, dtype=torch.float64))
    if family == "mixup":
        weight = 0.5 + 0.45 * share
        return soft_label([(first, weight), (second, 1.0 - weight)], classes)
    return soft_label([(first, 1.0)], classes, 0.02 + 0.4 * share if family == "smooth" else 0.0)


def _own_class(case: Case, name: str) -> int | None:
    if case.network.task == "photographs" and name in KNOWN:
        return KNOWN.index(name)
    if case.network.task == "digits" and name.startswith(DIGIT):
        return int(task_of("digits").held_labels[int(name.split()[1])])
    return None
