"""The tables of the image benchmarks: their rows, and what is asked of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import image_networks as nets
from image_attack import Outcome
from image_cases import Case, of_batches, of_digits, of_photographs, with_change
from image_networks import Network

BATCHES = (2, 4, 8, 16, 32, 64)
LEVELS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
ERRORS = (1e-6, 1e-5, 1e-4, 1e-3)
# Batches that are large get half the draws.
MANY = 32


@dataclass(frozen=True)
class Size:
    """How much of the tables a run does: ``photographs`` of a row (None: all), ``draws`` a cell."""

    photographs: int | None = None
    draws: int = 20
    samples: Sequence[int] = BATCHES


@dataclass(frozen=True)
class Row:
    """Cases of one kind; ``good`` says of an outcome whether it is what was ``asked``.

    ``seconds`` limits the search for an image where nothing exact applies (None: the run's own).
    """

    name: str
    asked: str
    cases: Sequence[Case]
    good: Callable[[Outcome], bool]
    seconds: float | None = None

    @property
    def rivals(self) -> bool:
        """Whether what is asked is a comparison, so that every case needs the baselines."""
        return self.good is no_worse_than_matching


@dataclass(frozen=True)
class Table:
    """One page of results. Baselines get ``factor`` × the attack's time on the same case."""

    key: str
    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    factor: float = 10.0
    products: Sequence[Network] = field(default_factory=tuple)

    @property
    def page(self) -> str:
        """The name of the page in docs/results."""
        return f"images_{self.key.replace('-', '_')}"


def same_pixels(outcome: Outcome) -> bool:
    """No 8-bit value differs."""
    return outcome.picture.differing == 0


def at_least(decibels: float) -> Callable[[Outcome], bool]:
    """Return whether the float picture has that PSNR."""
    return lambda outcome: outcome.picture.psnr >= decibels


def same_and_at_least(decibels: float) -> Callable[[Outcome], bool]:
    """Return whether no 8-bit value differs and the float picture has that PSNR."""
    return lambda outcome: same_pixels(outcome) and outcome.picture.psnr >= decibels


def no_worse_than_matching(outcome: Outcome) -> bool:
    """No baseline has a higher PSNR; a case without baselines is not counted as good."""
    rivals = [picture.psnr for picture, _ in outcome.baselines.values()]
    best = max((p for p in rivals if not math.isnan(p)), default=math.nan)
    return outcome.picture.psnr >= best


def tables(size: Size) -> list[Table]:
    """Return every table, each with the cases of a run of that size."""
    return [
        _mlp(size),
        _batches("batches", "FCN-4", (nets.FCN4_100,), size),
        _batches("batches-deep", "deeper MLPs", (nets.MLP8_HE, nets.MLP8, nets.MLP8_TANH), size),
        _lenet(size),
        _resnet18(size),
        _resnet18_batches(size),
        _resnet18_large(size),
        _others(size),
        _noise("noise", "ResNet-18", (nets.RESNET18, nets.CIFAR), size),
        _noise("noise-lenet", "LeNet", (nets.LENET,), size),
        _sensitivity(size),
    ]


def _mlp(size: Size) -> Table:
    asked = "≥ 120 dB, no 8-bit value differs"
    each = (nets.FCN4, nets.FCN4_BIAS, nets.MLP8_HE, nets.MLP8, nets.MLP8_TANH)
    rows = [
        Row(net.title, asked, of_photographs(net, size.photographs), same_and_at_least(120.0))
        for net in each
    ]
    return Table("mlp", "Images through MLPs, one sample", rows, products=(nets.FCN4,))


def _batches(key: str, what: str, networks: Sequence[Network], size: Size) -> Table:
    rows = []
    for net in networks:
        for n in size.samples:
            asked = "≥ 100 dB in ≥ 95 %" if n < 64 else "≥ 100 dB where labels are found"
            draws = size.draws if n < MANY else (size.draws + 1) // 2
            rows.append(
                Row(f"{net.title}, N = {n}", asked, of_batches(net, n, draws), at_least(100.0))
            )
    notes = (
        f"C = 100, {networks[0].size}×{networks[0].size}. A picture is a random square of half to "
        "all of a photograph, so batches have several of one photograph. Classes repeat too. "
        "A batch counts as its worst sample does. *Condition* is that of the head's gradient, its "
        "first over its N-th singular value: an error in the float32 gradient reaches features, "
        "deltas and pictures multiplied by as much. Two hard labels of one class make it large, "
        "and so does a network that hardly tells its samples apart.",
    )
    return Table(key, f"Images of batches through {what}", rows, notes)


def _lenet(size: Size) -> Table:
    asked = "no 8-bit value differs in ≥ 9 of 10, ≤ 2 s"
    rows = [
        Row(net.title, asked, of_photographs(net, size.photographs), same_pixels)
        for net in (nets.LENET, nets.LENET_PAPER)
    ]
    trained = nets.LENET_DIGITS
    photographs = of_photographs(trained, size.photographs)
    rows.append(Row(f"{trained.title}, photographs", "–", photographs, same_pixels))
    digits = of_digits(trained, size.photographs)
    rows.append(Row(f"{trained.title}, digits", "–", digits, same_pixels))
    return Table("lenet", "Images through LeNet, 32×32", rows)


def _resnet18(size: Size) -> Table:
    def row(net: Network, share: str, seconds: int, digits: bool = False) -> Row:
        asked = f"no 8-bit value differs in ≥ {share}, ≤ {seconds} s"
        cases = of_digits if digits else of_photographs
        name = net.title + (
            "" if net.task is None else ", digits" if digits else ", photographs as targets"
        )
        return Row(name, asked, cases(net, size.photographs), same_pixels)

    rows = [
        row(nets.RESNET18, "95 %", 20),
        row(nets.RESNET18_CROPS, "80 %", 20),
        row(nets.CIFAR, "95 %", 30),
        row(nets.CIFAR_DIGITS, "80 %", 30),
        row(nets.CIFAR_DIGITS, "80 %", 30, digits=True),
        row(nets.CIFAR_CROPS, "80 %", 30),
    ]
    return Table("resnet18", "Images through ResNet-18, 32×32", rows)


def _resnet18_batches(size: Size) -> Table:
    rows = []
    for n in (2, 4, 8):
        cases = with_change(of_batches(nets.RESNET18, n, (size.draws + 1) // 2), maps=True)
        rows.append(Row(f"ResNet-18, untrained, N = {n}", "a first figure", cases, same_pixels))
    return Table("resnet18-batches", "Batches through ResNet-18 with the pooling stem", rows)


def _resnet18_large(size: Size) -> Table:
    rows = []
    for net, level, seconds in ((nets.RESNET18_64, 30, 60.0), (nets.RESNET18_224, 25, 120.0)):
        cases = with_change(of_photographs(net, size.photographs), maps=True)
        rows.append(Row(net.title, f"≥ {level} dB", cases, at_least(level), seconds))
    return Table("resnet18-large", "Larger images through ResNet-18", rows, factor=1.0)


def _others(size: Size) -> Table:
    rows = [
        Row(
            net.title,
            "no worse than matching in the same time",
            of_photographs(net, size.photographs),
            no_worse_than_matching,
        )
        for net in (nets.RELU_LENET, nets.CONVNET, nets.ALEXNET)
    ]
    return Table("others", "A LeNet with ReLUs, a ConvNet without skips, AlexNet", rows, factor=1.0)


def _noise(key: str, what: str, networks: Sequence[Network], size: Size) -> Table:
    def row(
        net: Network, what: str, asked: str, good: Callable[[Outcome], bool], **change: float | str
    ) -> Row:
        cases = with_change(of_photographs(net, size.photographs), **change)
        return Row(f"{net.title}, {what}", asked, cases, good)

    exact, near = ("no 8-bit value differs", same_pixels), ("≥ 40 dB", at_least(40.0))
    rest = ("no worse than matching in the same time", no_worse_than_matching)
    rows = []
    for net in networks:
        for level in LEVELS:
            asked, good = exact if level <= 1e-5 else near if level <= 1e-4 else rest
            rows.append(row(net, f"noise {level:.0e}", asked, good, noise=level))
        for dtype in ("float16", "bfloat16"):
            rows.append(row(net, dtype, *rest, dtype=dtype))
    notes = (
        "Gaussian noise on every entry of every gradient, its standard deviation relative to the "
        "root mean square of that tensor; or gradients rounded to half precision. The attack is "
        "not told.",
    )
    title = f"Images from noisy and rounded gradients through {what}, 32×32"
    return Table(key, title, rows, notes, factor=1.0)


def _sensitivity(size: Size) -> Table:
    rows = []
    for net in (nets.RESNET18, nets.CIFAR, nets.LENET):
        for what in ("label", "feature"):
            for error in ERRORS:
                cases = with_change(
                    of_photographs(net, size.photographs), **{f"{what}_error": error}
                )
                rows.append(Row(f"{net.title}, {what} {error:.0e}", "–", cases, same_pixels))
    notes = (
        "The gradient is as it was captured; the recovered label, or the recovered feature, gets a "
        "random error of that norm relative to its own before the next stage reads it.",
    )
    return Table("sensitivity", "What an error in label or feature costs, 32×32", rows, notes)
