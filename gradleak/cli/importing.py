"""``gradleak import``: gradients and weights that another program saved."""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import STDIO, Console, Report, check_output, keep_apart, write_bundle
from gradleak.cli.options import MODEL, OUTPUT, Json, ModelArg, Quiet, model_args
from gradleak.errors import UsageError

if TYPE_CHECKING:
    from gradleak.stages.importing import Imported

NAME = "import"
EXAMPLE = "gradleak import grads.pt --weights net.pt --model mynet:build --size 32"
DEFAULT_OUTPUT = "grads.safetensors"
UPDATE, MATCHING, STEP = "Two checkpoints", "Matching", "Step"
_GUESSES = 12


def command(
    gradients: Annotated[
        str | None,
        typer.Argument(
            metavar="[GRADIENTS]",
            help="A file of gradients (.pt, .pth, .bin, .npz, .safetensors): by parameter name, or "
            "a list in parameter order. Default: --before and --after.",
            show_default=False,
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The weights before the client's steps. Default: none.",
            show_default=False,
            rich_help_panel=UPDATE,
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The weights after them. Default: none.",
            show_default=False,
            rich_help_panel=UPDATE,
        ),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="LR",
            help="The client's learning rate, above 0, of plain SGD; or unknown. Default: none.",
            show_default=False,
            rich_help_panel=UPDATE,
        ),
    ] = None,
    local_steps: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="K",
            help="Steps between the two, from 1: the gradient is then the mean of K, at weights "
            "that moved, and right to second order in the learning rate.",
            rich_help_panel=UPDATE,
        ),
    ] = 1,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The weights that the gradient was taken at. Default: those beside the gradients "
            "in their file, or --before.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network: a built-in name, module:factory, torchvision:NAME, timm:NAME or "
            "transformers:NAME. Default: none; labels and head features need none.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    model_arg: ModelArg = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of classes, from 2. Default: the network's own.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Input height and width in pixels, from 1. Default: the only one that the network "
            "takes.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="M,M,M",
            help="Mean that pictures are normalised with, a channel each. Default: 0.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,S",
            help="Standard deviation likewise. Default: 1.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The classifier's Linear layer. Default: the network's last, or the one whose "
            "gradient's columns sum to zero.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="SAVED=PARAM",
            help="The saved tensor (its name, or its place from 0) that is this parameter's; "
            "repeat it. Default: matched by name, then by shape.",
            show_default=False,
            rich_help_panel=MATCHING,
        ),
    ] = None,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order",
            help="Where shapes leave several, the saved order is the network's.",
            rich_help_panel=MATCHING,
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of samples in the gradient, from 1. Default: found by the label search.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="eval or train: how BatchNorm and dropout ran. Default: not recorded, eval.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the bundle goes; - for standard output.",
            rich_help_panel=OUTPUT,
        ),
    ] = DEFAULT_OUTPUT,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a bundle of gradients that another program saved, or of two checkpoints.

    No pickled code is run. Every parameter that was not found by its name is listed as a guess.
    """
    outputs = check_output(output)
    keep_apart(output, gradients, before, after, weights)
    if mode not in (None, "eval", "train"):
        raise UsageError(f"there is no mode {mode!r}", "use eval or train")
    rate = _rate(lr)
    given = dict(_pair(text) for text in mapping or [])
    arguments = model_args(model_arg)
    if arguments and model is None:
        raise UsageError("--model-arg goes with --model", "name the network")

    from gradleak.models.spec import ModelSpec
    from gradleak.stages.importing import import_gradients

    console = Console(json=json, quiet=quiet, outputs=outputs)
    spec = ModelSpec(
        classes=classes,
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std", positive=True),
        head=head,
        options=arguments,
    )
    imported = import_gradients(
        gradients,
        before=before,
        after=after,
        lr=rate,
        local_steps=local_steps,
        weights=weights,
        model=model,
        size=size,
        spec=spec,
        given=given,
        ordered=in_order,
        batch_size=batch_size,
        mode=mode,
    )
    write_bundle(imported.bundle, outputs)
    for note in imported.notes:
        console.note(note)
    console.report(_report(gradients or before, output, imported))
    console.finish()


def _rate(text: str | None) -> float | str | None:
    if text is None or text == "unknown":
        return text
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 < rate < float("inf"):
        raise UsageError(f"--lr {text} is no learning rate", "give a number above 0, or unknown")
    return rate


def _pair(text: str) -> tuple[str, str]:
    saved, equals, parameter = text.partition("=")
    if not (saved and equals and parameter):
        raise UsageError(f"--map {text} is not SAVED=PARAM", "e.g. --map arr_3=fc.weight")
    return saved, parameter


def _numbers(text: str | None, option: str, *, positive: bool = False) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (positive and min(numbers) <= 0.0):
        kind = "positive numbers" if positive else "numbers"
        raise UsageError(f"{option} {text} is not {kind} with commas", f"e.g. {option} 0.5,0.5,0.5")
    return numbers


def _report(source: str | None, output: str, imported: Imported) -> Report:
    bundle = imported.bundle
    model = bundle.model
    names = bundle.names("grad/")
    size = sum(bundle.info(f"grad/{name}").nbytes for name in names)
    rows = [("gradients", f"{len(names)} tensors, {size / 1e6:.3g} MB")]
    for guess in imported.guesses[:_GUESSES]:
        rows.append(("guess", f"{guess.parameter} is the saved {guess.saved}, {guess.reason}"))
    if len(imported.guesses) > _GUESSES:
        rows.append(("guess", f"… and {len(imported.guesses) - _GUESSES} more in the same way"))
    if imported.missing:
        listed = ", ".join(imported.missing[:4]) + (", …" if len(imported.missing) > 4 else "")
        rows.append(("no gradient", f"of {len(imported.missing)} parameters: {listed}"))
    rows.append(("head", model.head or "not known"))
    if model.name is not None:
        rows.append(("network", f"{model.name}, {model.classes} classes"))
    if model.input_shape is not None:
        rows.append(("pictures", "×".join(map(str, model.input_shape))))
    if imported.precision is not None:
        rows.append(
            ("precision", f"{imported.precision:.1e} of the gradient, from the weights' rounding")
        )
    rows.append(("wrote", "standard output" if output == STDIO else output))
    update = bundle.metadata.get("update")
    data: dict[str, object] = {
        "input": source,
        "output": output,
        "stage": NAME,
        "model": model.name,
        "classes": model.classes,
        "input_shape": model.input_shape,
        "head": model.head,
        "gradients": len(names),
        "bytes": size,
        "batch_size": bundle.batch_size,
        "guesses": [
            {"parameter": g.parameter, "saved": g.saved, "reason": g.reason}
            for g in imported.guesses
        ],
        "missing": list(imported.missing),
        "update": jsonlib.loads(update) if update else None,
        "precision": imported.precision,
        "notes": list(imported.notes),
        "seconds": imported.seconds,
    }
    return Report("gradient imported", rows, data)
