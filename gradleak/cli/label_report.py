"""The report of ``gradleak recover-label``: rows for the eye, and a JSON object."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradleak.cli.common import Report, exit_code_of, number

if TYPE_CHECKING:
    from gradleak.labels.counts import ClassCounts
    from gradleak.labels.decay import WeightDecay
    from gradleak.labels.verdict import Interval, LabelIntervals, SampleLabel
    from gradleak.stages.label import LabelOutcome

NAME = "recover-label"
_SHOWN = 8


def label_report(source: str, outcome: LabelOutcome, plot: str | None) -> Report:
    """Report what was recovered from ``source``; ``plot`` is the picture's file."""
    result = outcome.result
    rows = [("verdict", f"{result.verdict}: {result.reason}")]
    if len(result.samples) == 1:
        sample = result.samples[0]
        rows += [("family", sample.family), *_entries(sample)]
        stated = sample.intervals
        scale = f"{sample.scale:.6g} ± {number(sample.scale_error, 2)}"
        rows.append(("scale", scale + ("" if stated is None else _interval(stated.scale))))
        if sample.loss_scale is not None:
            found = f"{sample.loss_scale:.6g} ± {number(sample.loss_scale_error, 2)}"
            bounds = None if stated is None else stated.loss_scale
            rows.append(("loss scale", found + ("" if bounds is None else _interval(bounds))))
    elif result.samples:
        rows.append(("samples", f"{len(result.samples)} of {result.batch_size}"))
        rows += [(f"sample {n}", _line(sample)) for n, sample in enumerate(result.samples)]
    rows += [
        ("", f"or {other.family}: {_brief(other)}, scale {other.scale:.6g}")
        for other in result.alternatives
    ]
    rows += [
        ("", f"valid for every scale in [{i.low:.4g}, {i.high:.4g}]") for i in result.intervals
    ]
    if result.counts is not None:
        rows.append(("hard labels", _estimate(result.counts)))
    rows += [
        ("method", result.method),
        ("head", outcome.head),
        ("residual", number(result.residual)),
        ("noise", number(result.noise)),
        ("rank", str(result.rank)),
        ("column sums", f"{number(result.column_sums)} of the gradient's size (Theorem 1: 0)"),
        ("solved in", f"{1e3 * result.seconds:.1f} ms on {outcome.device}"),
    ]
    if outcome.weight_decay is not None:
        rows.insert(1, ("weight decay", _decay(outcome.weight_decay)))
    if plot is not None:
        rows.append(("wrote", plot))
    data: dict[str, object] = {
        "input": source,
        "stage": NAME,
        "verdict": result.verdict,
        "reason": result.reason,
        "method": result.method,
        "family": result.family,
        "batch_size": result.batch_size,
        "samples": [_sample(sample) for sample in result.samples],
        "residual": result.residual,
        "noise": result.noise,
        "loss_scale": _loss_scale(result.samples),
        "weight_decay": None if outcome.weight_decay is None else outcome.weight_decay.rate,
        "rank": result.rank,
        "column_sums": result.column_sums,
        "alternatives": [_sample(sample) for sample in result.alternatives],
        "intervals": [[i.low, i.high] for i in result.intervals],
        "counts": None if result.counts is None else _counts(result.counts),
        "plot": plot,
        "head": outcome.head,
        "device": outcome.device,
        "seconds": result.seconds,
    }
    return Report(source, rows, data, exit_code_of(result.verdict))


def _entries(sample: SampleLabel) -> list[tuple[str, str]]:
    stated = sample.intervals
    bounds = [""] * len(sample.classes)
    if stated is not None:
        bounds = [_interval(interval) for interval in stated.weights]
    rows = [
        (f"class {index}", f"{weight:.6f} ± {number(error, 2)}{interval}")
        for index, weight, error, interval in zip(
            sample.classes[:_SHOWN], sample.weights, sample.weight_errors, bounds, strict=False
        )
    ]
    hidden = len(sample.classes) - _SHOWN
    if hidden > 0:
        rows.append(("", f"and {hidden} more classes (--json lists them all)"))
    base = None if stated is None else stated.base
    if sample.base > 0 or base is not None:
        each = f"{sample.base:.6g} ± {number(sample.base_error, 2)} each"
        rows.append(("other classes", each + ("" if base is None else _interval(base))))
    return rows


def _interval(interval: Interval) -> str:
    return f" (95 %: {interval.low:.6g} … {interval.high:.6g})"


def _line(sample: SampleLabel) -> str:
    """Describe one sample of a batch in a line."""
    base = f", others {sample.base:.4g}" if sample.base > 0 else ""
    return f"{sample.family}: {_brief(sample)}{base} (± {number(sample.uncertainty(), 1)})"


def _estimate(counts: ClassCounts) -> str:
    """Say how many samples of a batch seem to be of each class, and what that is worth."""
    present = [(k, n) for k, n in enumerate(counts.counts.tolist()) if n]
    shown = ", ".join(f"{n} of class {k}" for k, n in sorted(present, key=lambda x: -x[1])[:_SHOWN])
    more = ", …" if len(present) > _SHOWN else ""
    worth = "consistent" if counts.consistent else "not consistent"
    return f"estimate: {shown}{more} ({worth}: {counts.reason})"


def _counts(counts: ClassCounts) -> dict[str, object]:
    return {
        "counts": counts.counts.tolist(),
        "fractions": counts.fractions.tolist(),
        "residual": counts.residual,
        "disagreement": counts.disagreement,
        "confidence": counts.confidence,
        "consistent": counts.consistent,
        "reason": counts.reason,
    }


def _brief(sample: SampleLabel) -> str:
    shown = list(zip(sample.classes, sample.weights, strict=True))[:3]
    return ", ".join(f"class {index} {weight:.4f}" for index, weight in shown)


def _decay(decay: WeightDecay) -> str:
    """Say what weight decay was taken off, and what of biases."""
    biases = "not of biases" if decay.of_bias is False else "of biases as well"
    return f"{decay.rate:.4g} {biases}: recognised by the column sums, and taken off"


def _loss_scale(samples: tuple[SampleLabel, ...]) -> dict[str, object] | None:
    """Return the recovered factor of the loss, None where it was given."""
    if not samples or samples[0].loss_scale is None:
        return None
    return {"value": samples[0].loss_scale, "uncertainty": samples[0].loss_scale_error}


def _sample(sample: SampleLabel) -> dict[str, object]:
    return {
        "family": sample.family,
        "classes": list(sample.classes),
        "weights": list(sample.weights),
        "base": sample.base,
        "scale": sample.scale,
        "uncertainty": {
            "weights": list(sample.weight_errors),
            "base": sample.base_error,
            "scale": sample.scale_error,
        },
        "intervals": None if sample.intervals is None else _intervals(sample.intervals),
    }


def _intervals(stated: LabelIntervals) -> dict[str, object]:
    """Return the 95 % intervals, null for an end that nothing bounds and for what has none."""
    return {
        "weights": [_ends(interval) for interval in stated.weights],
        "base": _ends(stated.base),
        "scale": _ends(stated.scale),
        "loss_scale": _ends(stated.loss_scale),
    }


def _ends(interval: Interval | None) -> list[float | None] | None:
    if interval is None:
        return None
    return [end if math.isfinite(end) else None for end in (interval.low, interval.high)]
