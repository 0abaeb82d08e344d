"""What the solver made of each gradient, set beside what the referee says of it, as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common import markdown_table

from gradleak.errors import GradleakError
from gradleak.labels.verdict import LabelResult
from gradleak.metrics import label_errors, wilson_interval
from heads.cases import FAMILIES, Case
from heads.identifiable import Judgement

EXACT = 1e-5
SIGMAS = 6.0


@dataclass(frozen=True)
class Outcome:
    """One gradient: the referee's judgement, the solver's answer, and its distance from the truth.

    ``label_error`` is the largest absolute error of a class, nan without an answer; ``stated`` the
    answer's own standard error; ``verdict`` the solver's own, or ``refused``.
    """

    source: str
    group: str
    family: str
    choice: str
    judgement: Judgement
    verdict: str
    reason: str
    found: str | None
    label_error: float
    stated: float
    seconds: float

    @property
    def right(self) -> bool:
        """The solver says that the label is the only one, and it is right."""
        return self.verdict == "unique" and self.label_error <= EXACT

    @property
    def imprecise(self) -> bool:
        """Not right to that precision, but no further off than it says."""
        unique = self.verdict == "unique" and not self.right
        return unique and self.label_error <= SIGMAS * self.stated

    @property
    def wrong(self) -> bool:
        """Stated with confidence, and false."""
        return self.verdict == "unique" and not self.right and not self.imprecise

    @property
    def kind(self) -> str:
        """What became of it, in a few words."""
        if self.verdict != "unique":
            return self.verdict
        return "right" if self.right else "imprecise" if self.imprecise else "wrong"

    def __str__(self) -> str:
        judged = "identifiable" if self.judgement.identifiable else self.judgement.reason
        return (
            f"{self.source}, {self.family}, {self.choice} classes: {judged} (standard error "
            f"{self.judgement.error:.1e}); {self.verdict} ({self.reason}); found {self.found}, "
            f"label error {self.label_error:.1e}, stated {self.stated:.1e}"
        )


def outcome(
    case: Case, judgement: Judgement, answer: LabelResult | GradleakError, seconds: float
) -> Outcome:
    """Compare the solver's answer with the truth of a case."""
    verdict, reason, found, error, stated = "refused", str(answer), None, math.nan, math.nan
    if isinstance(answer, LabelResult):
        verdict, reason, found = answer.verdict, answer.reason, answer.family
        if answer.labels is not None:
            error = label_errors(answer.labels, case.label[None]).max_error[0]
            stated = answer.samples[0].uncertainty()
    return Outcome(
        case.source.name,
        case.source.group,
        case.family,
        case.choice,
        judgement,
        verdict,
        reason,
        found,
        error,
        stated,
        seconds,
    )


COLUMNS = (
    "head, label",
    "n",
    "identifiable",
    "of them right",
    "95 % interval",
    "worst label error",
    "right, all",
    "imprecise",
    "wrong",
    "ambiguous",
    "unidentifiable",
    "failed",
    "family right",
    "ms",
)


def summary(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Return one row of the table."""
    sure = [o for o in outcomes if o.judgement.identifiable]
    right = sum(o.right for o in sure)
    low, high = wilson_interval(right, len(sure)) if sure else (math.nan, math.nan)
    kinds = Counter(o.kind for o in outcomes)
    worst = max((o.label_error for o in sure if o.verdict == "unique"), default=math.nan)
    named = [o for o in outcomes if o.right]
    times = sorted(o.seconds for o in outcomes)
    return [
        name,
        str(len(outcomes)),
        str(len(sure)),
        f"{right} ({100 * right / max(1, len(sure)):.2f} %)",
        f"{100 * low:.2f}–{100 * high:.2f}",
        f"{worst:.1e}",
        str(kinds["right"]),
        *(str(kinds[k]) for k in ("imprecise", "wrong", "ambiguous", "unidentifiable")),
        str(kinds["failed"] + kinds["refused"]),
        f"{sum(o.found == o.family for o in named)} of {len(named)}",
        f"{1e3 * times[len(times) // 2]:.1f}",
    ]


def by_source(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table by head, groups summed up, everything last."""
    rows = []
    for group in dict.fromkeys(o.group for o in outcomes):
        mine = [o for o in outcomes if o.group == group]
        for name in dict.fromkeys(o.source for o in mine):
            rows.append(summary(name, [o for o in mine if o.source == name]))
        rows.append(summary(f"**{group} heads**", mine))
    rows.append(summary("**all**", outcomes))
    return markdown_table(COLUMNS, rows)


def by_family(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table by trained, pretrained, … heads, classes and family."""
    rows = []
    for group in dict.fromkeys(o.group for o in outcomes):
        for choice in ("random", "predicted"):
            for family in FAMILIES:
                mine = [
                    o for o in outcomes if (o.group, o.choice, o.family) == (group, choice, family)
                ]
                if mine:
                    rows.append(summary(f"{group}, {choice} classes, {family}", mine))
    return markdown_table(COLUMNS, rows)


KINDS = ("right", "imprecise", "wrong", "ambiguous", "unidentifiable", "failed", "refused")


def agreement(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the referee's judgement against the solver's verdict."""
    judged: dict[str, Counter[str]] = {"identifiable": Counter()}
    for o in outcomes:
        name = "identifiable" if o.judgement.identifiable else o.judgement.reason
        judged.setdefault(name, Counter())[o.kind] += 1
    rows = [
        [name, *(str(counts[kind]) for kind in KINDS)]
        for name, counts in judged.items()
        if counts.total()
    ]
    return markdown_table(("the referee", *(f"solver: {kind}" for kind in KINDS)), rows)


def conditions(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what the solver makes of labels by their standard error, decade by decade."""
    edges = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, math.inf]
    rows = []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        if high is None:
            mine, name = [o for o in outcomes if math.isinf(o.judgement.error)], "infinite"
        else:
            mine = [o for o in outcomes if low <= o.judgement.error < high]
            name = f"{low:g} to {high:g}" if high < math.inf else f"above {low:g}"
        if not mine:
            continue
        counts = Counter(o.kind for o in mine)
        unique = [o for o in mine if o.verdict == "unique"]
        covered = sum(o.label_error <= max(1e-7, SIGMAS * o.stated) for o in unique)
        worst = max((o.label_error for o in unique), default=math.nan)
        rows.append(
            [
                name,
                str(len(mine)),
                *(str(counts[kind]) for kind in KINDS),
                f"{worst:.1e}",
                f"{covered} of {len(unique)}",
            ]
        )
    columns = ("standard error of the label", "n", *(f"solver: {kind}" for kind in KINDS))
    return markdown_table((*columns, "worst unique", f"within {SIGMAS:g} stated errors"), rows)
