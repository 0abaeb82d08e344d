"""Labels and features of whole batches from the gradient of the head, bias gradient withheld."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from batch_cases import FAMILIES, PRETRAINED, RANDOM, Batch, Case, bank_of, build_bank, draw
from common import Run, markdown_table, this_command, write_result

from gradleak.errors import InputError
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.metrics import match_samples, wilson_interval

SAMPLES, CLASSES, HEADS = (2, 4, 8, 16, 24, 32), (100, 1000), (RANDOM, PRETRAINED)
SMALL_SAMPLES, SMALL_CLASSES = (2, 3, 4, 5, 6, 7, 8), 10
LABEL, FEATURE = 1e-3, 1e-4
# Draws before this one were looked at while the method was built.
FIRST = 1000


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: ``found`` samples right, the worst errors of those, and the time."""

    case: Case
    verdict: str
    reason: str
    families: bool
    found: int
    label_error: float
    feature_error: float
    seconds: float

    @property
    def whole(self) -> bool:
        """Every sample's label and feature is right, and the tool says so."""
        return self.verdict == "unique" and self.found == self.case.samples

    @property
    def false(self) -> bool:
        """A certificate for a batch with a wrong label."""
        return self.verdict == "unique" and not self.label_error <= LABEL

    def __str__(self) -> str:
        case = self.case
        return (
            f"{case.head}, C = {case.classes}, N = {case.samples}, {case.family}, draw "
            f"{case.seed}: {self.found} right; {self.verdict} ({self.reason}); errors "
            f"{self.label_error:.1e} of a label, {self.feature_error:.1e} of a feature"
        )


def attack(bank: Path, case: Case) -> Outcome:
    """Recover one batch and compare it with the truth."""
    torch.set_num_threads(1)
    batch = draw(case, bank_of(bank))
    start = time.perf_counter()
    try:
        result = recover_single(batch.grad_weight, batch.weight, bias=batch.bias)
    except InputError as error:
        return Outcome(case, "refused", str(error), False, 0, math.nan, math.nan, math.nan)
    seconds = time.perf_counter() - start
    found, label_error, feature_error = _compare(result, batch)
    families = all(sample.family == case.family for sample in result.samples)
    return Outcome(
        case, result.verdict, result.reason, families, found, label_error, feature_error, seconds
    )


def _compare(result: LabelResult, batch: Batch) -> tuple[int, float, float]:
    """Count the samples that are right; of a complete answer, the largest errors of all."""
    if result.labels is None or result.features is None:
        return 0, math.nan, math.nan
    true = batch.features.double()
    size = true.norm(dim=1)
    label = torch.cdist(batch.labels, result.labels, p=torch.inf)
    feature = torch.cdist(true, result.features.double()) / size[:, None]
    right = int(((label <= LABEL) & (feature <= FEATURE)).any(1).sum())
    if len(result.labels) != len(batch.labels):
        return right, math.nan, math.nan
    # Two samples of one class have the same label: their features tell them apart.
    order = match_samples(
        torch.cat([result.labels, result.features / size.mean()], 1),
        torch.cat([batch.labels, true / size.mean()], 1),
    )
    every = torch.arange(len(order))
    return right, float(label[every, order].max()), float(feature[every, order].max())


def cases(first: int, draws: int, small: int, samples: Sequence[int]) -> Iterator[Case]:
    """Yield every case of the tables, draw by draw, so that an early end leaves all cells."""
    for seed in range(first, first + max(draws, small)):
        if seed < first + draws:
            for cell in itertools.product(HEADS, CLASSES, samples, FAMILIES):
                yield Case(*cell, seed)
        if seed < first + small:
            for n, family in itertools.product(SMALL_SAMPLES, FAMILIES):
                yield Case(RANDOM, SMALL_CLASSES, n, family, seed)


COLUMNS = (
    "head, C, N",
    *FAMILIES,
    "samples found",
    "worst label error",
    "worst feature error",
    "false",
    "median s",
    "slowest s",
)


