"""From outcomes to the pages of the image benchmarks."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from common import markdown_table
from image_attack import BASELINES, Outcome
from image_photographs import HELD_OUT
from image_tables import Row, Table
from train_networks import RECIPES, trained

from gradleak.metrics import wilson_interval

COLUMNS = (
    "what",
    "asked",
    "measured",
    "95 % interval",
    "held-out photographs",
    "PSNR, dB: median",
    "worst",
    "seconds: median",
    "worst",
    "said exact",
    "falsely",
)
EACH = (
    "what",
    "picture",
    "PSNR, dB",
    "8-bit values off",
    "label error",
    "condition",
    "seconds",
    "by",
    "verdict",
)
READING = (
    "Every case goes the whole way of a user (capture, recover-label, recover-feature, "
    "reconstruct), with nothing told but the network; float32 gradients unless a row says "
    "otherwise. *Measured* counts the cases that are what was asked of the picture; the times "
    "stand beside it, wall clock of all three stages of the attack. PSNR is of the float picture, "
    "of a batch its worst sample; inf means bit for bit, none that not every sample has a picture. "
    "*Said exact* counts the verdicts `unique`, *falsely* those with an 8-bit value that differs. "
    "Every case has another initialisation (where not trained) and another label: smooth, hard and "
    "mixed in turn.",
    "",
    f"Held-out photographs ({', '.join(HELD_OUT)}) were kept for these pages: "
    "no attack was tuned on one.",
)


def page(table: Table, done: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Return the blocks of a table's page; rows without outcomes are named as not run."""
    rows = [row for row in table.rows if done.get(row.name)]
    missing = [row.name for row in table.rows if not done.get(row.name)]
    blocks = [list(READING), list(table.notes), _partial(table, done, missing)]
    blocks.append(markdown_table(COLUMNS, [summary(row, done[row.name]) for row in rows]))
    beside = [line for row in rows for line in _baselines(row.name, done[row.name])]
    if beside:
        when = "the attack's own time" if table.factor == 1 else f"{table.factor:g} × its time"
        blocks += [
            [f"## Matching beside it: at most {when} on the same case, label as recovered"],
            markdown_table(
                (
                    "what",
                    "method",
                    "cases",
                    "PSNR, dB: median",
                    "best",
                    "of ours",
                    "seconds: median",
                ),
                beside,
            ),
        ]
    maps = [
        [row.name, *_maps(done[row.name])] for row in rows if any(o.maps for o in done[row.name])
    ]
    if maps:
        head = ("what", "maps recovered", "exact", "worst error of one", "stopped by")
        blocks += [["## Feature maps"], markdown_table(head, maps)]
    blocks += [["## Not what was asked"], _failures(rows, done), _networks(table)]
    every = [line for row in rows for line in _cases(row, done[row.name])]
    return [*blocks, ["## Every case"], markdown_table(EACH, every)]


def summary(row: Row, outcomes: Sequence[Outcome]) -> list[str]:
    """Return a row's line: how many are what was asked, how good and how fast they are."""
    good = [row.good(o) for o in outcomes]
    low, high = wilson_interval(sum(good), len(good))
    held = [row.good(o) for o in outcomes if o.held_out]
    seconds = sorted(o.seconds for o in outcomes)
    levels = sorted(_order(o.picture.psnr) for o in outcomes)
    return [
        row.name,
        row.asked,
        f"{sum(good)} of {len(good)}",
        f"{low:.0%} – {high:.0%}",
        f"{sum(held)} of {len(held)}" if held else "–",
        decibels(statistics.median(levels)),
        decibels(levels[0]),
        f"{statistics.median(seconds):.2g}"
        if seconds[-1] < 10
        else f"{statistics.median(seconds):.0f}",
        f"{seconds[-1]:.2g}" if seconds[-1] < 10 else f"{seconds[-1]:.0f}",
        str(sum(o.exact for o in outcomes)),
        str(sum(o.exact and o.picture.differing > 0 for o in outcomes)),
    ]


