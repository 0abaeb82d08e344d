"""``gradleak defend``: what a client does to its gradient before it sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import Console, Report, check_output, choose_inputs, run_stage
from gradleak.cli.options import Inputs, Json, OutputBundle, Quiet, Seed

if TYPE_CHECKING:
    from gradleak.bundle import Bundle
    from gradleak.defenses import Defense

NAME = "defend"
EXAMPLE = "gradleak defend grads.safetensors --noise 1e-2 -o - | gradleak recover-label"
DEFENCES = "Defences, applied in this order"
_NOTHING: dict[str, object] = {"defenses": [], "change": None, "norms": None, "dropped": []}


def command(
    context: typer.Context,
    inputs: Inputs = None,
    clip: Annotated[
        float | None,
        typer.Option(
            metavar="NORM",
            help="Scale all gradients together down to this norm. Default: none.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    dp_sgd: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="NORM Z",
            help="Clip to NORM and add Gaussian noise of standard deviation Z·NORM/N, N the batch "
            "size: a step of DP-SGD where N is 1. Default: none.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            metavar="STD",
            help="Add Gaussian noise of this standard deviation to every entry. Default: none.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    laplace: Annotated[
        float | None,
        typer.Option(
            metavar="STD",
            help="Add Laplace noise of this standard deviation. Default: none.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative",
            help="Let --noise and --laplace count in units of each tensor's root mean square.",
            rich_help_panel=DEFENCES,
        ),
    ] = False,
    top_k: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Keep this share of each tensor, its largest entries; zero the rest. "
            "Default: all.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Round each tensor to K bits; 1 is the sign, times the mean size. Default: none.",
            show_default=False,
            rich_help_panel=DEFENCES,
        ),
    ] = None,
    output: OutputBundle = None,
    json: Json = False,
    quiet: Quiet = False,
    seed: Seed = 0,
) -> None:
    """Change a bundle's gradients as a defence does, to measure what is left to recover.

    Answers that the bundle held already are dropped: they came from the undefended gradient.
    """
    sources = choose_inputs(context, inputs)
    outputs = check_output(output, sources)
    from gradleak.defenses import Clipping, DpSgd, Noise, Quantisation, TopK
    from gradleak.errors import UsageError
    from gradleak.stages.defend import defend

    if relative and noise is None and laplace is None:
        raise UsageError("--relative is about --noise and --laplace", "add one of them")

    def chosen(bundle: Bundle) -> list[Defense]:
        return [
            *([] if clip is None else [Clipping(clip)]),
            *([] if dp_sgd is None else [DpSgd(*dp_sgd, samples=bundle.batch_size or 1)]),
            *([] if noise is None else [Noise(noise, relative=relative)]),
            *([] if laplace is None else [Noise(laplace, law="laplace", relative=relative)]),
            *([] if top_k is None else [TopK(top_k)]),
            *([] if bits is None else [Quantisation(bits)]),
        ]

    def work(source: str, bundle: Bundle) -> tuple[Report, Bundle]:
        outcome = defend(bundle, chosen(bundle), seed=seed)
        recorded = outcome.bundle.defenses
        rows = [("defence", _line(defense)) for defense in recorded]
        rows.append(("change", f"{outcome.change:.3g} of the gradient's norm"))
        rows.append(("norm", f"{outcome.norm_before:.6g} before, {outcome.norm_after:.6g} after"))
        if outcome.dropped:
            rows.append(("dropped", ", ".join(outcome.dropped)))
        data: dict[str, object] = {
            "input": source,
            "stage": NAME,
            "batch_size": bundle.batch_size,
            "defenses": recorded,
            "change": outcome.change,
            "norms": [outcome.norm_before, outcome.norm_after],
            "dropped": list(outcome.dropped),
            "device": "cpu",
            "seconds": outcome.seconds,
        }
        return Report(source, rows, data), outcome.bundle

    run_stage(Console(json=json, quiet=quiet, outputs=outputs), NAME, sources, work, _NOTHING)


def _line(defense: dict[str, object]) -> str:
    rest = [f"{key} {value}" for key, value in defense.items() if key != "name"]
    return f"{defense.get('name')}: {', '.join(rest)}"
