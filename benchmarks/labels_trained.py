"""Labels of single samples at trained, pretrained, untrained and random heads, bias withheld.

10 000 float32 gradients; the family is not told. A referee that knows the truth says which labels
the gradient determines; the paper's own search runs on a part of them, in the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from common import Run, this_command, write_result
from heads.cases import Case, cases
from heads.identifiable import DETERMINED, DIFFERENT, FITS, OPEN, Judgement, Truth, judge
from heads.outcomes import (
    EXACT,
    SIGMAS,
    Outcome,
    agreement,
    by_family,
    by_source,
    conditions,
    outcome,
)
from heads.paper import LOOSE, Comparison, compare, paper_table, stages
from heads.sources import Source, sources

from gradleak.labels.single import recover_singles

# Gradients of every family and choice of classes, by group of heads; 10 064 in all.
EACH = {"trained": 125, "pretrained": 64, "untrained": 64, "random": 24}
# Share of the time for the paper's search that a group of heads may take.
PAPER_SHARE = {"trained": 0.4, "pretrained": 0.3, "untrained": 0.15, "random": 0.15}
_BATCH, _PAPER_EACH = 16, 12


def attack(source: Source, each: int, seed: int) -> Iterator[tuple[Case, Outcome]]:
    """Draw the cases of a source, let the referee judge them and the solver solve them."""
    for _, cell in groupby(cases(source, each, seed), key=lambda c: (c.family, c.choice)):
        drawn = list(cell)
        for first in range(0, len(drawn), _BATCH):
            part = drawn[first : first + _BATCH]
            gradients = torch.stack([case.gradient for case in part])
            start = time.perf_counter()
            answers = recover_singles(gradients, source.weight, bias=source.bias)
            seconds = (time.perf_counter() - start) / len(part)
            for case, answer in zip(part, answers, strict=True):
                yield case, outcome(case, referee(case), answer, seconds)


def referee(case: Case) -> Judgement:
    """Judge whether the gradient of a case determines its label."""
    source = case.source
    truth = Truth.of(case.gradient, case.feature, case.label, source.weight, source.bias)
    return judge(truth, case.family)


def compared(kept: Sequence[tuple[Case, Judgement]], seconds: float) -> list[Comparison]:
    """Run both methods on the kept cases of a source, a round of its cells at a time.

    Ends when the time is up: the rounds make what was reached even over the cells.
    """
    cells: dict[tuple[str, str], list[tuple[Case, Judgement]]] = {}
    for case, judgement in kept:
        cells.setdefault((case.family, case.choice), []).append((case, judgement))
    end = time.perf_counter() + seconds
    found: list[Comparison] = []
    for turn in range(_PAPER_EACH):
        for members in cells.values():
            if turn < len(members) and (turn == 0 or time.perf_counter() < end):
                found.append(compare(*members[turn], seed=turn))
    return found


def explanation() -> list[str]:
    """Say what was done and how the columns are to be read."""
    return [
        "One sample a gradient, float32, by autograd on the head, at the feature that the network "
        "itself (float32, eval mode) computes from a digit or a photograph. α ~ U(0, 0.5), "
        "λ ~ U(0, 1); for mixup the two images are mixed as well. Classes are random, or those "
        "that the network predicts, where the softmax is saturated. The family is not told, the "
        "bias gradient withheld (untrained heads have no bias, as in the paper).",
        "",
        "*Identifiable* is a referee's word, not the solver's. It knows the truth, works in "
        "float64 on the given gradient, and shares no code with the solver. Its equations are "
        "softmax(r W x + b) − δ/r = y, r = 1 at the truth, δ = G x / ‖x‖²; its rounding of y is "
        "u √((1 + max|z| (1 − p))² p² + δ² + y²), u = 2⁻²⁴. It asks four things. Is an equation "
        "left over? Is the label's standard error within its own family, from the weighted "
        f"Jacobian over log r and the label's parameters, at most {DETERMINED:g}? With one more "
        "class in the support, would log r still be known to better than "
        f"{OPEN:g} (where it is not, because the softmax is saturated at that class, every label "
        "of the larger family has a double in the smaller)? Does no other label of a family with "
        f"as few parameters, more than {DIFFERENT:g} away, fit within {FITS:g} roundings (root "
        "mean square) at any r of either sign, on a scan of its own?",
        "",
        f"*Right*: verdict `unique`, no class off by more than {EXACT:g}. *Imprecise*: `unique`, "
        f"off by more, but within {SIGMAS:g} of the standard errors that the answer states. "
        "*Wrong*: any other `unique`. *Family right* counts among the right. *Worst label error* "
        "is over the identifiable; ms are the median per gradient in batches of up to 16.",
    ]


def report(outcomes: Sequence[Outcome], notes: Sequence[str]) -> list[list[str]]:
    """Return the blocks of the report on the solver."""
    found = sum(o.judgement.found for o in outcomes)
    misfits = sorted(o.judgement.misfit for o in outcomes)
    odd = [o for o in outcomes if o.kind == "wrong" or (o.judgement.identifiable and not o.right)]
    loose = [o for o in outcomes if o.kind == "imprecise"]
    return [
        ["## By head"],
        by_source(outcomes),
        ["## By label"],
        by_family(outcomes),
        ["## The referee and the solver"],
        agreement(outcomes),
        conditions(outcomes),
        [
            f"The referee's model of rounding against the rounding itself: root mean square of "
            f"the true residual over it, median {misfits[len(misfits) // 2]:.2f}, 99th percentile "
            f"{misfits[int(0.99 * (len(misfits) - 1))]:.2f}, largest {misfits[-1]:.2f}. Its scan "
            f"for other labels met the true one, as it must, in {found} of {len(outcomes)}."
        ],
        ["Identifiable and not right, or wrong:", "", *(f"- {o}" for o in odd)]
        if odd
        else ["Every identifiable label is right, and no unique answer is wrong."],
        ["Imprecise, as stated by the answers themselves:", "", *(f"- {o}" for o in loose)]
        if loose
        else [],
        ["## The networks"],
        list(notes),
    ]


def paper_report(found: Sequence[Comparison]) -> list[list[str]]:
    """Return the blocks of the report on the paper's method."""
    return [
        ["## The paper's method beside it"],
        [
            "`--method paper` (arXiv 2402.03124, vectorised, its published settings, factor 1) on "
            "a part of the same cases, those that are identifiable, both methods on one core in "
            "the same run, one gradient a call. The paper's method is told the family: `smooth` "
            "for hard and smooth, `mixup` for mixup; mixup+smooth, which it does not know, is "
            "given as `mixup`, whose loss is blind to a base. Its label is y(λ) as it stands where "
            f"the search stopped, compared with the truth. Failures are those outside {LOOSE:g}: "
            "no loss below its tolerance (`trivial zero at infinity` when both walks ran off to "
            "|λ| > 100 first, else `not converged`), a small loss only because the gradient's "
            "share vanished (`trivial zero accepted`), within 5 % of the right λ (`stopped "
            "short`), or elsewhere (`false minimum accepted`). The scale search is not told the "
            "family."
        ],
        paper_table(found),
        [stages(found)],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the 10 064 gradients")
    parser.add_argument("--seed", type=int, default=0, help="of the labels and images drawn")
    parser.add_argument(
        "--paper-seconds", type=float, default=840.0, help="for the paper's method; 0: leave it out"
    )
    parser.add_argument("--head", help="only heads whose name contains this; nothing written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = Run(this_command())
    outcomes: list[Outcome] = []
    comparisons: list[Comparison] = []
    notes: list[str] = []
    spent = 0.0
    members = {"trained": 6, "pretrained": 2, "untrained": 6, "random": 16}
    for source in sources():
        if options.head and options.head not in source.name:
            continue
        each = max(1, round(EACH[source.group] * options.share))
        kept: list[tuple[Case, Judgement]] = []
        mine = []
        for case, found in attack(source, each, options.seed):
            mine.append(found)
            kept.append((case, found.judgement))
            if sum(c.family == case.family and c.choice == case.choice for c, _ in kept) > 12:
                kept.pop()
        outcomes += mine
        notes += [f"- {source.name}: {source.note}."] if source.note else []
        if options.paper_seconds > 0:
            start = time.perf_counter()
            allowed = options.paper_seconds * PAPER_SHARE[source.group] / members[source.group]
            comparisons += compared(kept, allowed)
            spent += time.perf_counter() - start
        bad = sum(o.judgement.identifiable and not o.right for o in mine)
        print(
            f"{source.name}: {len(mine)} gradients, identifiable and not right {bad}, wrong "
            f"{sum(o.wrong for o in mine)}, imprecise {sum(o.imprecise for o in mine)} "
            f"({run.seconds:.0f} s, of them the paper's method {spent:.0f} s)",
            flush=True,
        )
        for o in mine:
            if o.wrong or (o.judgement.identifiable and not o.right):
                print("   ", o, flush=True)
    blocks = [explanation(), *report(outcomes, notes)]
    if comparisons:
        blocks += paper_report(comparisons)
    if options.head or options.share < 1.0:
        print("\n\n".join("\n".join(block) for block in blocks[1:]))
    else:
        print(write_result("labels_trained", "Labels at trained heads", run, blocks))
    if any(o.wrong for o in outcomes):
        sys.exit("a confident answer was wrong")


if __name__ == "__main__":
    main()
