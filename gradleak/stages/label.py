"""Stage ``recover-label``: from the head's gradient to the soft label."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradleak.bundle import FEATURE, LABEL, LOSS_SCALE, WEIGHT_DECAY, Bundle, StageRecord
from gradleak.device import resolve_device
from gradleak.errors import GradleakError, UsageError
from gradleak.head import Head, read_head
from gradleak.labels.curves import Curves, scale_curves
from gradleak.labels.decay import WeightDecay, find_weight_decay
from gradleak.labels.options import LabelOptions
from gradleak.labels.paper import recover_paper, require_family
from gradleak.labels.paper_search import PaperOptions
from gradleak.labels.single import recover_singles
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import families

Progress = Callable[[int, int], None]
"""Told how many samples of a batch are found, and of how many."""

METHODS = ("auto", "bias", "scale", "paper")
UNKNOWN = "unknown"
# Heads held at once: how many, each with its file open, and values of their gradients.
_HEADS, _VALUES = 256, 1 << 24


@dataclass(frozen=True)
class LabelOutcome:
    """The enriched ``bundle``, the ``result``, the head it was read from and the device used.

    ``weight_decay`` was recognised in the gradient and taken off, None where there was no sign.
    """

    bundle: Bundle
    result: LabelResult
    head: str
    device: str
    weight_decay: WeightDecay | None = None


@dataclass(frozen=True)
class _Attack:
    """What is asked for, and what it was called: ``arguments`` go on record."""

    family: str
    options: LabelOptions
    scale_stated: bool
    paper: PaperOptions | None
    head: str | None
    weights: Path | str | None
    device: torch.device
    arguments: dict[str, object]
    progress: Progress | None


@dataclass(frozen=True)
class _Taken:
    """A bundle's head as it is solved: what was recognised as weight ``decay`` is off it."""

    bundle: Bundle
    head: Head
    decay: WeightDecay | None


