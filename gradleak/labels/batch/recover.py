"""From the gradient of the head to every label and feature of a batch (ALGORITHMS §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.labels.batch.joint import solve_jointly
from gradleak.labels.batch.polish import STEPS, Labels, Polished, labels_of, polish
from gradleak.labels.batch.samples import Found, find_samples, rounding_of
from gradleak.labels.batch.simplify import simplify
from gradleak.labels.batch.subspace import Subspace, subspace_of
from gradleak.labels.factorise import Rank
from gradleak.labels.options import LabelOptions
from gradleak.labels.verdict import LabelResult, SampleLabel, Verdict
from gradleak.softlabels import MIXED, family_name

# The samples together may miss the gradient by this many of its standard deviations.
_SIGMAS = 8.0
_LARGEST_SUPPORT = 2
# A label known less precisely than this, in five standard errors, is not determined.
_DETERMINED = 0.02 / 5.0


def recover_batch(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    rank: Rank,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    options: LabelOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelResult:
    """Recover the soft labels and the head's input features of a batch.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None, ``rank``
    that of the gradient. Samples are found one by one in the gradient's subspace and polished
    together; the residual of the gradient re-simulated from them is the certificate. ``progress``
    is told how many samples are found, and of how many.
    """
    options = LabelOptions() if options is None else options
    with torch.inference_mode():
        samples = options.samples(rank.rank)
        rank = replace(rank, rank=min(rank.rank, samples))
        whole = subspace_of(
            grad_weight,
            weight,
            bias,
            None if options.method == "scale" else grad_bias,
            rank=rank,
            samples=samples,
        )
        families = [family for family in options.families if family.support <= _LARGEST_SUPPORT]
        generator = torch.Generator(device=grad_weight.device).manual_seed(options.seed)
        found = find_samples(whole, families, generator, progress)
        answer = _starting_point(whole, simplify(whole, found, families))
        if answer is None or len(answer[0]) < whole.size:
            answer = solve_jointly(whole, families, generator) or answer
        result = _result(grad_weight, whole, answer, rank)
    if result.labels is None or result.features is None:
        return result
    # A clone made outside is an ordinary tensor again, which may take part in autograd.
    return replace(result, labels=result.labels.clone(), features=result.features.clone())


def _starting_point(whole: Subspace, found: list[Found]) -> tuple[Tensor, Labels] | None:
    """Lay out the samples found: coordinates (M, n) and labels, or None if there are none."""
    if not found:
        return None
    supports = [support for f in found for support in f.roots.classes]
    weights = [weight for f in found for weight in f.roots.weights]
    base = torch.tensor([f.family.base for f in found for _ in f.roots.a])
    labels = labels_of(whole.classes, supports, weights, base)
    return torch.cat([f.roots.a for f in found]), labels


def _result(
    grad_weight: Tensor, whole: Subspace, answer: tuple[Tensor, Labels] | None, rank: Rank
) -> LabelResult:
    """Polish all samples together (of an incomplete batch, leave those found) and judge them."""
    if answer is None:
        return LabelResult(
            verdict="failed",
            reason=f"none of {whole.samples} samples was found",
            method="subspace",
            family=None,
            batch_size=whole.samples,
            rank=rank.rank,
            noise=rank.noise,
        )
    count = len(answer[0])
    solved = polish(whole, *answer, steps=STEPS if count == whole.size else 0)
    samples = _describe(whole, solved)
    labels = solved.labels.dense()
    features = solved.a @ whole.right.T
    order = sorted(range(count), key=lambda m: (samples[m].classes[0], -samples[m].weights[0]))
    samples = [samples[m] for m in order]
    labels, features, deltas = labels[order], features[order], solved.deltas[order]
    verdict, reason = _verdict(whole, solved, samples)
    names = {sample.family for sample in samples}
    return LabelResult(
        verdict=verdict,
        reason=reason,
        method="subspace",
        family=names.pop() if len(names) == 1 else MIXED,
        batch_size=whole.samples,
        samples=tuple(samples),
        labels=labels.cpu(),
        features=features,
        residual=_residual(grad_weight, deltas, features, whole.samples),
        rank=rank.rank,
        noise=rank.noise,
    )


def _describe(whole: Subspace, solved: Polished) -> list[SampleLabel]:
    """State every sample's label with its standard errors."""
    n, classes = whole.size, whole.classes
    spread = _variance(whole, solved) ** 0.5
    features = solved.a @ whole.right.T
    described = []
    for m in range(len(solved.a)):
        covariance, used = solved.covariance[m], solved.labels.used[m]
        alpha = float(solved.labels.weights[m, -1])
        support = solved.labels.classes[m][torch.cat([used.new_ones(1), used[:-1]])]
        weights = solved.labels.dense()[m, support]
        slope = solved.labels.basis[m, support]
        errors = torch.linalg.vecdot(slope @ covariance[n:, n:], slope).clamp(min=0.0).sqrt()
        norm = features[m].norm()
        turn = whole.right.T @ features[m] / norm
        scale_error = float((turn @ covariance[:n, :n] @ turn).clamp(min=0.0).sqrt())
        base_error = float(used[-1]) * float(covariance[-1, -1].clamp(min=0.0).sqrt()) / classes
        order = weights.argsort(descending=True)
        described.append(
            SampleLabel(
                family=family_name(len(support), bool(used[-1])),
                classes=tuple(support[order].tolist()),
                weights=tuple(weights[order].tolist()),
                base=alpha / classes,
                scale=float(norm),
                weight_errors=tuple((errors[order] * spread).tolist()),
                base_error=base_error * spread,
                scale_error=scale_error * spread,
            )
        )
    return described


