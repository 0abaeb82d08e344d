"""From maxima of the likelihood to a verdict: which families the noise leaves on the table (§3).

``unique``: one family, with one support, is decisively more plausible than every other. A label
that is known to within a standard error is an answer; only *which* label it is can be ambiguous.
``ambiguous``: other families, supports or roots are not excluded; all of them are listed. A simpler
family is excluded when the answer is more than four standard errors from it.
"""

from __future__ import annotations

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
# Log odds of a label parameter being there at all: soft labels are rarer the more they need.
_PER_PARAMETER = math.log(5.0)
# What the residual may exceed its expectation by, in standard deviations, before it is no fit.
_ACCEPTABLE, _SLACK = 6.0, 10.0
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
    """The M maxima of one problem in numbers: the fields of :class:`Maxima`, in its order."""

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
    fields = [value.tolist() for name, value in vars(found).items() if name != "feature"]
    return [_Row(*row) for row in zip(*fields, strict=True)]


def _choose(
    row: _Row, families: Sequence[Family], classes: int, loss_scale_free: bool
) -> Choice | None:
    """Decide between the maxima of one problem."""
    odds = {
        m: row.evidence[m] - _PER_PARAMETER * families[row.family[m]].parameters
        for m in range(len(row.evidence))
        if _acceptable(row, m)
    }
    order = _distinct(row, families, sorted(odds, key=lambda m: -odds[m]))
    if not order:
        return None
    best = order[0]
    answer = _sample(row, best, families, classes, loss_scale_free)
    rivals = [
        _sample(row, m, families, classes, loss_scale_free)
        for m in order[1:]
        if odds[best] - odds[m] < _DECISIVE or _not_excluded(row, families, best, m)
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


def _acceptable(row: _Row, m: int) -> bool:
    """Return whether maximum ``m`` has equations enough and fits within the noise."""
    freedom = row.freedom[m]
    allowed = freedom + _ACCEPTABLE * math.sqrt(2.0 * max(freedom, 0)) + _SLACK
    return freedom >= 1 and row.chi2[m] <= allowed and row.evidence[m] > -math.inf


def _distinct(row: _Row, families: Sequence[Family], order: Sequence[int]) -> list[int]:
    """Leave out the maxima that were reached before, from another start."""
    kept: list[int] = []
    for m in order:
        support = families[row.family[m]].support
        if not any(
            row.family[m] == row.family[k]
            and set(row.top[m][:support]) == set(row.top[k][:support])
            and abs(row.scale[m] - row.scale[k]) <= row.scale_error[m] + row.scale_error[k]
            for k in kept
        ):
            kept.append(m)
    return kept


def _not_excluded(row: _Row, families: Sequence[Family], best: int, m: int) -> bool:
    """Return whether ``m`` is a special case of ``best`` and no more than a few errors from it."""
    large, small = families[row.family[best]], families[row.family[m]]
    nested = small.support <= large.support and small.base <= large.base and small != large
    inside = set(row.top[m][: small.support]) <= set(row.top[best][: large.support])
    return nested and inside and row.chi2[m] - row.chi2[best] < _SIGMAS**2


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
