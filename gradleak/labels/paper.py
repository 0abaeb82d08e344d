"""``--method paper``: what the paper's search answers, and what that answer is worth.

The label is the one at which the search stopped. The paper (arXiv 2402.03124) has no test of it, so
the verdict is this project's: the scale search of §3, told the same family, says whether the
gradient has one label and whether that is the one. It sees no more truth than the search does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from gradleak.errors import UsageError
from gradleak.labels.factorise import leading_triple
from gradleak.labels.paper_search import SUPPORTS, PaperOptions, RowProblem, Search
from gradleak.labels.paper_search import search as search_scale
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult, SampleLabel, Verdict
from gradleak.linalg import outer_residual
from gradleak.softlabels import ARBITRARY, families

# A label further than this from the one that fits the gradient is another one.
_AGREES = 1e-3
# A scale this near, relatively, to the one that fits lies in the same valley of the loss.
_SAME_VALLEY = 0.05
# Share of the gradient's own variance above which a small loss is a small gradient, no fit.
_TRIVIAL = 0.5


class PaperFailure(str, Enum):
    """Why the paper's search has no answer, or not the right one; the reason begins with it."""

    WRONG_FAMILY = "wrong family"
    ESCAPED = "trivial zero at infinity"
    NOT_CONVERGED = "not converged"
    TRIVIAL_ZERO = "trivial zero accepted"
    STOPPED_SHORT = "stopped short"
    FALSE_MINIMUM = "false minimum accepted"


@dataclass(frozen=True)
class _Stop:
    """Where the search stopped: the raw label y (C,), the family's ``label`` and its ``sample``."""

    y: Tensor
    delta: Tensor
    feature: Tensor
    label: Tensor
    sample: SampleLabel


def recover_paper(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    family: str,
    options: PaperOptions | None = None,
    generator: torch.Generator | None = None,
) -> LabelResult:
    """Recover the soft label of one sample by the paper's own search.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` (C,) or None; ``family`` is ``smooth`` or
    ``mixup``; ``generator`` drives the particle swarm (default: seed 0). The errors stated are the
    distance from the label that fits the gradient best, and that one's own. A result that is no
    answer begins its reason with a :class:`PaperFailure`.

    Raises :class:`UsageError` for another family, :class:`InputError` when the gradient is not of
    softmax cross-entropy. Source: arXiv 2402.03124, §4.
    """
    require_family(family)
    options = options or PaperOptions()
    dice = torch.Generator().manual_seed(0) if generator is None else generator
    # A hard label is at the edge of either family.
    told = (*families("hard"), *families(family))
    judged = recover_single(grad_weight, weight, bias=bias, families=told, method="scale")
    if not judged.rank:
        return judged
    if judged.rank > 1:
        why = f"the head gradient has rank {judged.rank}, and the paper's method is for rank one"
        return replace(_answerless(judged), reason=why, batch_size=judged.rank)
    if len(grad_weight) < SUPPORTS[family] + 2:
        why = f"{len(grad_weight)} classes leave fewer than two outside the support: no variance"
        return replace(_answerless(judged), verdict="unidentifiable", reason=why)
    with torch.no_grad():
        problem, found = search_gradient(grad_weight, weight, bias, family, options, dice)
        return _result(grad_weight, problem, found, judged, family)


def search_gradient(
    grad_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    family: str,
    options: PaperOptions,
    generator: torch.Generator,
) -> tuple[RowProblem, Search]:
    """Run the paper's search alone, as :func:`recover_paper` does, without judging its answer."""
    problem = RowProblem.of(grad_weight, weight, bias, options.divisor)
    return problem, search_scale(problem, SUPPORTS[family], options, generator)


def require_family(family: str) -> None:
    """Raise :class:`UsageError` unless ``family`` is one that the method can be told."""
    if family not in SUPPORTS:
        raise UsageError(
            f"method 'paper' must be told the label family, and '{family}' is none it knows",
            f"give --family {' or '.join(SUPPORTS)}",
        )


def failure_of(result: LabelResult) -> PaperFailure | None:
    """Return the kind of failure that the reason of a result names, None where it names none."""
    kinds = (kind for kind in PaperFailure if result.reason.startswith(kind.value))
    return next(kinds, None)


