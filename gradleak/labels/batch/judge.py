"""What a batch's answer is worth: its samples with their errors, the verdict, the certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.labels.batch.polish import Polished
from gradleak.labels.batch.samples import rounding_of
from gradleak.labels.batch.subspace import Subspace
from gradleak.labels.verdict import SampleLabel, Verdict
from gradleak.softlabels import family_name

# The samples together may miss the gradient by so many of the standard deviations of its noise, and
# by all that rounding can come to. True samples leave a tenth to three quarters of the latter;
# another choice of classes, which the network hardly tells from theirs, was seen to leave 1.3.
_SIGMAS = 2.0
# Where a singular value is small, samples of one class shared out otherwise were seen to leave 0.5
# and more of that, the true ones 0.1 to 0.45.
_TWINS = 0.5
# Roundings of float64 that the solver adds.
_SOLVER = 16.0
# A label known less precisely than this, in five standard errors, is not determined.
_DETERMINED = 0.02 / 5.0


def describe(whole: Subspace, solved: Polished) -> list[SampleLabel]:
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


def judge(whole: Subspace, solved: Polished, samples: Sequence[SampleLabel]) -> tuple[Verdict, str]:
    """Judge by the number of samples, by what they leave of the gradient, and by their errors."""
    count, wanted = len(samples), whole.samples
    if count < wanted:
        return incomplete(whole, count)
    if solved.freedom < 1:
        return "unidentifiable", _too_many(whole)
    if not explains(whole, solved):
        return "failed", (
            f"together the {wanted} samples miss the gradient by {excess(whole, solved):.1f} "
            "times what its precision explains"
        )
    loose = sum(sample.uncertainty() > _DETERMINED for sample in samples)
    if loose:
        worst = max(sample.uncertainty() for sample in samples)
        return "ambiguous", (
            f"{loose} of {wanted} labels are open by up to ± {worst:.2g} (one standard error)"
        )
    if bool(whole.weak().any()) and excess(whole, solved) > _TWINS:
        return "ambiguous", (
            "samples of one class are hardly told apart: the gradient is explained, and may be by "
            "other labels and features of theirs"
        )
    return "unique", f"{wanted} samples reproduce the gradient to its precision"


def explains(whole: Subspace, solved: Polished) -> bool:
    """Return whether the samples reproduce the gradient to what is expected of it."""
    return excess(whole, solved) <= 1.0


def excess(whole: Subspace, solved: Polished) -> float:
    """Return what the samples leave of the gradient, in units of what noise and rounding may."""
    return solved.misfit / _explained(whole, solved)


def _explained(whole: Subspace, solved: Polished) -> float:
    """Return the ‖(1/M) Σ δ_n a_nᵀ − U S‖ that noise and rounding may leave.

    A softmax is rounded relative to p, its difference from a label relative to δ. Where the
    gradient has float64, the solver's own arithmetic counts as often again.
    """
    solver = _SOLVER * torch.finfo(torch.float64).eps
    noise = _SIGMAS**2 * whole.noise**2 * whole.classes * whole.size
    p = (rounding_of(whole, solved.a) + solver).square() * whole.probabilities(
        solved.a
    ).square().sum(1)
    delta = (2.0 * whole.unit + solver) ** 2 * solved.deltas.square().sum(1)
    rounding = float(((p + delta) * solved.a.square().sum(1)).sum()) / whole.mass**2
    return math.sqrt(noise + rounding)


def incomplete(whole: Subspace, count: int) -> tuple[Verdict, str]:
    """Return the verdict on a batch of which ``count`` samples were found, and not all."""
    known = 0 if whole.unit_row is None else whole.samples
    if (whole.classes - 1) * whole.size + known <= whole.samples * whole.size:
        return "unidentifiable", _too_many(whole)
    found = f"{count} of {whole.samples} samples were found, each recognised on its own"
    if not count:
        found = f"none of {whole.samples} samples was found"
    return "failed", f"{found}; the others are beyond the method, not beyond the gradient"


def _too_many(whole: Subspace) -> str:
    at_least = "at least " if whole.size >= min(whole.classes - 1, len(whole.right)) else ""
    return (
        f"a batch of {at_least}{whole.samples} samples in {whole.classes} classes and "
        f"{len(whole.right)} features: the gradient has no more equations than unknowns"
    )


def residual_of(grad_weight: Tensor, deltas: Tensor, features: Tensor, mass: float) -> float:
    """Return ‖G − (1/M) Σ δ_n x_nᵀ‖ / ‖G‖ of the samples found."""
    wide = grad_weight.double()
    rest = torch.addmm(wide, deltas.T, features, alpha=-1.0 / mass)
    return float(rest.norm() / wide.norm())


def _variance(whole: Subspace, solved: Polished) -> float:
    """Return the variance of one entry of U S: what is expected of it, or the misfit if larger."""
    expected = expected_misfit(whole, solved) ** 2 / solved.deltas.shape[1] / whole.size
    if len(solved.a) < whole.size:
        return expected
    return max(expected, solved.misfit**2 / max(1, solved.freedom))


def expected_misfit(whole: Subspace, solved: Polished) -> float:
    """Return the ‖(1/M) Σ δ_n a_nᵀ − U S‖ that noise and the rounding of every δ would leave."""
    noise = whole.noise**2 * whole.classes * whole.size
    delta = rounding_of(whole, solved.a).square() * solved.deltas.square().sum(1)
    return math.sqrt(noise + float((delta * solved.a.square().sum(1)).sum()) / whole.mass**2)
