"""``gradleak capture``: the gradient that a client would share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gradleak.cli.common import STDIO, Console, Report, check_output, keep_apart, write_bundle
from gradleak.cli.options import (
    MODEL,
    OUTPUT,
    Device,
    Json,
    ModelArg,
    Quiet,
    Seed,
    model_args,
)
from gradleak.errors import UsageError
from gradleak.models import registry

if TYPE_CHECKING:
    from gradleak.stages.capture import Capture

NAME = "capture"
EXAMPLE = "gradleak capture --model resnet18 --image cat.png --smooth 0.1"
DEFAULT_OUTPUT = "grads.safetensors"
SAMPLE = "Sample"


def command(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(registry.names())}; torchvision:NAME, timm:NAME or "
            "transformers:NAME; or module:factory for your own.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ],
    image: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="A picture; repeat it for a batch.",
            show_default=False,
            rich_help_panel=SAMPLE,
        ),
    ],
    label: Annotated[
        list[int] | None,
        typer.Option(
            metavar="K",
            help="The class of each image, from 0; repeat it. Default: the network's prediction.",
            show_default=False,
            rich_help_panel=SAMPLE,
        ),
    ] = None,
    smooth: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Label smoothing α, 0 to 1: (1−α) of the label and α/C everywhere.",
            rich_help_panel=SAMPLE,
        ),
    ] = 0.0,
    mixup: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Mixup λ, 0 to 1: each consecutive pair of images becomes one sample, λ of the "
            "first. Default: no mixup.",
            show_default=False,
            rich_help_panel=SAMPLE,
        ),
    ] = None,
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
            help="Input height and width in pixels, from 1. Default: the network's own.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="default or paper (lenet only: uniform from -0.5 to 0.5).", rich_help_panel=MODEL
        ),
    ] = "default",
    no_head_bias: Annotated[
        bool,
        typer.Option(
            "--no-head-bias", help="A classifier head without bias.", rich_help_panel=MODEL
        ),
    ] = False,
    bias: Annotated[
        bool, typer.Option("--bias", help="Biases in fcn4, which has none.", rich_help_panel=MODEL)
    ] = False,
    model_arg: ModelArg = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Weights to load (.pth, .pt, .safetensors). Default: random, from --seed.",
            show_default=False,
            rich_help_panel=MODEL,
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
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write labels, features and images to a file of their own, for score. "
            "Default: not written.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    no_weights: Annotated[
        bool,
        typer.Option("--no-weights", help="Leave the weights out.", rich_help_panel=OUTPUT),
    ] = False,
    head_only: Annotated[
        bool,
        typer.Option(
            "--head-only", help="Gradient and weights of the head alone.", rich_help_panel=OUTPUT
        ),
    ] = False,
    withhold_bias: Annotated[
        bool,
        typer.Option(
            "--withhold-bias",
            help="Leave the head's bias gradient out; its bias stays.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="eval, or train: BatchNorm by the batch's own statistics, dropout from --seed.",
            rich_help_panel=SAMPLE,
        ),
    ] = "eval",
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Compute the gradient of a network on images, as a client would share it.

    Soft-label cross-entropy, mean-reduced. The bundle never holds label or image.
    """
    outputs = check_output(output)
    if truth == STDIO:
        raise UsageError("--truth does not go to standard output", "give it a file name")
    check_output(truth)
    keep_apart(output, truth, weights, *image)
    keep_apart(truth, weights, *image)
    if label and len(label) != len(image):
        raise UsageError(
            f"{len(label)} labels were given for {len(image)} images", "give --label once per image"
        )
    arguments = model_args(model_arg)
    entry = None if ":" in model else registry.entry(model)

    import torch

    from gradleak.device import resolve_device
    from gradleak.images import load_image
    from gradleak.models.build import DEFAULTS, build_model, is_own, load_weights
    from gradleak.models.providers import expected_of
    from gradleak.models.spec import ModelSpec
    from gradleak.stages.capture import capture, label_samples, mix_pairs, predict

    console = Console(json=json, quiet=quiet, outputs=outputs)
    resolve_device(device)
    given = {"init": init, "head_bias": not no_head_bias, "bias": bias}
    options = {name: value for name, value in given.items() if value != DEFAULTS[name]} | arguments
    network = build_model(model, classes=classes, size=size, options=options, seed=seed)
    if is_own(model) and classes is not None:
        options["classes"] = classes  # the later stages build it as it was built here
    expected = entry or expected_of(network)
    pixels = size or (expected.size if expected else None)
    if pixels is None:
        raise UsageError(f"the input size of {model} is not known", "give it with --size")
    if weights is not None:
        load_weights(network, weights)
    loaded = [load_image(path, pixels) for path in image]
    notes = [f"{name}: {x.note}" for name, x in zip(image, loaded, strict=True) if x.note]
    images = torch.stack([picture.pixels for picture in loaded])
    spec = ModelSpec(
        name=model,
        mean=expected.mean if expected else None,
        std=expected.std if expected else None,
        options=options,
    )
    mixed = images if mixup is None else mix_pairs(images, mixup)
    predicted = predict(network, images, spec, device)
    if not label:
        listed = ", ".join(map(str, predicted.classes))
        notes.append(f"no --label: the network's own prediction is taken (class {listed})")
    labels = label_samples(label or predicted.classes, predicted.count, smooth=smooth, mixup=mixup)
    captured = capture(
        network,
        mixed,
        labels,
        spec=spec,
        weights=not no_weights,
        head_only=head_only,
        withhold_bias=withhold_bias,
        mode=mode,
        device=device,
        seed=seed,
    )
    for note in notes:  # not before: a failure is one line
        console.note(note)
    if truth is not None:
        captured.truth.save(truth)
    write_bundle(captured.bundle, outputs)
    console.report(_report(output, captured))
    console.finish()


def _report(output: str, captured: Capture) -> Report:
    bundle = captured.bundle
    model = bundle.model
    names = bundle.names("grad/")
    size = sum(bundle.info(f"grad/{name}").nbytes for name in names)
    shape = "×".join(map(str, model.input_shape or ()))
    rows = [
        ("network", f"{model.name}, {model.classes} classes, input {shape}"),
        ("head", str(model.head)),
        ("gradients", f"{len(names)} tensors, {size / 1e6:.3g} MB"),
        ("samples", str(bundle.batch_size)),
        ("wrote", "standard output" if output == STDIO else output),
    ]
    data: dict[str, object] = {
        "input": None,
        "output": output,
        "stage": NAME,
        "model": model.name,
        "classes": model.classes,
        "input_shape": model.input_shape,
        "head": model.head,
        "gradients": len(names),
        "bytes": size,
        "batch_size": bundle.batch_size,
    }
    return Report("gradient captured", rows, data)
