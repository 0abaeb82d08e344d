"""``gradleak recover-feature``: the inputs of the Linear layers."""

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
    run_stage,
)
from gradleak.cli.map_report import map_data, map_rows, save_map_sheet
from gradleak.cli.options import (
    ATTACK,
    OUTPUT,
    Device,
    HeadName,
    Inputs,
    Json,
    Model,
    ModelArg,
    OutputBundle,
    Quiet,
    Seed,
    Weights,
    model_args,
    with_model_args,
)
from gradleak.cli.progress import progress_display
from gradleak.errors import UsageError

if TYPE_CHECKING:
    from gradleak.bundle import Bundle
    from gradleak.features import PeeledLayer
    from gradleak.stages.feature import FeatureOutcome
    from gradleak.stages.maps import MapsOutcome

NAME = "recover-feature"
EXAMPLE = "gradleak recover-feature labelled.safetensors -o featured.safetensors"
_NOTHING: dict[str, object] = {
    "method": None,
    "batch_size": None,
    "layers": [],
    "stopped": None,
    "residual": None,
    "maps": [],
    "barriers": [],
    "device": None,
    "seconds": None,
}


def command(
    context: typer.Context,
    inputs: Inputs = None,
    head: HeadName = None,
    weights: Weights = None,
    every_map: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also recover the input of every convolution that the gradient determines; needs "
            "the network's weights.",
            rich_help_panel=ATTACK,
        ),
    ] = False,
    contact_sheet: Annotated[
        str | None,
        typer.Option(
            metavar="PNG",
            help="Also write the maps that --all recovers as a picture. Default: none.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: Model = None,
    model_arg: ModelArg = None,
    output: OutputBundle = None,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Recover the head's input features, and the inputs of every Linear layer below it.

    Takes a bundle that recover-label has worked on. Of a batch the head's inputs are recovered, one
    for each label. Exit code 0 when every layer was reached.
    """
    sources = choose_inputs(context, inputs)
    outputs = check_output(output, sources)
    keep_apart(output, weights)
    arguments = model_args(model_arg)
    if contact_sheet is not None:
        if not every_map:
            raise UsageError("--contact-sheet shows the maps of --all", "add --all")
        check_output(contact_sheet, sources)
        keep_apart(contact_sheet, weights, output, *sources)
    from gradleak.stages.feature import recover_feature
    from gradleak.stages.maps import recover_maps

    def work(source: str, bundle: Bundle) -> tuple[Report, Bundle]:
        bundle = with_model_args(bundle, arguments)
        outcome = recover_feature(bundle, head=head, weights=weights, device=device, seed=seed)
        if not every_map:
            return _report(source, outcome, None), outcome.bundle
        with progress_display(quiet or json) as progress:
            found = recover_maps(
                outcome.bundle,
                model=model,
                weights=weights,
                device=device,
                seed=seed,
                progress=progress,
            )
        if contact_sheet is not None:
            save_map_sheet(contact_sheet, found.exact)
        return _report(source, outcome, found), found.bundle

    run_stage(Console(json=json, quiet=quiet, outputs=outputs), NAME, sources, work, _NOTHING)


def _report(source: str, outcome: FeatureOutcome, found: MapsOutcome | None) -> Report:
    layers: list[dict[str, object]] = [
        {
            "name": layer.name,
            "width": layer.features.shape[1],
            "norms": layer.features.norm(dim=1).tolist(),
            "zeros": (layer.features == 0).sum(1).tolist(),
            "residual": layer.residual,
        }
        for layer in outcome.layers
    ]
    rows = [("verdict", f"{outcome.verdict}: {outcome.reason}")]
    rows += [(f"input of {layer.name}", _line(layer)) for layer in outcome.layers]
    if outcome.stopped is not None:
        rows.append(("not reached", outcome.stopped))
    if found is not None:
        rows += map_rows(found.maps, found.barriers)
    rows.append(("method", outcome.method))
    rows.append(("solved in", f"{1e3 * outcome.seconds:.1f} ms on {outcome.device}"))
    data: dict[str, object] = {
        "input": source,
        "stage": NAME,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "method": outcome.method,
        "batch_size": outcome.batch_size,
        "layers": layers,
        "stopped": outcome.stopped,
        "residual": outcome.residual,
        "maps": [] if found is None else map_data(found.maps),
        "barriers": [] if found is None else list(found.barriers),
        "device": outcome.device,
        "seconds": outcome.seconds,
    }
    return Report(source, rows, data, exit_code_of(outcome.verdict))


def _line(layer: PeeledLayer) -> str:
    norms = layer.features.norm(dim=1)
    low, high = float(norms.min()), float(norms.max())
    count, width = layer.features.shape
    size = f"{width} values, norm {low:.6g}"
    if count > 1:
        size = f"{count} × {width} values, norms {low:.6g} to {high:.6g}"
    return f"{size}, residual {layer.residual:.2g}"
