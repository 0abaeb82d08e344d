"""From maxima of the likelihood to a verdict: which families the noise leaves on the table (§3).

``unique``: one family, with one support, is decisively more plausible than every other. A label
that is known to within a standard error is an answer; only *which* label it is can be ambiguous.
``ambiguous``: other families, supports or roots are not excluded; all of them are listed. A simpler
family is excluded when the answer is more than four standard errors from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradleak.labels.decide import Decision
from gradleak.labels.maxima import Maxima
from gradleak.labels.verdict import SampleLabel
from gradleak.softlabels import Family

# Log odds by which two explanations must differ before one of them is dropped.
_DECISIVE = 3.0
# A simpler family within so many standard errors is not excluded, whatever the odds.
_SIGMAS = 4.0
# A richer family whose label stays this close, two standard errors included, says nothing new; one
# that may be this far off must be told.
_MATERIAL, _A_LOT = 5e-3, 2e-2
# Log odds of a label parameter being there at all: soft labels are rarer the more they need.
_PER_PARAMETER = math.log(3.0)
# What the residual may exceed its expectation by, in standard deviations, before it is no fit.
_ACCEPTABLE, _SLACK = 6.0, 10.0
# Maxima of one family and support that are this close, in standard errors of ‖x‖, are one.
_SAME = 0.5
# Relative standard error of the loss scale beyond which it is not determined.
_LOOSE_SCALE = 0.3


@dataclass(frozen=True)
class Choice:
    """The ``decision`` on one problem and the index of its answer among the M candidates."""

    decision: Decision
    index: int


def weigh(
    found: Maxima, families: Sequence[Family], classes: int, *, loss_scale_free: bool = False
) -> list[Choice | None]:
    """Choose between the M maxima of each of B problems; None where no family fits."""
    return [_choose(row, families, classes, loss_scale_free) for row in _rows(found)]


@dataclass(frozen=True)
class _Row:
    """The M maxima of one problem in numbers, each a field of :class:`Maxima`."""

    family: list[int]
    top: list[list[int]]
    weights: list[list[float]]
    weight_error: list[list[float]]
    base: list[float]
    base_error: list[float]
    scale: list[float]
    scale_error: list[float]
    loss_scale: list[float]
    loss_scale_error: list[float]
    chi2: list[float]
    freedom: list[int]
    evidence: list[float]


def _rows(found: Maxima) -> list[_Row]:
    named = [field.name for field in dataclasses.fields(_Row)]
    fields = [getattr(found, name).tolist() for name in named]
    return [_Row(*row) for row in zip(*fields, strict=True)]


def _choose(
    row: _Row, families: Sequence[Family], classes: int, loss_scale_free: bool
) -> Choice | None:
    """Decide between the maxima of one problem."""
    odds = _log_odds(row, families)
    order = _distinct(row, families, sorted(odds, key=lambda m: -odds[m]))
    if not order:
        return None
    best = order[0]
    answer = _sample(row, best, families, classes, loss_scale_free)
    rivals = [
        _sample(row, m, families, classes, loss_scale_free)
        for m in order[1:]
        if odds[best] - odds[m] < _DECISIVE
        or _too_simple(row, families, best, m)
        or _richer(row, families, best, m, classes)
    ]
    loose = row.loss_scale_error[best] > _LOOSE_SCALE * row.loss_scale[best]
    if loss_scale_free and loose:
        return Choice(
            Decision(
                "unidentifiable",
                "the logits do not vary enough to tell the loss scale from the feature's",
                answer,
                tuple(rivals),
            ),
            best,
        )
    if rivals:
        kinds = sorted({answer.family, *(rival.family for rival in rivals)})
        open_question = "family" if len(kinds) > 1 else "support or the root"
        return Choice(
            Decision(
                "ambiguous",
                f"the gradient does not decide the label's {open_question}: {len(rivals) + 1} "
                f"explanations ({', '.join(kinds)}) are not excluded",
                answer,
                tuple(rivals),
            ),
            best,
        )
    return Choice(
        Decision(
            "unique",
            f"one maximum of the likelihood, of the {answer.family} family, explains the gradient",
            answer,
        ),
        best,
    )


def _log_odds(row: _Row, families: Sequence[Family]) -> dict[int, float]:
    """Return the log odds of the maxima that fit, up to a constant.

    Where a maximum lies outside the simplex the likelihood falls from its edge inwards, and a
    richer family is no more plausible than the simpler one that is the edge.
    """
    odds = {
        m: row.evidence[m] - _PER_PARAMETER * families[row.family[m]].parameters
        for m in range(len(row.evidence))
        if _acceptable(row, m)
    }
    capped = {}
    for m, value in odds.items():
        edges = [odds[k] for k in odds if _special_case(row, families, k, m)]
        outside = row.base[m] < 0.0 or min(row.weights[m]) < 0.0
        capped[m] = min(value, max(edges) - _PER_PARAMETER) if outside and edges else value
    return capped


def _acceptable(row: _Row, m: int) -> bool:
    """Return whether maximum ``m`` has equations enough and fits within the noise."""
    freedom = row.freedom[m]
    allowed = freedom + _ACCEPTABLE * math.sqrt(2.0 * max(freedom, 0)) + _SLACK
    return freedom >= 1 and row.chi2[m] <= allowed and row.evidence[m] > -math.inf


def _distinct(row: _Row, families: Sequence[Family], order: Sequence[int]) -> list[int]:
    """Leave out the maxima that were reached before, from another start.

    The start that came first stands for them all, or rounding would choose between them.
    """
    kept: list[int] = []
    for m in order:
        same = [place for place, k in enumerate(kept) if _same(row, families, m, k)]
        if same:
            kept[same[0]] = min(kept[same[0]], m)
        else:
            kept.append(m)
    return kept


def _same(row: _Row, families: Sequence[Family], m: int, k: int) -> bool:
    """Return whether ``m`` and ``k`` are one maximum, within the accuracy of the climb."""
    support = families[row.family[m]].support
    return (
        row.family[m] == row.family[k]
        and set(row.top[m][:support]) == set(row.top[k][:support])
        and abs(row.scale[m] - row.scale[k]) <= _SAME * (row.scale_error[m] + row.scale_error[k])
    )


def _too_simple(row: _Row, families: Sequence[Family], best: int, m: int) -> bool:
    """Return whether ``m`` is a special case of ``best`` and no more than a few errors from it."""
    nested = _special_case(row, families, m, best)
    return nested and row.chi2[m] - row.chi2[best] < _SIGMAS**2


def _richer(row: _Row, families: Sequence[Family], best: int, m: int, classes: int) -> bool:
    """Return whether ``best`` is a special case of ``m``, whose label may well differ.

    A richer family is left out where its label cannot differ by much. It is left out, too, where it
    does not fit better by a standard error, the choice of its classes taken into account; unless it
    needs no choice and its label may differ by a lot.
    """
    if not _special_case(row, families, best, m):
        return False
    small, large = families[row.family[best]].support, families[row.family[m]].support
    chosen = sum(math.log(classes - k) for k in range(small, large))
    apart = max(
        (classes - 1) * (row.base[m] - row.base[best]),
        *(
            weight
            for c, weight in zip(row.top[m][:large], row.weights[m][:large], strict=True)
            if c not in row.top[best][:small]
        ),
        0.0,
    )
    reach = apart + 2.0 * max(row.weight_error[m])
    if small == large and reach > _A_LOT:
        return True
    return row.chi2[best] - row.chi2[m] > 1.0 + 2.0 * chosen and reach > _MATERIAL


def _special_case(row: _Row, families: Sequence[Family], m: int, k: int) -> bool:
    """Return whether the family and support of ``m`` are contained in those of ``k``."""
    small, large = families[row.family[m]], families[row.family[k]]
    nested = small.support <= large.support and small.base <= large.base and small != large
    return nested and set(row.top[m][: small.support]) <= set(row.top[k][: large.support])


def _sample(
    row: _Row, m: int, families: Sequence[Family], classes: int, loss_scale_free: bool
) -> SampleLabel:
    """Describe maximum ``m``, brought into the simplex where noise took it out."""
    family = families[row.family[m]]
    weights = [max(weight, 0.0) for weight in row.weights[m][: family.support]]
    base = max(row.base[m], 0.0)
    total = sum(weights) + (classes - family.support) * base
    return SampleLabel(
        family=family.name,
        classes=tuple(row.top[m][: family.support]),
        weights=tuple([weight / total for weight in weights]),
        base=base / total,
        scale=row.scale[m],
        weight_errors=tuple(row.weight_error[m][: family.support]),
        base_error=row.base_error[m],
        scale_error=row.scale_error[m],
        loss_scale=row.loss_scale[m] if loss_scale_free else None,
        loss_scale_error=row.loss_scale_error[m] if loss_scale_free else None,
    )
