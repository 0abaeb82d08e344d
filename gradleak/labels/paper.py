"""``--method paper``: what the paper's search answers, and what that answer is worth.

The label is the one at which the search stopped. The paper (arXiv 2402.03124) has no test of it, so
the verdict is this project's: the scale search of §3, told the same family, says whether the
gradient has one label and whether that is the one. It sees no more truth than the search does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from gradleak.errors import UsageError
from gradleak.labels.decide import Decision, decide, dense_label
from gradleak.labels.factorise import Rank, RankOne, leading_triple, rank_of
from gradleak.labels.paper_search import SUPPORTS, PaperOptions, RowProblem, Search
from gradleak.labels.paper_search import search as search_scale
from gradleak.labels.problem import FamilyTable
from gradleak.labels.refine import refine
from gradleak.labels.search import find_candidates
from gradleak.labels.single import check_column_sums, scale_problem
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
    LOCAL_MINIMUM = "false minimum accepted"


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
    support = SUPPORTS[family]
    with torch.inference_mode(False), torch.no_grad():
        leading = leading_triple(grad_weight[None])
        rank = rank_of(grad_weight[None], leading)
        unsolved = _unsolved(len(grad_weight), support, rank)
        if unsolved is not None:
            return unsolved
        sums = check_column_sums(grad_weight, leading, rank)
        problem = RowProblem.of(grad_weight, weight, bias, options.divisor)
        dice = torch.Generator().manual_seed(0) if generator is None else generator
        found = search_scale(problem, support, options, dice)
        judged = _judge(leading, rank, weight, bias, family)
        result = _result(grad_weight, problem, leading, found, judged, family, options)
    return replace(result, noise=rank.noise, column_sums=sums)


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


def _unsolved(classes: int, support: int, rank: Rank) -> LabelResult | None:
    """Return the verdict on a gradient that the method does not apply to, else None."""
    if rank.rank == 0 and not rank.noisy:
        why = "the gradient is exactly zero and determines nothing"
        return LabelResult("unidentifiable", why, "none", None, 0, rank=0)
    if rank.rank != 1:
        why = f"the head gradient has rank {rank.rank}, and the paper's method is for rank one"
        return LabelResult("failed", why, "none", None, rank.rank, noise=rank.noise, rank=rank.rank)
    if classes < support + 2:
        why = f"{classes} classes leave fewer than two outside the support: nothing has a variance"
        return LabelResult("unidentifiable", why, "none", None, 1, rank=1)
    return None


def _judge(
    leading: RankOne, rank: Rank, weight: Tensor, bias: Tensor | None, family: str
) -> Decision:
    """Return what the scale search of §3 says of the gradient when told the family."""
    problem = scale_problem(leading, weight, bias, noise=rank.noise if rank.noisy else 0.0)
    # A hard label is at the edge of either family.
    table = FamilyTable.of((*families("hard"), *families(family)), weight.device)
    return decide(problem, refine(problem, find_candidates(problem, table), table), table)[0]


def _result(
    grad_weight: Tensor,
    problem: RowProblem,
    leading: RankOne,
    found: Search,
    judged: Decision,
    family: str,
    options: PaperOptions,
) -> LabelResult:
    """Make the answer and its verdict of where the search stopped and what the gradient allows."""
    none = LabelResult("failed", "", "paper", None, 1, rank=1)
    fits = judged.answer is not None and judged.answer.family != ARBITRARY
    if found.stage is None:
        kind = PaperFailure.ESCAPED if found.escaped == 2 else PaperFailure.NOT_CONVERGED
        kind = kind if fits else PaperFailure.WRONG_FAMILY
        why = f"{kind.value}: the lowest loss met is {found.loss:.2g}, at λ = {found.scale:.4g}"
        return replace(none, reason=why)
    at = torch.tensor([found.scale], dtype=torch.float64, device=problem.row.device)
    y, feature = problem.labels(at)[0], found.scale * problem.row
    scale = float(feature @ leading.v[0])
    sample = _sample(y, scale, family, judged if fits else None)
    label = dense_label(sample, len(y)).to(y.device)
    verdict, reason = _verdict(problem, found, y, sample, label, judged if fits else None)
    return replace(
        none,
        verdict=verdict,
        reason=reason,
        family=family,
        samples=(sample,),
        labels=label[None].cpu(),
        features=feature[None],
        residual=outer_residual(grad_weight, y + problem.ratio / found.scale - label, feature),
    )


def _sample(y: Tensor, scale: float, family: str, judged: Decision | None) -> SampleLabel:
    """Describe y (C,) as a label of the family, with its distance from the judged one as error."""
    classes, support = len(y), SUPPORTS[family]
    top = y.topk(support)
    base = 0.0
    if family == "smooth":
        base = max(0.0, float((1.0 - top.values.sum()) / (classes - support)))
    excess = (float(top.values.sum()) + (classes - support) * base - 1.0) / support
    weights = tuple(value - excess for value in top.values.tolist())
    sample = SampleLabel(
        family=family,
        classes=tuple(top.indices.tolist()),
        weights=weights,
        base=base,
        scale=scale,
        weight_errors=(math.inf,) * support,
        base_error=math.inf if family == "smooth" else 0.0,
        scale_error=math.inf,
    )
    if judged is None or judged.label is None or judged.answer is None:
        return sample
    own = judged.answer.uncertainty()
    apart = (dense_label(sample, classes) - judged.label.cpu()).abs()
    outside = torch.ones(classes, dtype=torch.bool).scatter(0, top.indices.cpu(), False)
    return replace(
        sample,
        weight_errors=tuple(math.hypot(own, e) for e in apart[list(sample.classes)].tolist()),
        base_error=math.hypot(judged.answer.base_error, float(apart[outside].max())),
        scale_error=math.hypot(judged.answer.scale_error, scale - judged.answer.scale),
    )


def _verdict(
    problem: RowProblem,
    found: Search,
    y: Tensor,
    sample: SampleLabel,
    label: Tensor,
    judged: Decision | None,
) -> tuple[Verdict, str]:
    """Compare the label at which the search stopped with what the gradient determines."""
    accepted = f"accepted at λ = {found.scale:.4g} with a loss of {found.loss:.2g}"
    if judged is None or judged.label is None or judged.answer is None:
        kind = PaperFailure.WRONG_FAMILY
        return "failed", f"{kind.value}: {accepted}, but no {sample.family} label fits the gradient"
    outside = label < label.topk(len(sample.classes)).values[-1]
    rest = y[outside].var(), (problem.ratio[outside] / found.scale).var()
    if float(rest[0]) >= _TRIVIAL * float(rest[1]):
        kind = PaperFailure.TRIVIAL_ZERO
        return "failed", f"{kind.value}: {accepted}, where the softmax is saturated"
    if judged.verdict != "unique":
        return judged.verdict, f"{accepted}, but {judged.reason}"
    apart = float((label - judged.label.to(label.device)).abs().max())
    if apart > _AGREES:
        near = abs(sample.scale / judged.answer.scale - 1.0) < _SAME_VALLEY
        kind = PaperFailure.STOPPED_SHORT if near else PaperFailure.LOCAL_MINIMUM
        return "failed", f"{kind.value}: {accepted}, {apart:.2g} from the label that fits"
    by = "particle swarm" if found.stage == "swarm" else found.stage
    return "unique", (
        f"{accepted} by the {by}; {apart:.2g} from the one {sample.family} label that fits the "
        "gradient to its precision"
    )
