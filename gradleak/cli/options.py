"""Options that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.errors import UsageError

if TYPE_CHECKING:
    from gradleak.bundle import Bundle

COMPUTE, OUTPUT, ATTACK, MODEL = "Compute", "Output", "Attack", "Network"

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="BUNDLE",
        help="Gradient bundles, or - for standard input. Default: standard input if it is piped.",
        show_default=False,
    ),
]
OutputBundle = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the bundle to FILE, or - for standard output. Default: the report alone.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object per input.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No report, notes or progress; errors remain.", rich_help_panel=OUTPUT
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N; auto takes CUDA when it is there.",
        rich_help_panel=COMPUTE,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        help="Seed of everything random, an integer from 0.",
        rich_help_panel=COMPUTE,
    ),
]
HeadName = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="NAME",
        help="The classifier's Linear layer, e.g. fc. Default: found by name and shape.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Model weights (.pth, .pt, .safetensors) for a bundle without them. Default: none.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Your own network as module:factory, repeated here because a bundle's word imports no "
        "code. Default: the bundle's network.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="A keyword argument of your network's factory, its value JSON or else text; repeat "
        "it. Default: those in the bundle.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]


def with_model_args(bundle: Bundle, arguments: dict[str, object]) -> Bundle:
    """Return the bundle with these arguments of the network's factory, before its own."""
    if not arguments:
        return bundle
    from dataclasses import replace

    spec = replace(bundle.model, options={**bundle.model.options, **arguments})
    return bundle.extended(metadata={"model": spec.to_json()})


def model_args(given: Sequence[str] | None) -> dict[str, object]:
    """Parse the ``--model-arg`` options; raises :class:`UsageError` for one without a value."""
    arguments: dict[str, object] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise UsageError(f"--model-arg {text} is not KEY=VALUE", "e.g. --model-arg width=32")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments
