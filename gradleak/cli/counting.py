"""``gradleak reconstruct --dry-run``: what a network's gradient would give away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from gradleak.cli.common import Console, Report, choose_inputs, number, run_stage
from gradleak.cli.options import with_model_args
from gradleak.cli.progress import progress_display
from gradleak.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradleak.bundle import Bundle
    from gradleak.calculus.counting import LayerCount
    from gradleak.stages.counting import LeakCount

STAGE, DRY_RUN = "reconstruct", "Dry run"

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only count what can be recovered, layer by layer: of a bundle's network, or of "
        "--model without any bundle. It needs no gradient: one of synthetic pictures is attacked.",
        rich_help_panel=DRY_RUN,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Number of classes of --model, from 2. Default: the network's own.",
        show_default=False,
        rich_help_panel=DRY_RUN,
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Input height and width of --model in pixels, from 1. Default: the network's own.",
        show_default=False,
        rich_help_panel=DRY_RUN,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images whose gradient is shared, from 1. Default: the bundle's, or 1.",
        show_default=False,
        rich_help_panel=DRY_RUN,
    ),
]
_NOTHING: dict[str, object] = {
    "dry_run": True,
    "model": None,
    "input_shape": None,
    "weights": None,
    "precision": None,
    "layers": [],
    "recovered": None,
    "inputs": None,
    "stopped": [],
}


@dataclass(frozen=True)
class Asked:
    """The options of a dry run."""

    model: str | None
    classes: int | None
    size: int | None
    samples: int | None
    weights: str | None
    time_limit: float
    device: str
    seed: int
    arguments: dict[str, object] = field(default_factory=dict)


def count(
    context: typer.Context,
    inputs: Sequence[str] | None,
    asked: Asked,
    outputs: Sequence[object],
    console: Console,
) -> NoReturn:
    """Print the table of each bundle's network, or of ``asked.model`` where no bundle is named."""
    if any(outputs):
        raise UsageError("--dry-run writes no file", "leave -o and --sheet out")
    if inputs or asked.model is None:
        if asked.classes or asked.size:
            raise UsageError(
                "--classes and --size are for --dry-run without a bundle, which has its own",
                "leave them out",
            )
        run_stage(
            console, STAGE, choose_inputs(context, inputs), _counter(asked, console), _NOTHING
        )
    else:
        console.report(_report(None, _counted(None, asked, console), asked))
    console.finish()


def refuse_without_dry_run(*options: int | None) -> None:
    """Refuse the options that only a dry run takes."""
    if any(option is not None for option in options):
        raise UsageError("--classes, --size and --batch-size go with --dry-run", "add --dry-run")


def _counter(asked: Asked, console: Console) -> Callable[[str, Bundle], tuple[Report, Bundle]]:
    def work(source: str, bundle: Bundle) -> tuple[Report, Bundle]:
        return _report(source, _counted(bundle, asked, console), asked), bundle

    return work


def _counted(bundle: Bundle | None, asked: Asked, console: Console) -> LeakCount:
    from gradleak.stages.counting import count_leak

    with progress_display(console.quiet or console.json) as progress:
        return count_leak(
            None if bundle is None else with_model_args(bundle, asked.arguments),
            model=asked.model,
            classes=asked.classes,
            size=asked.size,
            samples=asked.samples,
            weights=asked.weights,
            options=asked.arguments,
            patience=asked.time_limit,
            device=asked.device,
            seed=asked.seed,
            progress=progress,
        )


def _report(source: str | None, leak: LeakCount, asked: Asked) -> Report:
    images = f"{leak.samples} image{'s' if leak.samples > 1 else ''}"
    shape = "×".join(map(str, leak.shape))
    drawn = (
        f"random weights from seed {asked.seed}" if leak.weights == "random" else "given weights"
    )
    rows = [
        ("dry run", f"{images} of {shape}, {drawn}; label and head feature taken as recovered"),
        (
            "simulated",
            f"conditions and verdicts are of the {leak.precision} gradient of smooth synthetic "
            "pictures",
        ),
        *_table(leak.layers),
        *(("stopped at", barrier) for barrier in leak.barriers),
        ("maps", f"{leak.maps} of the {leak.inputs} inputs of layers recovered"),
        ("image", f"{leak.image}: {leak.reason}"),
        ("counted in", f"{leak.seconds:.3g} s on {leak.device}"),
    ]
    data: dict[str, object] = {
        **_NOTHING,
        "input": source,
        "stage": STAGE,
        "verdict": leak.image,
        "reason": leak.reason,
        "batch_size": leak.samples,
        "model": leak.model,
        "input_shape": list(leak.shape),
        "weights": leak.weights,
        "precision": leak.precision,
        "layers": [_layer(layer) for layer in leak.layers],
        "recovered": leak.maps,
        "inputs": leak.inputs,
        "stopped": list(leak.barriers),
        "device": leak.device,
        "seconds": leak.seconds,
    }
    return Report(source or leak.model or "network", rows, data)


def _table(layers: Sequence[LayerCount]) -> list[tuple[str, str]]:
    """Return a heading and one row a layer, their columns aligned."""
    cells = [("its input", "equations:unknowns", "tightest group", "condition", "verdict")]
    cells += [_cells(layer) for layer in layers]
    widths = [max(len(row[n]) for row in cells) for n in range(4)]
    lines = [
        "  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in cells
    ]
    return list(zip(["layer", *(layer.name for layer in layers)], lines, strict=True))


def _cells(layer: LayerCount) -> tuple[str, str, str, str, str]:
    tight = layer.tightest
    group = "—"
    if tight is not None and layer.groups > 1:
        group = f"{tight.equations}:{tight.unknowns} of {layer.groups}"
    others = [name for name in layer.readers if name != layer.name]
    verdict = layer.verdict + (f": {layer.reason}" if layer.reason else "")
    return (
        "×".join(map(str, layer.shape[1:])),
        f"{'—' if tight is None else layer.equations}:{layer.unknowns}",
        group,
        number(layer.condition, 2),
        f"{verdict} (together with {', '.join(others)})" if others else verdict,
    )


def _layer(layer: LayerCount) -> dict[str, object]:
    tight = layer.tightest
    return {
        "name": layer.name,
        "readers": list(layer.readers),
        "shape": list(layer.shape),
        "equations": layer.equations,
        "unknowns": layer.unknowns,
        "groups": layer.groups,
        "tightest": None
        if tight is None
        else {
            "taps": tight.taps,
            "places": tight.places,
            "equations": tight.equations,
            "unknowns": tight.unknowns,
        },
        "condition": layer.condition,
        "residual": layer.residual,
        "verdict": layer.verdict,
        "reason": layer.reason,
    }