def row(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Return one row: batches recovered whole out of all, by family, and the figures of all."""
    each = []
    for family in FAMILIES:
        mine = [o for o in outcomes if o.case.family == family]
        each.append(f"{sum(o.whole for o in mine)}/{len(mine)}")
    whole = [o for o in outcomes if o.whole]
    times = sorted(o.seconds for o in outcomes if not math.isnan(o.seconds)) or [math.nan]
    return [
        name,
        *each,
        f"{sum(o.found for o in outcomes)}/{sum(o.case.samples for o in outcomes)}",
        f"{max((o.label_error for o in whole), default=math.nan):.1e}",
        f"{max((o.feature_error for o in whole), default=math.nan):.1e}",
        str(sum(o.false for o in outcomes)),
        f"{times[len(times) // 2]:.2f}",
        f"{times[-1]:.1f}",
    ]


POOLED = ("pooled", "batches", "recovered whole", "95 % interval", "asked")


def pooled(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return the rows of the percentages that are asked for."""
    soft = ("smooth", "mixup", "mixup+smooth")
    up_to_16 = [o for o in outcomes if o.case.samples <= 16]
    larger = [o for o in outcomes if o.case.samples > 16]
    pairs = [o for o in outcomes if o.case.samples == 32 and o.case.family in soft]
    rows = []
    for name, mine, asked in (
        ("N ≤ 16", up_to_16, "≥ 99 %"),
        ("N ≤ 32", outcomes, "≥ 95 %"),
        ("16 < N ≤ 32", larger, "–"),
        ("N = 32, smoothed and mixed labels", pairs, "≥ 90 %"),
    ):
        count = sum(o.whole for o in mine)
        low, high = wilson_interval(count, len(mine))
        share = f"{count}/{len(mine)} = {count / max(1, len(mine)):.1%}"
        rows.append([name, str(len(mine)), share, f"{low:.1%} – {high:.1%}", asked])
    return rows


def tables(outcomes: Sequence[Outcome], run: Run) -> None:
    """Write the result."""
    large = [o for o in outcomes if o.case.classes != SMALL_CLASSES]
    cells: dict[str, list[Outcome]] = {}
    for o in sorted(
        large, key=lambda o: (HEADS.index(o.case.head), o.case.classes, o.case.samples)
    ):
        cells.setdefault(f"{o.case.head}, {o.case.classes}, {o.case.samples}", []).append(o)
    small: dict[str, list[Outcome]] = {}
    for o in sorted(outcomes, key=lambda o: o.case.samples):
        if o.case.classes == SMALL_CLASSES:
            small.setdefault(f"{o.case.head}, {SMALL_CLASSES}, {o.case.samples}", []).append(o)
    wrong_family = sum(o.whole and not o.families for o in outcomes)
    missed = [o for o in large if not o.whole]
    reasons = Counter(
        f"{o.case.samples} of {o.case.family}: {o.verdict}"
        for o in outcomes
        if o.case.classes == SMALL_CLASSES and not o.whole
    )
    write_result(
        "labels_batch",
        "Labels and features of batches",
        run,
        [
            [
                "The gradient of the head's weight alone, float32; neither families nor the number "
                "of samples told. Features are those of EfficientNet-Lite0 on crops of real "
                "photographs; random heads are fresh Linear layers on it, pretrained ones its own "
                "(for 100 classes, as many of its rows). Classes repeat within a batch. A batch "
                "counts when the verdict is `unique`, every label is right to "
                f"{LABEL:.0e} and every feature to {FEATURE:.0e}; `false` counts `unique` verdicts "
                "with a label further off. Times are of one thread, solve only.",
                "",
                f"Of the batches recovered whole, {wrong_family} name a family of a sample that is "
                "not the one it was drawn from (a weight too small to be seen).",
            ],
            markdown_table(POOLED, pooled(large)),
            ["## Every cell: batches recovered whole"],
            markdown_table(COLUMNS, [row(name, mine) for name, mine in cells.items()]),
            ["## Batches not recovered whole", "", *(f"- {o}" for o in missed)],
            [
                f"## C = {SMALL_CLASSES}",
                "",
                "Sample by sample there are more equations than unknowns while C > 2N + q, q the "
                "parameters of a label; the batch as a whole allows N ≤ C − 1 − q.",
            ],
            markdown_table(COLUMNS, [row(name, mine) for name, mine in small.items()]),
            [
                "Not recovered whole:",
                "",
                *(f"- {count} × {what}" for what, count in reasons.items()),
            ],
        ],
    )


def main() -> None:
    """Run the table; ``--draws`` batches a cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20, help="batches a cell (default 20)")
    parser.add_argument("--first", type=int, default=FIRST, help="number of the first draw")
    parser.add_argument("--small", type=int, default=4, help="batches a cell at C = 10")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="N of the table")
    parser.add_argument("--bank", type=int, default=320, help="photograph crops in the bank")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--minutes", type=float, default=170.0, help="stop after so many")
    chosen = parser.parse_args()
    run = Run(this_command())
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "bank.pt"
        build_bank(bank, chosen.bank)
        todo = list(cases(chosen.first, chosen.draws, chosen.small, chosen.samples))
        with ProcessPoolExecutor(chosen.workers) as pool:
            for done in pool.map(partial(attack, bank), todo):
                outcomes.append(done)
                if not done.whole:
                    print(done, flush=True)
                if len(outcomes) % 96 == 0:
                    print(f"{len(outcomes)} of {len(todo)}, {run.seconds:.0f} s", flush=True)
                    tables(outcomes, run)
                if run.seconds > 60.0 * chosen.minutes:
                    pool.shutdown(cancel_futures=True)
                    break
    tables(outcomes, run)


if __name__ == "__main__":
    main()
