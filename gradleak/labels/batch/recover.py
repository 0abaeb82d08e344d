"""From the gradient of the head to every label and feature of a batch (ALGORITHMS §4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradleak.labels.batch.closed import Progress, solve_closed
from gradleak.labels.batch.joint import solve_jointly
from gradleak.labels.batch.judge import describe, explains, incomplete, judge, residual_of
from gradleak.labels.batch.polish import STEPS, Labels, Polished, polish
from gradleak.labels.batch.rows import read_rows, read_shared_rows
from gradleak.labels.batch.samples import ROUNDS, Found, find_mass, find_samples
from gradleak.labels.batch.simplify import prune, simplify
from gradleak.labels.batch.subspace import Subspace, subspace_of
from gradleak.labels.batch.twins import complete, laid_out
from gradleak.labels.counts import count_labels
from gradleak.labels.factorise import Rank
from gradleak.labels.options import LabelOptions
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import MIXED, Family

_LARGEST_SUPPORT = 2
# A mass this near the expected one, relative, is that.
_SAME_MASS = 1e-2
# Of a thousand equations to spare, noise does not leave so many times as much to the right answer.
_RIVAL = 1.5
# Labels (as vectors) nearer to one another are one.
_SAME_LABEL = 1e-2
# How far below zero rounding may carry an entry of a label.
_OUTSIDE = 1e-3


def recover_batch(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    rank: Rank,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    options: LabelOptions | None = None,
    progress: Progress | None = None,
) -> LabelResult:
    """Recover the soft labels and the head's input features of a batch.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None, ``rank``
    that of the gradient. Samples are found one by one in the gradient's subspace and polished
    together; the residual of the gradient re-simulated from them is the certificate. Where none is
    found, the loss may have been scaled, or summed; a scale that several samples agree on is taken
    for it. ``progress`` is told how many samples are found, and of how many.
    """
    options = LabelOptions() if options is None else options
    samples = options.samples(rank.rank)
    rank = replace(rank, rank=min(rank.rank, samples))
    with torch.inference_mode():
        whole = subspace_of(
            grad_weight,
            weight,
            bias,
            None if options.method == "scale" else grad_bias,
            rank=rank,
            samples=samples,
            loss_scale=options.loss_scale or 1.0,
        )
        result = _read_off(grad_weight, whole, rank, options, progress)
        if result is None or result.verdict == "failed":
            searched = _result(grad_weight, *_searched(whole, options, progress), rank, "subspace")
            if result is None or searched.verdict != "failed":
                result = searched
    if result.verdict in ("failed", "unidentifiable"):
        result = replace(result, counts=count_labels(grad_weight, weight, bias, grad_bias, samples))
    return _owned(result)


def _read_off(
    grad_weight: Tensor,
    whole: Subspace,
    rank: Rank,
    options: LabelOptions,
    progress: Progress | None,
) -> LabelResult | None:
    """Return what needs no search among samples: the first that does not fail, or the last."""
    asked = {family.name for family in options.families}
    last = None
    for method, solve in _DIRECT.items():
        found = solve(whole, options, progress)
        result = None if found is None else _result(grad_weight, whole, found, rank, method)
        if result is not None and {sample.family for sample in result.samples} <= asked:
            last = result
            if result.verdict != "failed":
                break
    return last


def _searched(
    whole: Subspace, options: LabelOptions, progress: Progress | None
) -> tuple[Subspace, tuple[Tensor, Labels] | None]:
    """Search sample by sample; return the subspace with the M that was found, and the answer."""
    dice = torch.Generator(device=whole.left.device).manual_seed(options.seed)
    families = [family for family in options.families if family.support <= _LARGEST_SUPPORT]
    whole, found = _first_round(whole, families, dice)
    jointly = complete(whole, found, families, dice)
    if jointly is None:
        more = range(1, ROUNDS)
        found = find_samples(whole, families, dice, progress, found=found, rounds=more)
        found = simplify(whole, found, families)
        if sum(len(f.roots.a) for f in found) < whole.size:
            jointly = complete(whole, found, families, dice)
            jointly = jointly or solve_jointly(whole, families, dice, progress)
    if jointly is not None:
        return whole, prune(whole, *jointly)
    return whole, laid_out(whole, found) if found else None


def _owned(result: LabelResult) -> LabelResult:
    """Return the result with ordinary tensors, which may take part in autograd."""
    if result.labels is None or result.features is None:
        return result
    with torch.inference_mode(False):
        return replace(result, labels=result.labels.clone(), features=result.features.clone())


def _read(
    whole: Subspace, options: LabelOptions, progress: Progress | None
) -> tuple[Tensor, Labels] | None:
    """Return coordinates and labels as the rows tell them, if they explain the gradient.

    None if there are other labels that do so as well. Who shares a class with whom is asked only
    where N is known: a sample more would leave the same rows.
    """
    explained = []
    shared = read_shared_rows(whole) if options.counted else ()
    for read in itertools.chain(read_rows(whole, counted=options.counted), shared):
        solved = polish(whole, *read)
        if _is_answer(whole, solved):
            explained.append(solved)
    if not explained:
        return None
    best = min(explained, key=lambda solved: solved.misfit)
    rivals = [other for other in explained if other.misfit < _RIVAL * best.misfit]
    if any(not _same_labels(best, other) for other in rivals):
        return None
    return prune(whole, best.a, best.labels)


def _is_answer(whole: Subspace, solved: Polished) -> bool:
    """Return whether the samples explain the gradient, with labels that are some."""
    inside = float(solved.labels.dense().min()) > -_OUTSIDE
    return inside and solved.freedom > 0 and explains(whole, solved)


def _same_labels(one: Polished, other: Polished) -> bool:
    """Return whether two answers have the same labels, in any order."""
    apart = torch.cdist(one.labels.dense(), other.labels.dense())
    return float(apart.amin(0).max()) < _SAME_LABEL


def _from_moments(
    whole: Subspace, options: LabelOptions, progress: Progress | None
) -> tuple[Tensor, Labels] | None:
    """Return coordinates and labels as the moments of the batch tell them, if they do."""
    found = solve_closed(whole, torch.Generator().manual_seed(options.seed), progress)
    return None if found is None else prune(whole, *found)


# In this order.
_DIRECT = {"rows": _read, "moments": _from_moments}


def _first_round(
    whole: Subspace, families: Sequence[Family], dice: torch.Generator
) -> tuple[Subspace, list[Found]]:
    """Return what one round of the search finds, and the subspace with the M under which it does.

    M is that of the mean of the losses if there are samples then; the next guess is the sum, and
    then whatever several samples agree on.
    """
    for mass in (whole.mass, 1.0):
        guess = replace(whole, mass=mass)
        found = find_samples(guess, families, dice, rounds=range(1))
        if found:
            return guess, found
    agreed = find_mass(whole, families, dice)
    if agreed is None or abs(agreed / whole.mass - 1.0) < _SAME_MASS:
        return whole, []
    whole = replace(whole, mass=agreed)
    return whole, find_samples(whole, families, dice, rounds=range(1))


def _result(
    grad_weight: Tensor,
    whole: Subspace,
    answer: tuple[Tensor, Labels] | None,
    rank: Rank,
    method: str,
) -> LabelResult:
    """Polish all samples together (of an incomplete batch, leave those found) and judge them."""
    if answer is None:
        verdict, reason = incomplete(whole, 0)
        return LabelResult(
            verdict, reason, method, None, whole.samples, rank=rank.rank, noise=rank.noise
        )
    count = len(answer[0])
    solved = polish(whole, *answer, steps=STEPS if count == whole.size else 0)
    samples = describe(whole, solved)
    order = sorted(range(count), key=lambda k: (samples[k].classes[0], -samples[k].weights[0]))
    samples = [samples[k] for k in order]
    labels, deltas = solved.labels.dense()[order], solved.deltas[order]
    features = (solved.a @ whole.right.T)[order]
    verdict, reason = judge(whole, solved, samples)
    names = {sample.family for sample in samples}
    return LabelResult(
        verdict=verdict,
        reason=reason + _of_the_loss(whole),
        method=method,
        family=names.pop() if len(names) == 1 else MIXED,
        batch_size=whole.samples,
        samples=tuple(samples),
        labels=labels.cpu(),
        features=features,
        residual=residual_of(grad_weight, deltas, features, whole.mass),
        rank=rank.rank,
        noise=rank.noise,
    )


def _of_the_loss(whole: Subspace) -> str:
    """Say what is known of a loss that is not the mean."""
    scale = whole.samples / whole.mass
    if abs(scale - 1.0) < 1e-9:
        return ""
    summed = " (the sum instead of the mean)" if abs(scale / whole.samples - 1.0) < 1e-3 else ""
    return f"; the loss was scaled by {scale:.6g}{summed}"
