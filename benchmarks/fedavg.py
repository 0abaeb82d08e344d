"""What a client's update gives away after one, two and five local steps.

A client takes K steps of plain SGD on photographs, one photograph a step, and sends its weights.
The attack gets the weights before and after, the learning rate, K, and how many photographs the
client has (Flower's clients say it). Labels are hard. *Class right* counts cases in which the
largest entry of every recovered label is the photograph's class; the label error is the largest of
any entry; PSNR is of the recovered picture, the best matching one where there are several. *Falsely
`unique`* counts labels called so that are off by more than 1e-3, and pictures called so of which an
8-bit value differs. *Weights before* is the same attack with the weights at which the client began
in place of those in the middle of its steps, on the first photographs of the cell. Pictures are
attacked on the first photographs, too, and of several at once through the MLP alone. A cell ends
with its photographs or with its time. Networks are untrained and in eval mode.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from common import Run, markdown_table, this_command, write_result
from image_photographs import picture, targets
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak.errors import GradleakError
from gradleak.metrics import label_errors, match_samples, psnr, wilson_interval
from gradleak.models.build import build_model
from gradleak.reconstruction.options import MatchSettings

SIZE, CLASSES = 32, 10
STEPS, RATES = (1, 2, 5), (0.1, 0.01, 0.001)
WRONG = 1e-3


def mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        wide, narrow = nn.Linear(3 * SIZE * SIZE, 256), nn.Linear(256, 64)
        return nn.Sequential(
            nn.Flatten(), wide, nn.ReLU(), narrow, nn.ReLU(), nn.Linear(64, CLASSES)
        )


@dataclass(frozen=True)
class Network:
    """A network of the table, and of how many photographs a cell its pictures are attacked."""

    title: str
    build: Callable[[int], nn.Module]
    pictures: int


NETWORKS = (
    Network("MLP, 256 and 64 ReLUs", mlp, 3),
    Network("LeNet", lambda seed: build_model("lenet", seed=seed), 2),
    Network("ResNet-18, CIFAR stem", lambda seed: build_model("resnet18-cifar", seed=seed), 1),
)


@dataclass(frozen=True)
class Cell:
    """A row of the table: K steps at a learning rate, on one photograph or on K."""

    network: Network
    steps: int
    lr: float
    different: bool

    @property
    def photographs(self) -> int:
        """How many the client has."""
        return self.steps if self.different else 1

    @property
    def pictures(self) -> int:
        """On how many clients the pictures are attacked."""
        if not self.different:
            return self.network.pictures
        return 2 if self.network.build is mlp else 0


@dataclass
class Outcomes:
    """What the attacks on a cell's photographs came to."""

    tried: int = 0
    right: int = 0
    false: int = 0
    errors: list[float] = field(default_factory=list)
    errors_before: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    picture_verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    picture_seconds: float = 0.0


def cells() -> Iterator[Cell]:
    for network in NETWORKS:
        for steps in STEPS:
            for different in (False, True)[: 1 if steps == 1 else 2]:
                for lr in RATES:
                    yield Cell(network, steps, lr, different)


