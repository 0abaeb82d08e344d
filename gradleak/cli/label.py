"""``gradleak recover-label``: the soft label behind a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import (
    Console,
    Report,
    check_output,
    choose_inputs,
    exit_code_of,
    keep_apart,
    number,
    run_stage_on_all,
)
from gradleak.cli.options import (
    ATTACK,
    Device,
    HeadName,
    Inputs,
    Json,
    OutputBundle,
    Quiet,
    Seed,
    Weights,
)
from gradleak.errors import GradleakError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gradleak.bundle import Bundle
    from gradleak.labels.verdict import SampleLabel
    from gradleak.stages.label import LabelOutcome

NAME = "recover-label"
EXAMPLE = "gradleak recover-label grads.safetensors"
_SHOWN = 8
_NOTHING: dict[str, object] = {
    "method": None,
    "family": None,
    "batch_size": None,
    "samples": [],
    "residual": None,
    "noise": None,
    "loss_scale": None,
    "alternatives": [],
    "intervals": [],
    "head": None,
    "device": None,
    "seconds": None,
}


def command(
    context: typer.Context,
    inputs: Inputs = None,
    family: Annotated[
        str,
        typer.Option(
            help="auto, hard, smooth, mixup, mixup+smooth, mixup3 or mixup3+smooth; auto lets the "
            "gradient decide.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="auto, bias (closed form) or scale (search; a bias gradient is ignored); auto "
            "takes the closed form where the bias gradient is there.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    noise_std: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="STD",
            help="Standard deviation of the noise on every entry of the gradient, in the "
            "gradient's units, from 0; 0 is none. Default: estimated.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    loss_scale: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR",
            help="What the loss was multiplied by, a positive number, or unknown: then it is "
            "recovered with the label. Default: 1.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    head: HeadName = None,
    weights: Weights = None,
    output: OutputBundle = None,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Recover the soft label of the sample behind each gradient, with its certainty.

    Several gradients are solved together, those with heads of one shape in one computation.

    Exit code 0 when the answer is unique, 4 when it is ambiguous, unidentifiable or failed.
    """
    sources = choose_inputs(context, inputs)
    outputs = check_output(output, sources)
    keep_apart(output, weights)
    from gradleak.stages.label import recover_labels

    def work(
        bundles: Iterable[Bundle | GradleakError],
    ) -> Iterator[tuple[Report, Bundle] | GradleakError]:
        outcomes = recover_labels(
            bundles,
            family=family,
            method=method,
            noise_std=noise_std,
            loss_scale=_factor(loss_scale),
            head=head,
            weights=weights,
            device=device,
            seed=seed,
        )
        return (
            outcome
            if isinstance(outcome, GradleakError)
            else (_report(source, outcome), outcome.bundle)
            for source, outcome in zip(sources, outcomes, strict=True)
        )

    console = Console(json=json, quiet=quiet, outputs=outputs)
    run_stage_on_all(console, NAME, sources, work, _NOTHING)


def _factor(text: str | None) -> float | str | None:
    """Return the number that ``text`` is, or the text for the stage to judge."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _report(source: str, outcome: LabelOutcome) -> Report:
    result = outcome.result
    rows = [("verdict", f"{result.verdict}: {result.reason}")]
    if result.samples:
        sample = result.samples[0]
        rows += [("family", sample.family), *_entries(sample)]
        rows.append(("scale", f"{sample.scale:.6g} ± {number(sample.scale_error, 2)}"))
        if sample.loss_scale is not None:
            found = f"{sample.loss_scale:.6g} ± {number(sample.loss_scale_error, 2)}"
            rows.append(("loss scale", found))
    rows += [
        ("", f"or {other.family}: {_brief(other)}, scale {other.scale:.6g}")
        for other in result.alternatives
    ]
    rows += [
        ("", f"valid for every scale in [{i.low:.4g}, {i.high:.4g}]") for i in result.intervals
    ]
    rows += [
        ("method", result.method),
        ("head", outcome.head),
        ("residual", number(result.residual)),
        ("noise", number(result.noise)),
        ("rank", str(result.rank)),
        ("column sums", f"{number(result.column_sums)} of the gradient's size (Theorem 1: 0)"),
        ("solved in", f"{1e3 * result.seconds:.1f} ms on {outcome.device}"),
    ]
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
        "rank": result.rank,
        "column_sums": result.column_sums,
        "alternatives": [_sample(sample) for sample in result.alternatives],
        "intervals": [[i.low, i.high] for i in result.intervals],
        "head": outcome.head,
        "device": outcome.device,
        "seconds": result.seconds,
    }
    return Report(source, rows, data, exit_code_of(result.verdict))


def _entries(sample: SampleLabel) -> list[tuple[str, str]]:
    rows = [
        (f"class {index}", f"{weight:.6f} ± {number(error, 2)}")
        for index, weight, error in zip(
            sample.classes[:_SHOWN], sample.weights, sample.weight_errors, strict=False
        )
    ]
    hidden = len(sample.classes) - _SHOWN
    if hidden > 0:
        rows.append(("", f"and {hidden} more classes (--json lists them all)"))
    if sample.base > 0:
        rows.append(("other classes", f"{sample.base:.6g} ± {number(sample.base_error, 2)} each"))
    return rows


def _brief(sample: SampleLabel) -> str:
    shown = list(zip(sample.classes, sample.weights, strict=True))[:3]
    return ", ".join(f"class {index} {weight:.4f}" for index, weight in shown)


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
    }
