"""``gradleak recover-label``: the soft label behind a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import (
    STDIO,
    Console,
    Report,
    check_output,
    choose_inputs,
    keep_apart,
    printable,
    run_stage_on_all,
)
from gradleak.cli.label_report import NAME, label_report
from gradleak.cli.options import (
    ATTACK,
    OUTPUT,
    Device,
    HeadName,
    Inputs,
    Json,
    OutputBundle,
    Quiet,
    Seed,
    Weights,
)
from gradleak.errors import GradleakError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gradleak.bundle import Bundle
    from gradleak.stages.label import LabelOutcome

EXAMPLE = "gradleak recover-label grads.safetensors"
_NOTHING: dict[str, object] = {
    "method": None,
    "family": None,
    "batch_size": None,
    "samples": [],
    "residual": None,
    "noise": None,
    "loss_scale": None,
    "weight_decay": None,
    "alternatives": [],
    "intervals": [],
    "counts": None,
    "plot": None,
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
            help="auto, bias (closed form), scale (search; a bias gradient is ignored) or paper "
            "(the published search, a baseline: --family smooth or mixup); auto takes the closed "
            "form where the bias gradient is there.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    paper_divisor: Annotated[
        float | None,
        typer.Option(
            help="With --method paper: what its gradient row is divided by, above 0; published: "
            "1, 2 or 4, set by hand. Default: 1.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
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
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Number of samples, from 1. Default: the rank of the head's gradient, or what "
            "the bundle records if that is more.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    loss_scale: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR",
            help="What the loss was multiplied by, a positive number, or unknown: then it is "
            "recovered with the label. Default: 1, and what else a single sample's label needs.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    head: HeadName = None,
    weights: Weights = None,
    output: OutputBundle = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Draw the residuals over the scale and the label into FILE, a .png, .pdf or .svg; "
            "needs matplotlib (the extra plot). Default: none.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
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
    _check_plot(plot, output, weights, sources)
    from gradleak.labels.paper_search import PaperOptions
    from gradleak.stages.label import recover_labels

    paper = None if paper_divisor is None else PaperOptions(divisor=paper_divisor)

    def work(
        bundles: Iterable[Bundle | GradleakError],
    ) -> Iterator[tuple[Report, Bundle] | GradleakError]:
        outcomes = recover_labels(
            bundles,
            family=family,
            method=method,
            batch_size=batch_size,
            noise_std=noise_std,
            loss_scale=_factor(loss_scale),
            head=head,
            weights=weights,
            paper=paper,
            device=device,
            seed=seed,
        )
        return map(answer, sources, outcomes)

    def answer(
        source: str, outcome: LabelOutcome | GradleakError
    ) -> tuple[Report, Bundle] | GradleakError:
        if isinstance(outcome, GradleakError):
            return outcome
        if plot is not None:
            _draw(plot, source, weights, outcome)
        return label_report(source, outcome, plot), outcome.bundle

    console = Console(json=json, quiet=quiet, outputs=outputs)
    run_stage_on_all(console, NAME, sources, work, _NOTHING)


def _check_plot(
    plot: str | None, output: str | None, weights: str | None, sources: list[str]
) -> None:
    """Refuse, before any work, a picture that cannot be drawn or would replace another file."""
    if plot is None:
        return
    if len(sources) > 1:
        raise UsageError(
            f"--plot takes one input, and {len(sources)} were given",
            "run the command once per input",
        )
    if plot == STDIO:
        raise UsageError("--plot does not go to standard output", "give it a file name")
    from gradleak.plots import check_plot

    check_plot(plot)
    check_output(plot)
    keep_apart(plot, output, weights, *sources)


def _draw(plot: str, source: str, weights: str | None, outcome: LabelOutcome) -> None:
    from gradleak.plots import save_label_plot
    from gradleak.stages.label import label_curves

    curves = label_curves(outcome, weights=weights)
    title = "standard input" if source == STDIO else Path(source).name
    save_label_plot(plot, curves, outcome.result, printable(title))


def _factor(text: str | None) -> float | str | None:
    """Return the number that ``text`` is, or the text for the stage to judge."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