def update(cell: Cell, case: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Train a client; return its network before and after, its photographs and labels."""
    names = targets()
    chosen = [names[(case + n) % len(names)] for n in range(cell.photographs)]
    images = torch.stack([picture(name, SIZE) for name in chosen])
    classes = torch.tensor([(7 * case + 3 * n) % CLASSES for n in range(cell.photographs)])
    model = cell.network.build(case).eval()
    before = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=cell.lr)
    for step in range(cell.steps):
        n = step % len(images)
        optimiser.zero_grad()
        F.cross_entropy(model(images[n : n + 1]), classes[n : n + 1]).backward()
        optimiser.step()
    return before, model, images, classes


def attack(cell: Cell, case: int, outcomes: Outcomes, compare: bool, limit: float) -> None:
    """Attack one client's update, and enter what came of it."""
    before, after, images, classes = update(cell, case)
    truth = F.one_hot(classes, CLASSES).double()
    bundle = gradleak.Bundle.from_update(
        before, after, cell.lr, local_steps=cell.steps, example=images[:1]
    )
    start = time.perf_counter()
    outcomes.tried += 1
    try:
        labelled = gradleak.recover_label(bundle, batch_size=cell.photographs)
    except GradleakError as error:
        outcomes.verdicts["refused"] += 1
        outcomes.reasons[str(error)] += 1
        return
    result = labelled.result
    outcomes.verdicts[result.verdict] += 1
    if result.verdict not in ("unique", "ambiguous"):
        outcomes.reasons[result.reason] += 1
    error = label_error(result.labels, truth)
    if error is not None:
        found, worst = error
        outcomes.right += found
        outcomes.errors.append(worst)
    outcomes.false += result.verdict == "unique" and (error is None or error[1] > WRONG)
    outcomes.seconds.append(time.perf_counter() - start)
    if compare and cell.steps > 1 and not cell.different:
        state = {f"param/{name}": p.detach() for name, p in before.named_parameters()}
        early = gradleak.recover_label(bundle.extended(state), batch_size=cell.photographs)
        other = label_error(early.result.labels, truth)
        outcomes.errors_before.append(math.inf if other is None else other[1])
    if result.labels is not None and case < cell.pictures:
        began = time.process_time()
        attack_picture(labelled.bundle, before, images, outcomes, limit)
        outcomes.picture_seconds += time.process_time() - began


def label_error(labels: Tensor | None, truth: Tensor) -> tuple[bool, float] | None:
    """Return whether all classes are right, and the largest error; None without all labels."""
    if labels is None or len(labels) != len(truth):
        return None
    ordered = labels.double()[match_samples(labels, truth)]
    right = bool((ordered.argmax(1) == truth.argmax(1)).all())
    return right, max(label_errors(ordered, truth).max_error)


def attack_picture(
    bundle: gradleak.Bundle, model: nn.Module, images: Tensor, outcomes: Outcomes, limit: float
) -> None:
    """Reconstruct the pictures behind a labelled bundle, and enter their PSNRs."""
    settings = MatchSettings(time_limit=limit)
    try:
        featured = gradleak.recover_feature(bundle)
        outcome = gradleak.reconstruct(featured.bundle, model=model, settings=settings)
    except GradleakError as error:
        outcomes.picture_verdicts["none"] += 1
        outcomes.reasons[f"no picture: {error}"] += 1
        return
    outcomes.picture_verdicts[outcome.verdict] += 1
    for image in images.double():
        scores = psnr(outcome.images.double(), image.expand_as(outcome.images))
        outcomes.pictures.append(float(scores.max()))
    gap = (outcome.images[:1].mul(255).round() - images[:1].mul(255).round()).abs().max()
    outcomes.false += outcome.verdict == "unique" and float(gap) > 0.0


def row_of(cell: Cell, outcomes: Outcomes) -> tuple[str, ...]:
    low, high = wilson_interval(outcomes.right, outcomes.tried)
    seen = "one" if not cell.different else f"{cell.steps} different"
    return (
        cell.network.title,
        str(cell.steps),
        f"{cell.lr:g}",
        seen,
        f"{outcomes.right} of {outcomes.tried}",
        f"{low:.0%} – {high:.0%}",
        spread(outcomes.errors, "{:.1e}", max),
        f"{median(outcomes.errors_before):.1e}" if outcomes.errors_before else "–",
        counted(outcomes.verdicts),
        spread(outcomes.pictures, "{:.0f}", min),
        counted(outcomes.picture_verdicts),
        str(outcomes.false),
        f"{median(outcomes.seconds):.1f}" if outcomes.seconds else "–",
    )


def spread(values: list[float], form: str, worst: Callable[[list[float]], float]) -> str:
    if not values:
        return "–"
    return f"{form.format(median(values))}, {form.format(worst(values))}"


def counted(verdicts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in verdicts.most_common()) or "–"


COLUMNS = (
    "network",
    "K",
    "learning rate",
    "photographs",
    "class right",
    "95 % interval",
    "label error, median, worst",
    "weights before: median",
    "label verdicts",
    "PSNR, dB, median, worst",
    "picture verdicts",
    "falsely `unique`",
    "seconds of the label, median",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=10, help="clients a cell")
    parser.add_argument("--compare", type=int, default=3, help="of those, with the weights before")
    parser.add_argument("--cell-seconds", type=float, default=6.0, help="of CPU, for its labels")
    parser.add_argument("--match-seconds", type=float, default=4.0, help="limit of one picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = Run(this_command())
    rows, reasons = [], []
    attack(next(cells()), 0, Outcomes(), False, given.match_seconds)  # what is loaded but once
    for cell in cells():
        outcomes, start = Outcomes(), time.process_time()
        for case in range(given.photographs):
            if time.process_time() - start - outcomes.picture_seconds > given.cell_seconds:
                break
            attack(cell, case, outcomes, case < given.compare, given.match_seconds)
        rows.append(row_of(cell, outcomes))
        print(" | ".join(rows[-1]), flush=True)
        where = " · ".join(rows[-1][:4])
        reasons += [f"- {where}: {n} × {why}" for why, n in outcomes.reasons.most_common(2)]
    parts = [
        __doc__.split("\n\n", 1)[1].strip().splitlines(),
        markdown_table(COLUMNS, rows),
        ["## What was not recovered, and why", "", "The two commonest reasons of each cell."],
        reasons,
    ]
    write_result("fedavg", "Updates of several local steps", run, parts)


if __name__ == "__main__":
    main()
