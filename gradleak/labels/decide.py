"""From refined candidates to a verdict: the answer, its rivals, or why there is none (§3).

The verdict is about evidence. ``unique``: one family explains the gradient to its own precision
and every other explanation is less plausible by a factor of at least exp(3). ``ambiguous``: a
different label is about as plausible. ``unidentifiable``: the label moves along an interval without
the gradient noticing, or no family applies and any point of an interval would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradleak.labels.checks import allowed_delta_sum
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.refine import Fits, log_evidence
from gradleak.labels.search import scale_grid
from gradleak.labels.verdict import Interval, SampleLabel, Verdict
from gradleak.softlabels import ARBITRARY, Family

# A fit may exceed the noise model by this factor (in standard deviations) before it is no fit.
_ACCEPTABLE = 5.0
# Two explanations whose log evidence differs by less than this are both on the table.
_DECISIVE = 3.0
# Labels closer than this, or than their own uncertainty, are the same answer.
_SAME_LABEL = 1e-5
# A label known less precisely than this is not determined.
_DETERMINED = 0.02
_SIGMAS = 5.0


@dataclass(frozen=True)
class Decision:
    """The verdict on one gradient: the ``answer``, or None."""

    verdict: Verdict
    reason: str
    answer: SampleLabel | None = None
    alternatives: tuple[SampleLabel, ...] = ()
    intervals: tuple[Interval, ...] = ()


def decide(
    problem: ScaleProblem, fits: Fits, table: FamilyTable, *, scale_known: bool = False
) -> list[Decision]:
    """Weigh the candidates of each of the B problems and return one decision per problem."""
    feasible = fits.feasible
    if problem.excess is not None:
        # A scale at which δ does not sum to zero is an answer only where there is no other.
        allowed = allowed_delta_sum(problem.classes, problem.unit)[:, None]
        softmax = feasible & (problem.excess.abs() <= allowed * fits.scale.abs())
        feasible = torch.where(softmax.any(1, keepdim=True), softmax, feasible)
    misfit = torch.where(feasible, fits.chi2 / fits.freedom.clamp(min=1), math.inf)
    inflation = misfit.amin(1).clamp(min=1.0)
    evidence = torch.where(
        feasible & (misfit <= _ACCEPTABLE**2),
        log_evidence(problem, fits, table, inflation.clamp(max=_ACCEPTABLE**2)),
        -math.inf,
    )
    names = [table.families[index] for index in fits.family.tolist()]
    decisions = []
    for b, row in enumerate(_rows(problem, fits, evidence, inflation.sqrt())):
        decision = _choose(row, names, problem.classes, scale_known=scale_known)
        if decision is None:
            decision = without_family(problem, b, table, row.scale[0] if scale_known else None)
        elif decision.verdict == "unidentifiable":
            decision = replace(decision, intervals=simplex_intervals(problem, b))
        decisions.append(decision)
    return decisions


def simplex_intervals(problem: ScaleProblem, index: int) -> tuple[Interval, ...]:
    """Return the intervals of the signed scale for which y(s) stays in the simplex."""
    one = _single(problem, index)
    grid = scale_grid(one)[0]
    grid = torch.cat([0.9 * grid[:1], grid])
    found = []
    for sign in (1.0, -1.0):

        def room(s: Tensor, sign: float = sign) -> Tensor:
            """Return (S,) how far the smallest entry of y(s) is above its lower bound, in |s|."""
            point = one.at(sign * s[None])
            return (s * (point.y + 4.0 * one.variance(point).sqrt()).amin(-1))[0]

        s, value = _with_peaks(grid, room)
        inside = value >= 0
        low_edges = (~inside[:-1] & inside[1:]).nonzero()[:, 0]
        high_edges = (inside[:-1] & ~inside[1:]).nonzero()[:, 0]
        lows = _bisect(room, s[low_edges], s[low_edges + 1])
        highs = _bisect(room, s[high_edges + 1], s[high_edges])
        if bool(inside[0]):
            lows = torch.cat([s[:1], lows])
        if bool(inside[-1]):
            highs = torch.cat([highs, s[-1:]])
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            found.append(Interval(*sorted((sign * low, sign * high))))
    return tuple(found)


def _with_peaks(grid: Tensor, room: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Add to a grid the maximum of ``room`` next to every negative local maximum on it.

    An interval narrower than the grid hides there.
    """
    value = room(grid)
    peak = (value[1:-1] >= value[:-2]) & (value[1:-1] >= value[2:]) & (value[1:-1] < 0.0)
    at = peak.nonzero()[:, 0] + 1
    low, high = grid[at - 1], grid[at + 1]
    for _ in range(40):  # ternary search; room is a minimum of smooth curves
        third = (high - low) / 3.0
        left = room(low + third) >= room(high - third)
        low, high = torch.where(left, low, low + third), torch.where(left, high - third, high)
    s = torch.cat([grid, 0.5 * (low + high)]).sort().values
    return s, room(s)


