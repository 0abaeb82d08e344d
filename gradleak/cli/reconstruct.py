"""``gradleak reconstruct``: the image behind a gradient."""

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
    run_stage,
)
from gradleak.cli.counting import (
    Asked,
    BatchSize,
    Classes,
    DryRun,
    Size,
    count,
    refuse_without_dry_run,
)
from gradleak.cli.image_report import NO_IMAGE, image_report
from gradleak.cli.options import (
    ATTACK,
    OUTPUT,
    Device,
    Inputs,
    Json,
    Model,
    ModelArg,
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
    from gradleak.stages.reconstruct import ImageOutcome

NAME = "reconstruct"
EXAMPLE = "gradleak reconstruct featured.safetensors -o cat-recovered.png"
_SHEET_WIDTH = 256


def command(
    context: typer.Context,
    inputs: Inputs = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="NAME.png writes the picture (a batch: NAME-0.png, NAME-1.png …), "
            "NAME.safetensors or - the bundle; repeat it for both. Default: the report alone.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    sheet: Annotated[
        str | None,
        typer.Option(
            metavar="PNG",
            help="Also write all images on one contact sheet. Default: none.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="auto, mlp (read off the first Linear layer), embedding (read off a transformer's "
            "position embedding), peel (walk down through the layers' "
            "gradients), fit (to the lowest maps that the walk recovers) or match (gradient "
            "matching); auto takes the first that gets through.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    distance: Annotated[
        str,
        typer.Option(
            help="Distance between gradients when matching: auto, cosine or l2.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    optimiser: Annotated[
        str,
        typer.Option(
            help="Optimiser when matching: auto, adam (signed) or lbfgs; auto takes lbfgs with l2 "
            "for smooth networks.",
            rich_help_panel=ATTACK,
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Evaluations of the matching objective per restart, from 1. Default: 400 for "
            "adam, 10000 for lbfgs.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=1, help="Starts of the matching, from 1.", rich_help_panel=ATTACK),
    ] = 1,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds, above 0, that each may take: the choices under a max-pool, a fit, and "
            "matching in all restarts. Refining has what a fit left, and a quarter at least.",
            rich_help_panel=ATTACK,
        ),
    ] = 60.0,
    tv: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Weight of total variation when matching, from 0. Default: 0.01 for adam, 0 for "
            "lbfgs.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    feature_weight: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Weight of the recovered feature when matching, from 0. Default: 0.1 for "
            "adam, 0 for lbfgs.",
            show_default=False,
            rich_help_panel=ATTACK,
        ),
    ] = None,
    null_control: Annotated[
        bool,
        typer.Option(
            help="Also run the attack on a noise gradient of the same norms with the same label: "
            "NAME-null.png shows what the picture does not owe to the gradient.",
            rich_help_panel=ATTACK,
        ),
    ] = False,
    dry_run: DryRun = False,
    classes: Classes = None,
    size: Size = None,
    batch_size: BatchSize = None,
    model: Model = None,
    model_arg: ModelArg = None,
    weights: Weights = None,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Reconstruct the image: exactly where the network allows, else by gradient matching.

    Takes a bundle that recover-label and recover-feature have worked on. Exit code 0 only when the
    finished image's own gradient is the given one to its precision, 4 for an approximation; a dry
    run ends with 0.
    """
    arguments = model_args(model_arg)
    if dry_run:
        asked = Asked(
            model, classes, size, batch_size, weights, time_limit, device, seed, arguments
        )
        count(context, inputs, asked, [output, sheet], Console(json=json, quiet=quiet))
    refuse_without_dry_run(classes, size, batch_size)
    sources = choose_inputs(context, inputs)
    bundles, pictures = _split_outputs(output or [], sources)
    if sheet == STDIO:
        raise UsageError("--sheet does not go to standard output", "give it a file name")
    check_output(sheet, sources)
    for name in (*pictures, sheet):
        keep_apart(name, weights, *sources)
    for name in bundles:
        keep_apart(name, weights)
    from gradleak.reconstruction.options import MatchSettings
    from gradleak.stages.reconstruct import reconstruct

    console = Console(json=json, quiet=quiet, outputs=bundles)
    settings = MatchSettings(
        distance=distance,
        optimiser=optimiser,
        steps=steps,
        restarts=restarts,
        time_limit=time_limit,
        tv=tv,
        feature_weight=feature_weight,
    )

    def work(source: str, bundle: Bundle) -> tuple[Report, Bundle]:
        with progress_display(quiet or json) as progress:
            outcome = reconstruct(
                with_model_args(bundle, arguments),
                method=method,
                settings=settings,
                model=model,
                weights=weights,
                device=device,
                seed=seed,
                control=null_control,
                progress=progress,
            )
        written = _write_pictures(outcome, pictures, sheet)
        return image_report(source, outcome, written), outcome.bundle

    run_stage(console, NAME, sources, work, NO_IMAGE)


def _split_outputs(outputs: list[str], sources: list[str]) -> tuple[list[str], list[str]]:
    """Return the bundle files and the PNG files among the outputs, all of them checked."""
    bundles, pictures = [], []
    for output in outputs:
        check_output(output, sources)
        if output == STDIO or Path(output).suffix == ".safetensors":
            bundles.append(output)
        elif Path(output).suffix.lower() == ".png":
            pictures.append(output)
        else:
            raise UsageError(
                f"{output} is neither .png nor .safetensors", "name the output accordingly"
            )
    return bundles, pictures


def _write_pictures(outcome: ImageOutcome, outputs: list[str], sheet: str | None) -> list[str]:
    from gradleak.images import contact_sheet, save_png, save_sheet

    written = []
    kinds = [("", outcome.images)]
    if outcome.control is not None:
        kinds.append(("-null", outcome.control.images))
    for path in map(Path, outputs):
        for kind, images in kinds:
            many = [f"{path.stem}{kind}-{n}.png" for n in range(len(images))]
            names = many if len(images) > 1 else [f"{path.stem}{kind}{path.suffix}"]
            for name, image in zip(names, images, strict=True):
                save_png(path.with_name(name), image)
                written.append(str(path.with_name(name)))
    if sheet is not None:
        rows = [
            [(f"{'null ' if kind else ''}sample {n}", image) for n, image in enumerate(images)]
            for kind, images in kinds
        ]
        scale = max(1, _SHEET_WIDTH // outcome.images.shape[-1])
        save_sheet(sheet, contact_sheet(rows, scale=scale))
        written.append(sheet)
    return written
