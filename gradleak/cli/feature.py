"""``gradleak recover-feature``: the inputs of the Linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from gradleak.cli.options import (
    Device,
    HeadName,
    Inputs,
    Json,
    OutputBundle,
    Quiet,
    Seed,
    Weights,
)

if TYPE_CHECKING:
    from gradleak.bundle import Bundle
    from gradleak.features import PeeledLayer
    from gradleak.stages.feature import FeatureOutcome

NAME = "recover-feature"
EXAMPLE = "gradleak recover-feature labelled.safetensors -o featured.safetensors"
_NOTHING: dict[str, object] = {
    "method": None,
    "batch_size": None,
    "layers": [],
    "stopped": None,
    "residual": None,
    "device": None,
    "seconds": None,
}


def command(
    context: typer.Context,
    inputs: Inputs = None,
    head: HeadName = None,
    weights: Weights = None,
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
    from gradleak.stages.feature import recover_feature

    def work(source: str, bundle: Bundle) -> tuple[Report, Bundle]:
        outcome = recover_feature(bundle, head=head, weights=weights, device=device, seed=seed)
        return _report(source, outcome), outcome.bundle

    run_stage(Console(json=json, quiet=quiet, outputs=outputs), NAME, sources, work, _NOTHING)


def _report(source: str, outcome: FeatureOutcome) -> Report:
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