def recover_label(
    bundle: Bundle,
    *,
    family: str = "auto",
    method: str = "auto",
    batch_size: int | None = None,
    noise_std: float | None = None,
    loss_scale: float | str | None = None,
    head: str | None = None,
    weights: Path | str | None = None,
    paper: PaperOptions | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> LabelOutcome:
    """Recover the soft labels of the samples behind a gradient bundle.

    Reads the head's tensors only. ``family`` is one of ``softlabels.FAMILIES`` or ``auto``;
    ``method`` is ``bias`` (closed form), ``scale`` (the search, bias gradient ignored), ``auto`` of
    the two, or ``paper`` (the baseline, with the options ``paper``; ``seed`` is its swarm's);
    ``batch_size`` is the number of samples, the rank of the gradient unless given;
    ``noise_std`` is the standard deviation of the noise on every entry of the gradient, in its own
    units, 0 for none; by default it is estimated. ``loss_scale`` is the factor of the loss, a
    positive number or ``unknown``; by default it is 1, and recovered where the label of a single
    sample fits with another alone. Weight decay is recognised and taken off (``weight_decay`` of
    the outcome; ``label/weight_decay``), so that later stages do the same.
    ``head`` overrides the search for the classifier; ``weights`` is a state-dict file for a bundle
    without weights. The label goes to ``label/soft`` (N, C) float64, whatever the verdict.

    Raises :class:`GradleakError` subclasses as ``read_head`` and ``recover_single`` do.
    """
    attack = _attack(
        family,
        method,
        batch_size,
        noise_std,
        loss_scale,
        paper,
        head,
        weights,
        device,
        seed,
        progress,
    )
    (outcome,) = _recover([bundle], attack)
    if isinstance(outcome, GradleakError):
        raise outcome
    return outcome


def recover_labels(
    bundles: Iterable[Bundle | GradleakError],
    *,
    family: str = "auto",
    method: str = "auto",
    batch_size: int | None = None,
    noise_std: float | None = None,
    loss_scale: float | str | None = None,
    head: str | None = None,
    weights: Path | str | None = None,
    paper: PaperOptions | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[LabelOutcome | GradleakError]:
    """Recover the labels of many bundles, those with heads of one shape in one computation.

    The options are those of :func:`recover_label`. Yields in the order of the bundles, each as
    :func:`recover_label` answers for it alone, its seconds its share of the computation; what that
    would raise stands in the outcome's place, and an error among the ``bundles`` is handed on.
    Bundles are taken as they are needed, so memory does not grow with their number.

    Raises :class:`UsageError` for an unknown family, method or device.
    """
    return _recover(
        bundles,
        _attack(
            family,
            method,
            batch_size,
            noise_std,
            loss_scale,
            paper,
            head,
            weights,
            device,
            seed,
            progress,
        ),
    )


def _attack(
    family: str,
    method: str,
    batch_size: int | None,
    noise_std: float | None,
    loss_scale: float | str | None,
    paper: PaperOptions | None,
    head: str | None,
    weights: Path | str | None,
    device: str,
    seed: int,
    progress: Progress | None,
) -> _Attack:
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"choose one of {', '.join(METHODS)}")
    if method == "paper":
        require_family(family)
    elif paper is not None:
        raise UsageError(
            f"method '{method}' does not take the options of 'paper'", "add --method paper"
        )
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size {batch_size} is below 1", "give the number of samples")
    if noise_std is not None and not 0.0 <= noise_std < math.inf:
        raise UsageError(f"the noise std {noise_std} is no std", "give a number from 0")
    if not (
        loss_scale is None
        or loss_scale == UNKNOWN
        or (isinstance(loss_scale, int | float) and 0.0 < loss_scale < math.inf)
    ):
        raise UsageError(
            f"the loss scale {loss_scale!r} is neither a positive number nor '{UNKNOWN}'",
            f"give the factor of the loss, or {UNKNOWN}",
        )
    arguments: dict[str, object] = {
        "family": family,
        "method": method,
        "batch_size": batch_size,
        "noise_std": noise_std,
        "loss_scale": loss_scale,
    }
    options = LabelOptions(
        families=families(family),
        method=method,
        batch_size=batch_size,
        noise_std=noise_std,
        loss_scale=_known_scale(loss_scale),
        recognise=loss_scale is None,
        seed=seed,
    )
    where = resolve_device(device)
    stated = loss_scale is not None
    return _Attack(family, options, stated, paper, head, weights, where, arguments, progress)


def _recover(
    bundles: Iterable[Bundle | GradleakError], attack: _Attack
) -> Iterator[LabelOutcome | GradleakError]:
    """Read heads until there are enough of them, and solve them together."""
    taken: list[_Taken | GradleakError] = []
    values = 0
    for bundle in bundles:
        try:
            if isinstance(bundle, GradleakError):
                raise bundle
            read = _read(bundle, attack)
        except GradleakError as error:
            taken.append(error)
        else:
            taken.append(read)
            values += read.head.grad_weight.numel()
        if len(taken) >= _HEADS or values >= _VALUES:
            yield from _solve(taken, attack)
            taken, values = [], 0
    yield from _solve(taken, attack)


def _read(bundle: Bundle, attack: _Attack) -> _Taken:
    head = read_head(
        bundle,
        name=attack.head,
        weights=attack.weights,
        device=attack.device,
        scaled=attack.scale_stated,
    )
    if attack.options.method == "bias" and head.grad_bias is None:
        raise UsageError(
            f"method 'bias' needs grad/{head.name}.bias, which the bundle does not hold",
            "use --method scale",
        )
    decay = find_weight_decay(head.grad_weight, head.weight, head.grad_bias, head.bias)
    return _Taken(bundle, head if decay is None else _without(head, decay), decay)


def _without(head: Head, decay: WeightDecay) -> Head:
    """Return the head with weight decay taken off its gradients."""
    kind = head.grad_weight.dtype
    weight = (head.grad_weight.double() - decay.rate * head.weight.double()).to(kind)
    bias = head.grad_bias
    if bias is not None and head.bias is not None and decay.of_bias:
        bias = (bias.double() - decay.rate * head.bias.double()).to(kind)
    return replace(head, grad_weight=weight, grad_bias=bias)


def _solve(
    taken: list[_Taken | GradleakError], attack: _Attack
) -> list[LabelOutcome | GradleakError]:
    """Solve the heads that were taken, those of the same shapes and dtypes in one call."""
    found: dict[int, LabelOutcome | GradleakError] = {}
    groups: dict[object, list[tuple[int, _Taken]]] = {}
    for index, item in enumerate(taken):
        if isinstance(item, GradleakError):
            found[index] = item
        else:
            groups.setdefault(_kind(item.bundle, item.head), []).append((index, item))
    for group in groups.values():
        size = group[0][1].bundle.batch_size
        solved = _solve_alike([item.head for _, item in group], size, attack)
        for (index, item), result in zip(group, solved, strict=True):
            try:
                found[index] = _outcome(item, result, attack)
            except GradleakError as error:
                found[index] = error
    return [found[index] for index in range(len(taken))]


def _kind(bundle: Bundle, head: Head) -> object:
    """Return what heads have in common that can be solved in one call."""
    tensors = (head.grad_weight, head.weight, head.bias, head.grad_bias)
    return bundle.batch_size, *(None if t is None else (t.shape, t.dtype) for t in tensors)


def _solve_alike(
    heads: list[Head], size: int | None, attack: _Attack
) -> list[LabelResult | GradleakError]:
    """Solve heads of one kind, whose bundles record ``size`` samples; share the time out."""
    if attack.options.method == "paper":
        return [_solve_as_published(head, attack) for head in heads]
    start = time.perf_counter()
    results = recover_singles(
        _stack([head.grad_weight for head in heads]),
        _shared([head.weight for head in heads]),
        bias=None if heads[0].bias is None else _shared([_given(h.bias) for h in heads]),
        grad_bias=(
            None
            if heads[0].grad_bias is None
            else _stack([_given(head.grad_bias) for head in heads])
        ),
        options=replace(attack.options, recorded_size=size),
        progress=attack.progress,
    )
    seconds = (time.perf_counter() - start) / len(heads)
    return [r if isinstance(r, GradleakError) else replace(r, seconds=seconds) for r in results]


def _solve_as_published(head: Head, attack: _Attack) -> LabelResult | GradleakError:
    """Solve one head by the published search."""
    start = time.perf_counter()
    try:
        result = recover_paper(
            head.grad_weight,
            head.weight,
            bias=head.bias,
            family=attack.family,
            options=attack.paper,
            generator=torch.Generator().manual_seed(attack.options.seed),
        )
    except GradleakError as error:
        return error
    return replace(result, seconds=time.perf_counter() - start)


def _known_scale(loss_scale: float | str | None) -> float | None:
    """Return the factor of the loss, None where it is unknown."""
    if loss_scale is None:
        return 1.0
    return None if isinstance(loss_scale, str) else float(loss_scale)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # heads of one kind all have it
    return tensor


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # without a copy


def _shared(tensors: list[Tensor]) -> Tensor:
    """Return the tensor that all of them are, as for gradients of one network, or their stack."""
    first = tensors[0]
    same = all(other is first or torch.equal(other, first) for other in tensors)
    return first if same else torch.stack(tensors)


def _outcome(item: _Taken, result: LabelResult | GradleakError, attack: _Attack) -> LabelOutcome:
    """Put the result into its bundle; raises the error that is in its place."""
    if isinstance(result, GradleakError):
        raise result
    bundle, head, decay = item.bundle, item.head, item.decay
    if bundle.local_steps > 1 and result.verdict == "unique":
        why = f"but the gradient is a mean over {bundle.local_steps} steps, whose drift no ± covers"
        result = replace(result, verdict="ambiguous", reason=f"{result.reason}; {why}")
    record = StageRecord(
        "recover-label",
        {**attack.arguments, "head": head.name},
        seed=attack.options.seed,
        device=str(attack.device),
        seconds=result.seconds,
        verdict=result.verdict,
    )
    found = {} if result.labels is None else {LABEL: result.labels}
    if result.batch_size == len(result.samples) > 1 and result.features is not None:
        # Labels and features of a batch are found together; recover-feature need not do it again.
        found[FEATURE + head.name] = result.features.cpu()
    recovered = result.samples[0].loss_scale if result.samples else None
    scale = recovered or attack.options.loss_scale or 1.0
    if found and (attack.scale_stated or scale != 1.0 or LOSS_SCALE in bundle):
        found[LOSS_SCALE] = torch.tensor(scale, dtype=torch.float64)
    if decay is not None or WEIGHT_DECAY in bundle:
        found[WEIGHT_DECAY] = torch.tensor(_rates(decay), dtype=torch.float64)
    extended = bundle.extended(found, record=record)
    return LabelOutcome(extended, result, head.name, str(attack.device), decay)


def _rates(decay: WeightDecay | None) -> tuple[float, float, float]:
    """Return λ, that of biases and the error of λ: of biases too, unless their sum says no."""
    if decay is None:
        return 0.0, 0.0, 0.0
    return decay.rate, 0.0 if decay.of_bias is False else decay.rate, decay.error


def label_curves(outcome: LabelOutcome, *, weights: Path | str | None = None) -> Curves:
    """Sample the search behind an ``outcome`` over the scale, for a picture of it.

    ``weights`` are those that ``recover_label`` was given. Raises
    :class:`UsageError` unless the gradient is of a single sample.
    """
    layer = read_head(outcome.bundle, name=outcome.head, weights=weights, device=outcome.device)
    return scale_curves(layer.grad_weight, layer.weight, layer.bias, outcome.result)
