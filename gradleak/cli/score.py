"""``gradleak score``: how close an answer came to the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import STDIO, Console, Report, choose_inputs, number, open_bundle
from gradleak.cli.options import Json, Quiet
from gradleak.errors import GradleakError, UsageError

if TYPE_CHECKING:
    from gradleak.stages.score import Score

NAME = "score"
EXAMPLE = "gradleak score recovered.safetensors --truth truth.safetensors"


def command(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECOVERED",
            help="Recovered bundles or PNG pictures, or - for a bundle on standard input. "
            "Default: standard input if it is piped.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The truth file of capture --truth. Default: none.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="A picture to compare the recovered image with, resized as capture does. "
            "Default: none.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare recovered labels, features and images with the truth.

    The only command that reads the truth. Errors are absolute, PSNR in dB, SSIM from -1 to 1.
    """
    sources = choose_inputs(context, inputs)
    if truth is None and against is None:
        raise UsageError("there is nothing to compare with", "give --truth FILE or --against IMAGE")
    from gradleak.images import load_image
    from gradleak.stages.score import score
    from gradleak.truth import Truth

    console = Console(json=json, quiet=quiet)
    known: Truth | None = None
    for source in sources:
        try:
            picture = source != STDIO and Path(source).suffix.lower() == ".png"
            recovered = load_image(source, None).pixels if picture else open_bundle(source)
            # Not before: at the end of a pipe the truth is written while the bundle is on its way.
            if truth is not None and known is None:
                known = Truth.load(truth)
            console.report(_report(source, score(recovered, truth=known, against=against)))
        except GradleakError as error:
            console.error(error, stage=NAME, source=source)
    console.finish()


def _report(source: str, result: Score) -> Report:
    rows: list[tuple[str, str]] = []
    samples: list[dict[str, object]] = []
    if len(result.order) > 1:
        rows.append(("samples", f"found {result.found} of {len(result.order)}"))
    for n, index in enumerate(result.order):
        which = f" of sample {n}" if len(result.order) > 1 else ""
        sample: dict[str, object] = {"recovered": index}
        if index is None:
            rows.append((f"sample {n}", "missing"))
        else:
            place = sum(other is not None for other in result.order[:n])
            more, compared = _sample(result, place, which)
            rows += more
            sample |= compared
        samples.append(sample)
    if result.image_note:
        rows.append(("compared with", result.image_note))
    data: dict[str, object] = {
        "input": source,
        "stage": NAME,
        "found": result.found,
        "samples": samples,
        "image_note": result.image_note,
    }
    return Report(source, rows, data)


def _sample(result: Score, n: int, which: str) -> tuple[list[tuple[str, str]], dict[str, object]]:
    """Return the rows and the object of the ``n``-th sample that was found."""
    rows: list[tuple[str, str]] = []
    sample: dict[str, object] = {}
    if result.labels is not None:
        labels = result.labels
        sample["label"] = {
            "l1": labels.l1[n],
            "max_error": labels.max_error[n],
            "top1": labels.top1[n],
            "top_k": labels.top_k[n],
        }
        agree = "classes right" if labels.top_k[n] else "classes wrong"
        rows.append(
            (
                f"label{which}",
                f"L1 error {number(labels.l1[n])}, largest {number(labels.max_error[n])}, {agree}",
            )
        )
    sample["features"] = {name: errors[n] for name, errors in result.features.items()}
    rows += [
        (f"input of {name}{which}", f"relative error {number(errors[n])}")
        for name, errors in result.features.items()
    ]
    if result.images is not None:
        images = result.images
        sample["image"] = {
            "psnr": images.psnr[n],
            "ssim": images.ssim[n],
            "psnr_8bit": images.psnr_8bit[n],
            "ssim_8bit": images.ssim_8bit[n],
            "differing": images.differing[n],
            "total": images.total[n],
            "identical_8bit": images.differing[n] == 0,
        }
        rows.append(
            (
                f"image{which}",
                f"PSNR {images.psnr[n]:.1f} dB, SSIM {images.ssim[n]:.4f}; in 8 bit "
                f"{images.psnr_8bit[n]:.1f} dB, {images.ssim_8bit[n]:.4f}",
            )
        )
        rows.append((f"8-bit values{which}", f"{images.differing[n]} of {images.total[n]} differ"))
    return rows, sample
