"""Stage ``recover-label``: from the head's gradient to the soft label."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gradleak.bundle import LABEL, Bundle, StageRecord
from gradleak.device import resolve_device
from gradleak.errors import UsageError
from gradleak.head import read_head
from gradleak.labels.paper import recover_paper, require_family
from gradleak.labels.paper_search import PaperOptions
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import families

METHODS = ("auto", "bias", "scale", "paper")


@dataclass(frozen=True)
class LabelOutcome:
    """The enriched ``bundle``, the ``result``, the head it was read from and the device used."""

    bundle: Bundle
    result: LabelResult
    head: str
    device: str


def recover_label(
    bundle: Bundle,
    *,
    family: str = "auto",
    method: str = "auto",
    head: str | None = None,
    weights: Path | str | None = None,
    paper: PaperOptions | None = None,
    device: str = "auto",
    seed: int = 0,
) -> LabelOutcome:
    """Recover the soft label of the sample behind a gradient bundle.

    Reads the head's tensors only. ``family`` is one of ``softlabels.FAMILIES`` or ``auto``;
    ``method`` is ``bias`` (closed form), ``scale`` (the search, bias gradient ignored), ``auto`` of
    the two, or ``paper`` (the baseline, with the options ``paper``; ``seed`` is its swarm's);
    ``head`` overrides the search for the classifier; ``weights`` is a state-dict file for a bundle
    without weights. The label goes to ``label/soft`` (N, C) float64, whatever the verdict.

    Raises :class:`GradleakError` subclasses as ``read_head`` and ``recover_single`` do.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"choose one of {', '.join(METHODS)}")
    chosen = families(family)
    if method == "paper":
        require_family(family)
    elif paper is not None:
        raise UsageError(
            f"method '{method}' does not take the options of 'paper'", "add --method paper"
        )
    where = resolve_device(device)
    layer = read_head(bundle, name=head, weights=weights, device=where)
    if method == "bias" and layer.grad_bias is None:
        raise UsageError(
            f"method 'bias' needs grad/{layer.name}.bias, which the bundle does not hold",
            "use --method scale",
        )
    start = time.perf_counter()
    if method == "paper":
        result = recover_paper(
            layer.grad_weight,
            layer.weight,
            bias=layer.bias,
            family=family,
            options=paper,
            generator=torch.Generator().manual_seed(seed),
        )
    else:
        result = recover_single(
            layer.grad_weight,
            layer.weight,
            bias=layer.bias,
            grad_bias=layer.grad_bias,
            families=chosen,
            method=method,
        )
    result = replace(result, seconds=time.perf_counter() - start)
    record = StageRecord(
        "recover-label",
        {"family": family, "method": method, "head": layer.name},
        seed=seed,
        device=str(where),
        seconds=result.seconds,
        verdict=result.verdict,
    )
    found = {} if result.labels is None else {LABEL: result.labels}
    return LabelOutcome(bundle.extended(found, record=record), result, layer.name, str(where))
