"""One sample under noise: the search starts, maximum likelihood finishes, evidence decides (§3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.labels.answer import Solved
from gradleak.labels.decide import Decision, without_family
from gradleak.labels.gaussian import Observation
from gradleak.labels.maxima import find_maxima
from gradleak.labels.problem import FamilyTable
from gradleak.labels.profile import with_intervals
from gradleak.labels.starts import Factors, factorise_noisy
from gradleak.labels.verdict import SampleLabel, dense_labels
from gradleak.labels.weigh import weigh
from gradleak.softlabels import Family


def solve_under_noise(seen: Observation, unit: Tensor, families: Sequence[Family]) -> Solved:
    """Answer for B noisy gradients of one sample each; ``unit`` (B,) is their dtype's roundoff.

    A bias gradient enters as one more column of the gradient, with its noise. Where no family fits
    it still gives the label in closed form; without it the feasible scales are what is left.
    """
    table = FamilyTable.of(families, unit.device)
    factors = factorise_noisy(seen, unit)
    found = find_maxima(seen, factors, table)
    choices = with_intervals(weigh(found, families, seen.classes), seen, found)
    decisions: list[Decision] = []
    features = found.model.feature[:, 0].clone()
    for b, choice in enumerate(choices):
        if choice is None:
            decision, features[b] = _of_no_family(factors, b, table)
        else:
            decision = choice.decision
            features[b] = found.model.feature[b, choice.index]
        decisions.append(decision)
    return laid_out(seen, decisions, features)


def _of_no_family(factors: Factors, index: int, table: FamilyTable) -> tuple[Decision, Tensor]:
    """Say what is known of a label of no family, and the feature (D,) that goes with it."""
    known = None if factors.known is None else float(factors.known[index])
    decision = without_family(factors.problem, index, table, known)
    direction = factors.direction[index]
    if decision.answer is None:
        return decision, torch.zeros_like(direction)
    feature = decision.answer.scale * direction
    # A bias gradient's column takes its share of the unit vector: x = s v has the norm s ‖v‖.
    norm = float(torch.linalg.vector_norm(direction))
    answer = replace(decision.answer, scale=decision.answer.scale * norm)
    return replace(decision, answer=answer), feature


def laid_out(seen: Observation, decisions: Sequence[Decision], features: Tensor) -> Solved:
    """Lay out labels and features (B, D), and re-simulate the head gradients from them."""
    answers = [decision.answer for decision in decisions]
    labels = dense_labels(answers, seen.classes)
    logits = (seen.weight @ features[..., None]).squeeze(-1) + seen.bias
    delta = torch.softmax(logits, -1) - labels.to(logits.device)
    delta = delta * delta.new_tensor([_loss_scale(answer) for answer in answers])[:, None]
    # ‖G − δ xᵀ‖², without forming the product
    cross = torch.linalg.vecdot(delta, (seen.gradient @ features[..., None]).squeeze(-1))
    square = seen.gradient.square().sum((1, 2))
    product = delta.square().sum(1) * features.square().sum(1)
    left = (square - 2.0 * cross + product).clamp(min=0.0)
    nothing = [0.0] * len(answers)
    return Solved(
        method="scale" if seen.grad_bias is None else "bias",
        decisions=list(decisions),
        labels=labels,
        features=features,
        residuals=(left / square).sqrt().tolist(),
        delta_sums=nothing,
        delta_sizes=nothing,
        allowed_sums=nothing,
    )


def _loss_scale(answer: SampleLabel | None) -> float:
    return 1.0 if answer is None or answer.loss_scale is None else answer.loss_scale