def _variance(whole: Subspace, solved: Polished) -> float:
    """Return the variance of one entry of U S: what is expected of it, or the misfit if larger."""
    expected = _expected(whole, solved) ** 2 / solved.deltas.shape[1] / whole.size
    if len(solved.a) < whole.size:
        return expected
    return max(expected, solved.misfit**2 / max(1, solved.freedom))


def _verdict(
    whole: Subspace, solved: Polished, samples: Sequence[SampleLabel]
) -> tuple[Verdict, str]:
    """Judge by the number of samples, by what they leave of the gradient, and by their errors."""
    count, wanted = len(samples), whole.samples
    if count < wanted:
        return "failed", (
            f"{count} of {wanted} samples were found, each recognised on its own; the others were "
            "not reached (the method's limit, not the gradient's)"
        )
    if solved.freedom < 1:
        return "unidentifiable", (
            f"{whole.classes} classes leave no equation to spare for {wanted} samples"
        )
    excess = solved.misfit / _expected(whole, solved)
    if excess > _SIGMAS:
        return "failed", (
            f"together the {wanted} samples miss the gradient by {excess:.1f} times what its "
            "precision explains"
        )
    loose = sum(sample.uncertainty() > _DETERMINED for sample in samples)
    if loose:
        worst = max(sample.uncertainty() for sample in samples)
        return "ambiguous", (
            f"{loose} of {wanted} labels are open by up to ± {worst:.2g} (one standard error)"
        )
    return "unique", f"{wanted} samples reproduce the gradient to its precision"


def _expected(whole: Subspace, solved: Polished) -> float:
    """Return the ‖(1/N) Σ δ_n a_nᵀ − U S‖ that noise and the rounding of every δ would leave."""
    noise = whole.noise**2 * whole.classes * whole.size
    delta = rounding_of(whole, solved.a).square() * solved.deltas.square().sum(1)
    return math.sqrt(noise + float((delta * solved.a.square().sum(1)).sum()) / whole.samples**2)


def _residual(grad_weight: Tensor, deltas: Tensor, features: Tensor, samples: int) -> float:
    """Return ‖G − (1/N) Σ δ_n x_nᵀ‖ / ‖G‖ over the samples found."""
    wide = grad_weight.double()
    rest = torch.addmm(wide, deltas.T, features, alpha=-1.0 / samples)
    return float(rest.norm() / wide.norm())