def grouped_reasons(outcomes: Sequence[Outcome]) -> list[tuple[int, str]]:
    """Count the reasons of outcomes, those that differ in numbers alone as one."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        reason = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?%?", "…", outcome.reason)
        if not reason and outcome.picture.differing == 0:
            reason = "every 8-bit value right, the PSNR below what was asked"
        found[reason or "every stage certain, and the picture another"] += 1
    return [(count, reason) for reason, count in found.most_common()]


def decibels(value: float) -> str:
    """Write a PSNR; none for a picture that is not there."""
    if math.isnan(value) or value == -math.inf:
        return "none"
    return "inf" if value == math.inf else f"{value:.1f}"


def line(outcome: Outcome) -> str:
    """Return an outcome in one line, for whoever watches."""
    stages = ", ".join(f"{name} {s.seconds:.1f}" for name, s in outcome.attack.stages.items())
    beside = "".join(f"; {n} {decibels(p.psnr)} dB" for n, (p, _) in outcome.baselines.items())
    return (
        f"{outcome.name}: {decibels(outcome.picture.psnr)} dB, {outcome.picture.differing} "
        f"of {outcome.picture.total} off, {stages} s, {outcome.attack.method}"
        f"{'; ' + outcome.reason if outcome.reason else ''}{beside}"
    )


def _order(psnr: float) -> float:
    return -math.inf if math.isnan(psnr) else psnr


def _partial(
    table: Table, done: Mapping[str, Sequence[Outcome]], missing: Sequence[str]
) -> list[str]:
    """Say what of the table was not run."""
    short = [
        f"{row.name} ({len(done[row.name])} of {len(row.cases)} cases)"
        for row in table.rows
        if 0 < len(done.get(row.name, ())) < len(row.cases)
    ]
    lines = [f"- rows not run: {'; '.join(missing)}"] if missing else []
    lines += [f"- rows cut short: {'; '.join(short)}"] if short else []
    return ["A partial run:", "", *lines] if lines else []


def _baselines(name: str, outcomes: Sequence[Outcome]) -> list[list[str]]:
    lines = []
    for method in BASELINES:
        found = [(o, *o.baselines[method]) for o in outcomes if method in o.baselines]
        if found:
            levels = [_order(picture.psnr) for _, picture, _ in found]
            ours = [_order(o.picture.psnr) for o, _, _ in found]
            lines.append(
                [
                    name,
                    method,
                    str(len(found)),
                    decibels(statistics.median(levels)),
                    decibels(max(levels)),
                    decibels(statistics.median(ours)),
                    f"{statistics.median(seconds for _, _, seconds in found):.1f}",
                ]
            )
    return lines


def _maps(outcomes: Sequence[Outcome]) -> list[str]:
    scores = [o.maps for o in outcomes if o.maps is not None]
    stops = Counter(s.barriers[0].split(":")[0] if s.barriers else "nothing" for s in scores)
    return [
        f"{sum(s.recovered for s in scores)} of {sum(s.layers for s in scores)}",
        str(sum(s.exact for s in scores)),
        f"{max(s.worst for s in scores):.0e}",
        ", ".join(f"{name} ({count})" for name, count in stops.most_common()),
    ]


def _failures(rows: Sequence[Row], done: Mapping[str, Sequence[Outcome]]) -> list[str]:
    lines = []
    for row in rows:
        for count, reason in grouped_reasons([o for o in done[row.name] if not row.good(o)]):
            lines.append(f"- {row.name}: {count} × {reason}")
    return lines or ["Nothing."]


def _networks(table: Table) -> list[str]:
    names = {case.network.name for row in table.rows for case in row.cases} & RECIPES.keys()
    lines = []
    for name in sorted(names):
        made = trained(name)
        lines.append(f"- {name}: {made.accuracy:.1%} of the held-out {made.task} named right")
    return ["## Trained networks", "", *lines] if lines else []


def _cases(row: Row, outcomes: Sequence[Outcome]) -> list[list[str]]:
    return [
        [
            row.name,
            o.name,
            decibels(o.picture.psnr),
            f"{o.picture.differing} of {o.picture.total}",
            f"{o.label_error:.0e}",
            f"{o.condition:.0e}",
            " + ".join(f"{s.seconds:.2f}" for s in o.attack.stages.values()),
            o.attack.method,
            o.reason.replace("|", "\\|") or "exact",
        ]
        for o in outcomes
    ]