def _bisect(room: Callable[[Tensor], Tensor], outside: Tensor, inside: Tensor) -> Tensor:
    """Return the edges between points where ``room`` is negative and points where it is not."""
    for _ in range(50):
        middle = 0.5 * (outside + inside)
        good = room(middle) >= 0
        outside, inside = torch.where(good, outside, middle), torch.where(good, middle, inside)
    return inside


def _choose(
    row: _Row, families: Sequence[Family], classes: int, *, scale_known: bool
) -> Decision | None:
    """Decide between the candidates of one problem; None where no family fits."""
    weight = row.evidence
    order = sorted((m for m, w in enumerate(weight) if w > -math.inf), key=lambda m: -weight[m])
    if not order:
        return None
    best = order[0]
    answer = _sample(row, best, families, classes)
    rivals = []
    for other in order[1:]:
        if weight[best] - weight[other] >= _DECISIVE:
            break
        rival = _sample(row, other, families, classes)
        same = _SAME_LABEL + _SIGMAS * math.hypot(answer.uncertainty(), rival.uncertainty())
        open_ended = rival.uncertainty() * _SIGMAS > _DETERMINED
        if open_ended or answer.distance(rival, classes) > same:
            rivals.append(rival)
    if any(s.uncertainty() * _SIGMAS > _DETERMINED for s in (answer, *rivals)):
        return Decision(
            "unidentifiable",
            "the softmax is saturated: at this precision the gradient fits a whole interval of "
            "labels, of which one is shown",
            answer,
            tuple(rivals),
        )
    if rivals:
        return Decision(
            "ambiguous",
            f"{len(rivals) + 1} labels explain the gradient about equally well",
            answer,
            tuple(rivals),
        )
    if scale_known:
        reason = "the bias gradient gives the label in closed form"
    else:
        reason = f"one root of the {answer.family} family fits the gradient to its precision"
    return Decision("unique", reason, answer)


def without_family(
    problem: ScaleProblem, index: int, table: FamilyTable, scale: float | None
) -> Decision:
    """No family explains the gradient: say what is still known; ``scale`` is its, if given."""
    one = _single(problem, index)
    if scale is not None:
        return _closed_form(one, scale)
    intervals = simplex_intervals(problem, index)
    if not intervals:
        return Decision(
            "failed",
            "no scale gives a label in the simplex: the weights are not those the gradient was "
            "taken at, or the loss was scaled",
        )
    widest = max(intervals, key=lambda i: abs(math.log(i.high / i.low)))
    middle = math.copysign(math.sqrt(widest.low * widest.high), widest.low)
    ends = torch.tensor([[widest.low, middle, widest.high]], dtype=one.a.dtype, device=one.a.device)
    labels = one.at(ends).y[0]
    label = labels[1].clamp(min=0.0)
    label = label / label.sum()
    few = problem.classes < table.largest + 3
    why = (
        f"{problem.classes} classes leave too few equations outside the label's support"
        if few
        else "no label family fits: an arbitrary soft label"
    )
    width = 0.5 * (labels[0] - labels[2]).abs()
    return Decision(
        "unidentifiable",
        f"{why}; without a bias gradient every scale in the interval gives a valid label",
        _arbitrary(label, width, middle, 0.5 * abs(widest.high - widest.low)),
        intervals=intervals,
    )


