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
    exit_code_of,
    keep_apart,
    number,
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
from gradleak.cli.map_report import map_data, map_summary
from gradleak.cli.options import (
    ATTACK,
    OUTPUT,
    Device,
    Inputs,
    Json,
    Model,
    Quiet,
    Seed,
    Weights,
)
from gradleak.cli.progress import progress_display
from gradleak.errors import UsageError

if TYPE_CHECKING:
    from gradleak.bundle import Bundle
    from gradleak.stages.reconstruct import ImageOutcome

NAME = "reconstruct"
EXAMPLE = "gradleak reconstruct featured.safetensors -o cat-recovered.png"
_SHEET_WIDTH = 256
_NOTHING: dict[str, object] = {
    "method": None,
    "batch_size": None,
    "exact": None,
    "residual": None,
    "precision": None,
    "matching": None,
    "estimated_psnr": None,
    "maps": [],
    "stopped": [],
    "fit": None,
    "null_control": None,
    "images": [],
    "device": None,
    "seconds": None,
}


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
            help="auto, mlp (read off the first Linear layer), peel (walk down through the layers' "
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
    if dry_run:
        asked = Asked(model, classes, size, batch_size, weights, time_limit, device, seed)
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
                bundle,
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
        return _report(source, outcome, written), outcome.bundle

    run_stage(console, NAME, sources, work, _NOTHING)


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


def _report(source: str, outcome: ImageOutcome, written: list[str]) -> Report:
    certificate, match = outcome.certificate, outcome.match
    rows = [
        ("verdict", f"{outcome.verdict}: {outcome.reason}"),
        ("method", outcome.method if match is None else _describe_match(outcome)),
        (
            "residual",
            f"{number(certificate.relative)} of the gradient, whose precision is "
            f"{number(certificate.precision)}",
        ),
        *_estimate_rows(outcome),
        *_control_rows(outcome),
        *map_summary(outcome.maps, outcome.barriers),
        *_fit_rows(outcome),
        ("solved in", f"{outcome.seconds:.3g} s on {outcome.device}"),
        *(("wrote", name) for name in written),
    ]
    data: dict[str, object] = {
        "input": source,
        "stage": NAME,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "method": outcome.method,
        "batch_size": len(outcome.images),
        "exact": certificate.exact,
        "residual": certificate.relative,
        "precision": certificate.precision,
        "matching": None
        if match is None
        else {
            "distance": match.options.distance,
            "optimiser": match.options.optimiser,
            "objective": match.objective,
            "steps": match.steps,
            "restart": match.restart,
            "stopped": match.stopped,
        },
        "estimated_psnr": outcome.estimated and list(outcome.estimated),
        "maps": map_data(outcome.maps),
        "stopped": list(outcome.barriers),
        "fit": None
        if outcome.fitted is None
        else {
            "maps": list(outcome.fitted.cuts),
            "equations": outcome.fitted.equations,
            "residual": outcome.fitted.residual,
            "expected": outcome.fitted.expected,
            "steps": outcome.fitted.steps,
        },
        "null_control": None
        if outcome.control is None
        else {
            "method": outcome.control.method,
            "residual": outcome.control.certificate.relative,
        },
        "images": written,
        "device": outcome.device,
        "seconds": outcome.seconds,
    }
    return Report(source, rows, data, exit_code_of(outcome.verdict))


def _describe_match(outcome: ImageOutcome) -> str:
    match = outcome.match
    assert match is not None
    return (
        f"gradient matching, {match.options.distance} with {match.options.optimiser}, "
        f"{match.steps} steps, ended by {match.stopped}"
    )


def _fit_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    fitted = outcome.fitted
    if fitted is None:
        return []
    text = (
        f"{', '.join(fitted.cuts)}: {fitted.equations} equations, missed by "
        f"{number(fitted.residual)}, of which their errors explain {number(fitted.expected)}"
    )
    return [("fitted to", text)]


def _control_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    control = outcome.control
    if control is None:
        return []
    missed = number(control.certificate.relative)
    return [("null control", f"noise of the same norms gives a picture that misses it by {missed}")]


def _estimate_rows(outcome: ImageOutcome) -> list[tuple[str, str]]:
    if outcome.estimated is None:
        return []
    low, high = outcome.estimated
    return [("estimated", f"PSNR {low:.0f} to {high:.0f} dB, by the errors of the equations")]