def _result(
    grad_weight: Tensor, problem: RowProblem, found: Search, judged: LabelResult, family: str
) -> LabelResult:
    """Make the answer and its verdict of where the search stopped and what the gradient allows."""
    none = _answerless(judged)
    if judged.labels is None or judged.family == ARBITRARY:
        judged = replace(judged, samples=(), labels=None)
    if found.stage is None:
        kind = PaperFailure.ESCAPED if found.escaped == 2 else PaperFailure.NOT_CONVERGED
        kind = PaperFailure.WRONG_FAMILY if judged.labels is None else kind
        why = f"{kind.value}: the lowest loss met is {found.loss:.2g}, at λ = {found.scale:.4g}"
        return replace(none, reason=why)
    stop = _stop(grad_weight, problem, found, judged, family)
    verdict, reason = _verdict(stop, found, judged)
    return replace(
        none,
        verdict=verdict,
        reason=reason,
        family=family,
        samples=(stop.sample,),
        labels=stop.label[None].cpu(),
        features=stop.feature[None],
        residual=outer_residual(grad_weight, stop.y + stop.delta - stop.label, stop.feature),
    )


def _answerless(judged: LabelResult) -> LabelResult:
    """Return a failed result without an answer, with what ``judged`` says of the gradient."""
    return LabelResult(
        "failed",
        "",
        "paper",
        None,
        1,
        noise=judged.noise,
        rank=judged.rank,
        column_sums=judged.column_sums,
    )


def _stop(
    grad_weight: Tensor, problem: RowProblem, found: Search, judged: LabelResult, family: str
) -> _Stop:
    """Describe where the search stopped as a label of the family, as far as it is from judged's."""
    scale = torch.tensor([found.scale], dtype=torch.float64, device=problem.row.device)
    y, feature = problem.labels(scale)[0], found.scale * problem.row
    support = SUPPORTS[family]
    weights, classes = y.topk(support)
    base = 0.0
    if family == "smooth":
        base = max(0.0, float(1.0 - weights.sum()) / (len(y) - support))
    # What the rest leaves over, so that the label sums to one.
    weights = weights - (weights.sum() + (len(y) - support) * base - 1.0) / support
    label = torch.full_like(y, base).scatter(0, classes, weights)
    size = float(feature @ leading_triple(grad_weight[None]).v[0])
    own = scale_error = math.inf
    apart = torch.full_like(y, math.inf)
    if judged.labels is not None:
        (sample,) = judged.samples
        own = sample.uncertainty()
        apart = (label - judged.labels[0].to(label.device)).abs()
        scale_error = math.hypot(sample.scale_error, size - sample.scale)
    base_error = math.hypot(own, float(apart.scatter(0, classes, 0.0).max()))
    return _Stop(
        y=y,
        delta=problem.ratio / found.scale,
        feature=feature,
        label=label,
        sample=SampleLabel(
            family=family,
            classes=tuple(classes.tolist()),
            weights=tuple(weights.tolist()),
            base=base,
            scale=size,
            weight_errors=tuple(math.hypot(own, e) for e in apart[classes].tolist()),
            base_error=base_error if family == "smooth" else 0.0,
            scale_error=scale_error,
        ),
    )


def _verdict(stop: _Stop, found: Search, judged: LabelResult) -> tuple[Verdict, str]:
    """Compare the label at which the search stopped with what the gradient determines."""
    accepted = f"accepted at λ = {found.scale:.4g} with a loss of {found.loss:.2g}"
    family, support = stop.sample.family, len(stop.sample.classes)
    outside = stop.label < stop.label.topk(support).values[-1]
    if float(stop.y[outside].var()) >= _TRIVIAL * float(stop.delta[outside].var()):
        kind = PaperFailure.TRIVIAL_ZERO
        return "failed", f"{kind.value}: {accepted}, where the softmax is saturated"
    if judged.labels is None:
        kind = PaperFailure.WRONG_FAMILY
        return "failed", f"{kind.value}: {accepted}, but no {family} label fits the gradient"
    if judged.verdict != "unique":
        return judged.verdict, f"{accepted}, but {judged.reason}"
    apart = float((stop.label - judged.labels[0].to(stop.label.device)).abs().max())
    if apart > _AGREES:
        near = abs(stop.sample.scale / judged.samples[0].scale - 1.0) < _SAME_VALLEY
        kind = PaperFailure.STOPPED_SHORT if near else PaperFailure.FALSE_MINIMUM
        return "failed", f"{kind.value}: {accepted}, {apart:.2g} from the label that fits"
    by = "particle swarm" if found.stage == "swarm" else found.stage
    return "unique", (
        f"{accepted} by the {by}; {apart:.2g} from the one {family} label that fits the gradient "
        "to its precision"
    )
