"""The paper's own search on a part of the cases, beside the scale search in the same run.

The paper's method must be told the family; it knows ``smooth`` and ``mixup``. Hard labels are given
to it as smooth, and mixup+smooth as mixup, whose loss does not see a base. Its answer is read off
where it stopped, raw, without any later correction, and is compared with the truth.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import markdown_table
from torch import Tensor

from gradleak.labels.paper import PaperFailure, search_gradient
from gradleak.labels.paper_search import SUPPORTS, PaperOptions, RowProblem, Search
from gradleak.labels.single import recover_single
from gradleak.metrics import wilson_interval
from heads.cases import Case
from heads.identifiable import Judgement
from heads.outcomes import EXACT

LOOSE = 1e-3
TOLD = {"hard": "smooth", "smooth": "smooth", "mixup": "mixup", "mixup+smooth": "mixup"}
# Its λ within this of the truth, relatively, is in the right valley.
_SAME_VALLEY = 0.05
_TRIVIAL = 0.5


@dataclass(frozen=True)
class Comparison:
    """Both methods on one gradient: largest label errors and seconds; ``failure`` is the paper's.

    ``stage`` is what found the paper's answer: ``walk``, ``swarm`` or ``none``.
    """

    group: str
    family: str
    identifiable: bool
    paper_error: float
    paper_seconds: float
    failure: str
    stage: str
    own_error: float
    own_verdict: str
    own_seconds: float


def compare(case: Case, judgement: Judgement, seed: int) -> Comparison:
    """Run both methods on one gradient, each alone and timed alone."""
    source, told = case.source, TOLD[case.family]
    start = time.perf_counter()
    own = recover_single(case.gradient, source.weight, bias=source.bias)
    own_seconds = time.perf_counter() - start
    start = time.perf_counter()
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        problem, found = search_gradient(
            case.gradient, source.weight, source.bias, told, PaperOptions(), dice
        )
    paper_seconds = time.perf_counter() - start
    label = problem.labels(torch.tensor([found.scale], dtype=torch.float64))[0]
    error = math.nan if found.stage is None else float((label - case.label).abs().max())
    return Comparison(
        source.group,
        case.family,
        judgement.identifiable,
        error,
        paper_seconds,
        "" if error <= LOOSE else failure(case, problem, found, label, SUPPORTS[told]).value,
        found.stage or "none",
        math.nan if own.labels is None else float((own.labels[0] - case.label).abs().max()),
        own.verdict,
        own_seconds,
    )


def failure(
    case: Case, problem: RowProblem, found: Search, label: Tensor, support: int
) -> PaperFailure:
    """Say how the paper's search went wrong, knowing the truth."""
    if found.stage is None:
        return PaperFailure.ESCAPED if found.escaped == 2 else PaperFailure.NOT_CONVERGED
    rest = label < label.topk(support).values[-1]
    delta = problem.ratio / found.scale
    if float(label[rest].var()) >= _TRIVIAL * float(delta[rest].var()):
        return PaperFailure.TRIVIAL_ZERO
    true = float(problem.row @ case.feature.double() / (problem.row @ problem.row))
    near = abs(found.scale / true - 1.0) < _SAME_VALLEY
    return PaperFailure.STOPPED_SHORT if near else PaperFailure.FALSE_MINIMUM


FAILURES = [kind for kind in PaperFailure if kind is not PaperFailure.WRONG_FAMILY]
COLUMNS = (
    "head, label",
    "n",
    f"paper: within {LOOSE:g}",
    "95 % interval",
    f"paper: within {EXACT:g}",
    f"scale search: within {EXACT:g}",
    "95 % interval",
    "paper: median s",
    "95th percentile s",
    "scale search: median s",
    "ratio of medians",
    *(kind.value for kind in FAILURES),
)


def paper_table(found: Sequence[Comparison]) -> list[str]:
    """Return success, failures and times of both methods by head and label, the identifiable."""
    found = [c for c in found if c.identifiable]
    rows = []
    for group in dict.fromkeys(c.group for c in found):
        mine = [c for c in found if c.group == group]
        for family in TOLD:
            part = [c for c in mine if c.family == family]
            if part:
                rows.append(_row(f"{group}, {family}", part))
        rows.append(_row(f"**{group}**", mine))
    rows.append(_row("**all**", found))
    known = [c for c in found if c.family != "mixup+smooth"]
    rows.append(_row("**all but mixup+smooth**", known))
    return markdown_table(COLUMNS, rows)


def _row(name: str, found: Sequence[Comparison]) -> list[str]:
    loose = sum(c.paper_error <= LOOSE for c in found)
    own = sum(c.own_error <= EXACT and c.own_verdict == "unique" for c in found)
    theirs = sorted(c.paper_seconds for c in found)
    ours = sorted(c.own_seconds for c in found)
    kinds = Counter(c.failure for c in found)
    middle, ours_middle = theirs[len(theirs) // 2], ours[len(ours) // 2]
    return [
        name,
        str(len(found)),
        str(loose),
        _interval(loose, len(found)),
        str(sum(c.paper_error <= EXACT for c in found)),
        str(own),
        _interval(own, len(found)),
        f"{middle:.2f}",
        f"{theirs[int(0.95 * (len(theirs) - 1))]:.1f}",
        f"{ours_middle:.4f}",
        f"{middle / ours_middle:.0f}",
        *(str(kinds[kind.value]) for kind in FAILURES),
    ]


def _interval(successes: int, count: int) -> str:
    low, high = wilson_interval(successes, count)
    return f"{100 * low:.1f}–{100 * high:.1f}"


def stages(found: Sequence[Comparison]) -> str:
    """Say which part of the paper's search accepted its answers."""
    counts = Counter(c.stage for c in found if c.identifiable)
    parts = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    return f"What accepted the paper's answers, right or wrong: {parts}."