def _closed_form(one: ScaleProblem, scale: float) -> Decision:
    """The scale is known and the label is its own family: any point of the simplex."""
    point = one.at(torch.full_like(one.sigma, scale)[:, None])
    label, error = point.y[0, 0], one.variance(point)[0, 0].sqrt()
    if bool((label < -20.0 * error - 1e-6).any()):
        return Decision(
            "failed",
            f"the closed form leaves the simplex (smallest entry {float(label.min()):.2g}): the "
            "weights are not those of the gradient, or the loss was scaled",
        )
    label = label.clamp(min=0.0)
    label = label / label.sum()
    return Decision(
        "unique",
        "the bias gradient gives the label in closed form; it belongs to no family, and is right "
        "only if the loss was not scaled",
        _arbitrary(label, error, scale, 0.0),
    )


def _sample(row: _Row, m: int, families: Sequence[Family], classes: int) -> SampleLabel:
    """Describe candidate ``m`` of one problem, its label made to sum to one exactly."""
    family = families[m]
    support, spread = family.support, row.spread
    weights, base = row.weights[m][:support], row.base[m]
    excess = (sum(weights) + (classes - support) * base - 1.0) / support
    return SampleLabel(
        family=family.name,
        classes=tuple(row.top[m][:support]),
        weights=tuple([weight - excess for weight in weights]),
        base=base,
        scale=row.scale[m],
        weight_errors=tuple([_finite(e * spread) for e in row.weight_error[m][:support]]),
        base_error=_finite(row.base_error[m] * spread),
        scale_error=_finite(row.scale_error[m] * abs(row.scale[m]) * spread),
    )


def _arbitrary(label: Tensor, error: Tensor, scale: float, scale_error: float) -> SampleLabel:
    order = label.argsort(descending=True)
    return SampleLabel(
        family=ARBITRARY,
        classes=tuple(order.tolist()),
        weights=tuple(label[order].tolist()),
        base=0.0,
        scale=scale,
        weight_errors=tuple(error[order].tolist()),
        base_error=0.0,
        scale_error=scale_error,
    )


def _finite(value: float) -> float:
    """Cap a standard error where the parameter is not determined at all."""
    return value if value < 1e30 else math.inf


@dataclass(frozen=True)
class _Row:
    """One problem and its M candidates in numbers: fields of :class:`Fits`, and the evidence.

    ``spread`` is the factor by which the standard errors grow where no fit is within the noise.
    """

    evidence: list[float]
    scale: list[float]
    top: list[list[int]]
    weights: list[list[float]]
    base: list[float]
    weight_error: list[list[float]]
    base_error: list[float]
    scale_error: list[float]
    spread: float


def _rows(problem: ScaleProblem, fits: Fits, evidence: Tensor, spread: Tensor) -> list[_Row]:
    """Turn tensors into numbers, once for all problems: one by one is the slowest part of all."""
    columns = (
        evidence,
        fits.scale,
        fits.top,
        fits.weights,
        fits.base,
        fits.weight_error,
        fits.base_error,
        fits.scale_error,
        spread,
    )
    return [_Row(*row) for row in zip(*(_numbers(column) for column in columns), strict=True)]


def _numbers(column: Tensor) -> list[Any]:
    """Return ``column.tolist()``, which NumPy does in a fifth of the time."""
    numbers: list[Any] = column.cpu().numpy().tolist()
    return numbers


def _single(problem: ScaleProblem, index: int) -> ScaleProblem:
    return problem.part(torch.tensor([index], device=problem.a.device))
