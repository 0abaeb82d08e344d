"""One sample: its label and feature from the gradient of the head alone (ALGORITHMS §2–3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.errors import InputError
from gradleak.labels.bias import scale_from_bias
from gradleak.labels.decide import Decision, decide
from gradleak.labels.factorise import Rank, RankOne, leading_triple, rank_of
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.refine import describe, refine
from gradleak.labels.search import find_candidates
from gradleak.labels.verdict import LabelResult
from gradleak.linalg import matvec, precision
from gradleak.softlabels import FAMILIES, Family

# Column sums that rounding explains: relative to the gradient, and in roundings of p times the
# largest plausible mean feature, since a confident δ is no larger than the rounding of p itself.
_COLUMN_SUMS, _ROUNDINGS, _LARGEST_FEATURE = 1e-3, 16.0, 100.0
# Roundings by which the solved delta itself may fail to sum to zero: some, and some per class.
_DELTA_SUM, _DELTA_SUM_EACH = 64.0, 1.0


def recover_single(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    families: Sequence[Family] = FAMILIES,
    method: str = "auto",
) -> LabelResult:
    """Recover the soft label and the head's input feature of one sample.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None. With a bias
    gradient the closed form of §2 answers for any label (``method='bias'``); without one the
    scale search of §3 does (``method='scale'``); ``auto`` prefers the former.

    Raises :class:`InputError` when the gradient is not of softmax cross-entropy (Theorem 1 of arXiv
    2402.03124: every column sums to zero over the classes).
    """
    # Thousands of small operations: without autograd's bookkeeping they cost a fifth less.
    with torch.inference_mode():
        result = _recover(grad_weight, weight, bias, grad_bias, families, method)
    if result.labels is None or result.features is None:
        return result
    # A clone made outside is an ordinary tensor again, which may take part in autograd.
    return replace(result, labels=result.labels.clone(), features=result.features.clone())


def _recover(
    grad_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    families: Sequence[Family],
    method: str,
) -> LabelResult:
    """Do the work of :func:`recover_single`."""
    classes, width = grad_weight.shape
    leading = leading_triple(grad_weight[None])
    if float(leading.sigma) == 0.0:
        return LabelResult(
            "unidentifiable",
            "the gradient is exactly zero and determines nothing",
            "none",
            None,
            0,
            rank=0,
        )
    rank = rank_of(grad_weight[None], leading)
    column_sums = check_column_sums(grad_weight, leading, rank)
    if rank.rank == 0:
        return LabelResult(
            "failed",
            f"no singular value of the head gradient rises above its noise (std {rank.noise:.2g})",
            "none",
            None,
            0,
            rank=0,
            noise=rank.noise,
            column_sums=column_sums,
        )
    if rank.rank != 1:
        most = min(classes - 1, width)
        count = f"at least {most}" if rank.rank >= most else f"about {rank.rank}"
        return LabelResult(
            "failed",
            f"the head gradient has rank {rank.rank}: a batch of {count} samples, and only single "
            "samples are solved",
            "none",
            None,
            rank.rank,
            rank=rank.rank,
            noise=rank.noise,
            column_sums=column_sums,
        )
    # Under noise the ratio of two noisy gradients is biased; the search is not.
    closed = grad_bias is not None and (method == "bias" or (method == "auto" and not rank.noisy))
    problem = scale_problem(leading, weight, bias, noise=rank.noise if rank.noisy else 0.0)
    table = FamilyTable.of(families, grad_weight.device)
    if closed:
        assert grad_bias is not None
        scale = scale_from_bias(leading, grad_bias, rank.noise if rank.noisy else 0.0)
        every = torch.arange(len(families), device=scale.device)
        fits = describe(problem, scale.expand(1, len(families)), every, table, scale_known=True)
    else:
        fits = refine(problem, find_candidates(problem, table), table)
    decision = decide(problem, fits, table, scale_known=closed)[0]
    result = _result(decision, problem, leading, rank, "bias" if closed else "scale")
    return replace(result, column_sums=column_sums)


def scale_problem(
    leading: RankOne, weight: Tensor, bias: Tensor | None, *, noise: float
) -> ScaleProblem:
    """Set up the one-scalar problem of a factorised gradient and its head.

    ``weight`` is (C, D), ``bias`` (C,) or None, ``noise`` the std of additive noise on one entry.
    Weights of a lower precision than the gradient's limit what can be compared.
    """
    norms = torch.zeros_like(leading.u)
    if noise > 0.0:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        norms = torch.linalg.vector_norm(wide - wide.mean(0), dim=1).double()[None]
    return ScaleProblem(
        a=matvec(weight[None], leading.v),
        b=torch.zeros_like(leading.u) if bias is None else bias.double()[None],
        u=leading.u,
        sigma=leading.sigma,
        noise=torch.full_like(leading.sigma, noise),
        unit=max(leading.unit, precision(weight.dtype)),
        weight_norms=norms,
    )


def check_column_sums(grad_weight: Tensor, leading: RankOne, rank: Rank) -> float:
    """Raise :class:`InputError` unless every column of ``(C, D)`` sums to zero over the classes.

    Returns Σ_j |Σ_c G_cj| / Σ |G|, which Theorem 1 of arXiv 2402.03124 says is zero.

    A gradient of rank one is σ u vᵀ and its columns sum to σ (Σ u) v: no second look at it.
    """
    classes, width = grad_weight.shape
    if rank.rank == 1 and not rank.noisy:
        u, spread = leading.u[0], leading.sigma[0] * leading.v[0].abs().sum()
        total, size = float(u.sum().abs() * spread), float(u.abs().sum() * spread)
    else:
        total = float(grad_weight.double().sum(0).abs().sum())
        size = float(grad_weight.double().abs().sum())
    rounding = _ROUNDINGS * leading.unit
    allowed = max(_COLUMN_SUMS, rounding) * size + rounding * _LARGEST_FEATURE * width
    if rank.noisy:
        allowed += 4.0 * rank.noise * math.sqrt(classes) * width
    if total > allowed:
        raise not_softmax(total / size)
    return total / size if size > 0.0 else 0.0


def not_softmax(share: float) -> InputError:
    """Return the error for columns that sum to ``share`` of their size over the classes."""
    return InputError(
        f"the columns of the head gradient sum to {share:.2g} of its size over the classes instead "
        "of zero, so it is not a softmax cross-entropy gradient",
        "check the loss and the head (--head NAME)",
    )


def _result(
    decision: Decision, problem: ScaleProblem, leading: RankOne, rank: Rank, method: str
) -> LabelResult:
    """Assemble the answer, with the residual of the head gradient re-simulated from it."""
    answer, label = decision.answer, decision.label
    labels = features = residual = None
    if answer is not None and label is not None:
        scale = torch.tensor([[answer.scale]], dtype=problem.a.dtype, device=problem.a.device)
        delta = problem.at(scale).p[0, 0] - label.to(scale.device)
        # ‖G − δ xᵀ‖² splits along v: what the label misses of σ u, and what rank one misses of G.
        along = (problem.sigma[0] * problem.u[0] - answer.scale * delta).norm() / problem.sigma[0]
        residual = math.hypot(float(along), float(leading.residual[0]))
        labels = label[None].cpu()
        excess = float(delta.sum().abs())
        roundings = _DELTA_SUM + _DELTA_SUM_EACH * problem.classes
        if not rank.noisy and excess > roundings * leading.unit:
            raise not_softmax(excess / float(delta.abs().sum()))
        features = answer.scale * leading.v
    return LabelResult(
        verdict=decision.verdict,
        reason=decision.reason,
        method=method,
        family=None if answer is None else answer.family,
        batch_size=1,
        samples=() if answer is None else (answer,),
        labels=labels,
        features=features,
        residual=residual,
        rank=rank.rank,
        noise=rank.noise,
        alternatives=decision.alternatives,
        intervals=decision.intervals,
    )
