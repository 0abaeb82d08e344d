"""``gradleak inspect``: what is in a bundle, from its header alone."""

from __future__ import annotations

import typer

from gradleak.bundle import BUFFER, FEATURE, GRAD, PARAM, Bundle
from gradleak.cli.common import Console, Report, choose_inputs, run_stage
from gradleak.cli.options import Inputs, Json, Quiet

NAME = "inspect"
EXAMPLE = "gradleak inspect grads.safetensors"


def command(
    context: typer.Context, inputs: Inputs = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Show what a bundle holds: network, gradients, what was recovered; reads the header only."""
    console = Console(json=json, quiet=quiet)
    sources = choose_inputs(context, inputs)
    run_stage(console, NAME, sources, lambda source, bundle: (_report(source, bundle), bundle))


def _report(source: str, bundle: Bundle) -> Report:
    model = bundle.model
    tensors = [
        {"name": name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        for name in bundle
        for info in [bundle.info(name)]
    ]
    found = [n for n in bundle if not n.startswith((GRAD, PARAM, BUFFER))]
    layers = [
        f"{layer.name} –{layer.activation or '?'}→" if layer is not model.layers[-1] else layer.name
        for layer in model.layers
    ]
    rows = [
        ("format", f"{bundle.metadata.get('format', 'none')} {bundle.metadata.get('schema', '')}"),
        ("network", model.name or "not recorded"),
        ("head", model.head or "not recorded"),
        ("classes", str(model.classes or "not recorded")),
        ("input", "×".join(map(str, model.input_shape)) if model.input_shape else "not recorded"),
        ("Linear layers", " ".join(layers) or "not recorded"),
        ("batch size", str(bundle.batch_size or "not recorded")),
        ("mode", bundle.metadata.get("mode", "not recorded")),
        ("loss", bundle.metadata.get("loss", "not recorded")),
        *((kind, _size(bundle, prefix)) for kind, prefix in _KINDS),
        ("recovered", ", ".join(found) or "nothing yet"),
        ("stages", " → ".join(_stage(stage) for stage in bundle.stages) or "none recorded"),
    ]
    data: dict[str, object] = {
        "input": source,
        "stage": NAME,
        "metadata": bundle.metadata,
        "tensors": tensors,
        "features": [n[len(FEATURE) :] for n in bundle if n.startswith(FEATURE)],
    }
    return Report(source, rows, data)


_KINDS = (("gradients", GRAD), ("parameters", PARAM), ("buffers", BUFFER))


def _size(bundle: Bundle, prefix: str) -> str:
    infos = [bundle.info(prefix + name) for name in bundle.names(prefix)]
    dtypes = sorted({info.dtype for info in infos})
    size = sum(info.nbytes for info in infos)
    return f"{len(infos)} tensors, {size / 1e6:.3g} MB {' '.join(dtypes)}".rstrip()


def _stage(stage: dict[str, object]) -> str:
    verdict = stage.get("verdict")
    return f"{stage.get('stage')} ({verdict})" if verdict else str(stage.get("stage"))
