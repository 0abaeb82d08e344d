"""Options that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

from typing import Annotated

import typer

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
        "code. Default: the bundle's built-in network.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
