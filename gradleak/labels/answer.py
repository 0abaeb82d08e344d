"""From decisions to results: labels and features laid out, and the gradient re-simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InputError
from gradleak.labels.checks import allowed_delta_sum, not_softmax
from gradleak.labels.decide import Decision
from gradleak.labels.factorise import Rank, RankOne
from gradleak.labels.problem import ScaleProblem
from gradleak.labels.verdict import LabelResult, dense_labels


@dataclass(frozen=True)
class Solved:
    """Decisions on B problems, their labels (B, C) on the CPU, features (B, D), and checks of them.

    ``residuals`` are those of the re-simulated head gradients, relative; ``delta_sums`` and
    ``delta_sizes`` are |Σ δ| and Σ |δ|, ``allowed_sums`` what rounding explains of the former.
    Where there is no answer all of them mean nothing.
    """

    method: str
    decisions: list[Decision]
    labels: Tensor
    features: Tensor
    residuals: list[float]
    delta_sums: list[float]
    delta_sizes: list[float]
    allowed_sums: list[float]


def resimulate(
    problem: ScaleProblem, leading: RankOne, decisions: list[Decision], method: str
) -> Solved:
    """Lay out labels and features, and re-simulate the head gradients from them."""
    labels = dense_labels([decision.answer for decision in decisions], problem.classes)
    scales = [1.0 if d.answer is None else d.answer.scale for d in decisions]
    scale = problem.sigma.new_tensor(scales)[:, None]
    delta = problem.probabilities(scale)[:, 0] - labels.to(scale.device)
    # ‖G − δ xᵀ‖² splits along v: what the label misses of σ u, and what rank one misses of G.
    missed = problem.sigma[:, None] * problem.u - scale * delta
    along = torch.linalg.vector_norm(missed, dim=1) / problem.sigma
    return Solved(
        method=method,
        decisions=decisions,
        labels=labels,
        features=scale * leading.v,
        residuals=torch.hypot(along, leading.residual).tolist(),
        delta_sums=delta.sum(1).abs().tolist(),
        delta_sizes=delta.abs().sum(1).tolist(),
        allowed_sums=allowed_delta_sum(problem.classes, leading.unit).tolist(),
    )


def results(
    solved: Solved, ranks: Sequence[Rank], sums: Sequence[float]
) -> list[LabelResult | InputError]:
    """Return the answers, given the ``ranks`` and column ``sums`` of the B gradients.

    An error is in the place of an answer whose δ does not sum to zero. To be called outside
    inference mode: what tensors the answers hold may then take part in autograd.
    """
    labels: tuple[Tensor, ...] = torch.split(solved.labels.clone(), 1)
    features: tuple[Tensor, ...] = torch.split(solved.features.clone(), 1)
    found: list[LabelResult | InputError] = []
    for n, (decision, rank) in enumerate(zip(solved.decisions, ranks, strict=True)):
        answer = decision.answer
        beyond = solved.delta_sums[n] > solved.allowed_sums[n]
        if answer is not None and not rank.noisy and beyond:
            found.append(not_softmax(solved.delta_sums[n] / solved.delta_sizes[n]))
            continue
        found.append(
            LabelResult(
                verdict=decision.verdict,
                reason=decision.reason,
                method=solved.method,
                family=None if answer is None else answer.family,
                batch_size=1,
                samples=() if answer is None else (answer,),
                labels=None if answer is None else labels[n],
                features=None if answer is None else features[n],
                residual=None if answer is None else solved.residuals[n],
                rank=rank.rank,
                noise=rank.noise,
                column_sums=sums[n],
                alternatives=decision.alternatives,
                intervals=decision.intervals,
            )
        )
    return found
