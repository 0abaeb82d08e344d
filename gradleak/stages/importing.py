"""Stage ``import``: another program's files of gradients and weights → bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gradleak.bundle import BUFFER, GRAD, LOSS, PARAM, Bundle, StageRecord
from gradleak.errors import InputError, UsageError
from gradleak.foreign.match import Guess, Match, Shape, match, names_by_place
from gradleak.foreign.saved import Saved, SavedStep, read_state, read_step
from gradleak.head import find_head
from gradleak.models.build import is_own
from gradleak.models.recording import channels_of, recorded
from gradleak.models.spec import ModelSpec
from gradleak.stages.network import bare_network
from gradleak.updates import Update, is_buffer, middle_weights, update_gradient


@dataclass(frozen=True)
class Imported:
    """The ``bundle``, and what had to be guessed or is not there.

    ``guesses`` tells of every tensor that was not found by its parameter's own name; ``missing``
    names the parameters without a gradient; ``precision`` is the error that the rounding of weights
    left in a gradient from two checkpoints, of its size; ``notes`` are for people.
    """

    bundle: Bundle
    guesses: tuple[Guess, ...]
    missing: tuple[str, ...]
    precision: float | None
    notes: tuple[str, ...]
    seconds: float


def import_gradients(
    gradients: Path | str | None = None,
    *,
    before: Path | str | None = None,
    after: Path | str | None = None,
    lr: float | str | None = None,
    local_steps: int = 1,
    weights: Path | str | None = None,
    model: nn.Module | str | None = None,
    size: int | None = None,
    spec: ModelSpec | None = None,
    given: Mapping[str, str] | None = None,
    ordered: bool = False,
    batch_size: int | None = None,
    mode: str | None = None,
) -> Imported:
    """Make a bundle of a file of gradients, or of the weights before and after a client's steps.

    Files are .pt, .pth, .bin, .npz or .safetensors (see :func:`read_step`); no pickled code is run.
    Of two checkpoints the gradient is (before − after) / (``lr`` · ``local_steps``), see
    :func:`update_gradient`, and the weights are those of :func:`middle_weights`; an ``lr`` of
    "unknown" leaves the loss scale open. ``model`` is the
    network or its name; with it head, Linear layers and input shape are recorded, for pictures of
    ``size`` pixels. ``spec`` adds classes, options, mean, std or head. ``given`` and ``ordered``
    are as in :func:`match`. Raises :class:`InputError` for files that do not fit together and
    :class:`UsageError` for a call that leaves open what is meant.
    """
    start = time.perf_counter()
    step = _read(gradients, before, after, lr)
    held = step.before or (read_state(weights) if weights is not None else step.weights)
    known = spec or ModelSpec()
    network = None
    if model is not None:
        known = replace(known, name=model if isinstance(model, str) else known.name)
        if is_own(known.name or "") and known.classes is not None:
            known = replace(known, options={**known.options, "classes": known.classes})
        network = bare_network(known, model)
        if isinstance(model, nn.Module) and held is None:
            held = Saved(tuple(model.state_dict().values()), tuple(model.state_dict()))
        if size is not None:
            known = replace(known, input_shape=(channels_of(network), size, size))
        known = recorded(network, known)
    state_shapes, buffers = _wanted(network, held, step)
    state = None if held is None else match(held, state_shapes, ordered=ordered, what="weight")
    update = None
    if step.before is not None and step.after is not None and state is not None:
        later = match(step.after, state_shapes, ordered=ordered, what="weight")
        rate = 1.0 if lr is None or isinstance(lr, str) else lr
        update = update_gradient(state.tensors, later.tensors, rate, local_steps=local_steps)
        found = Match(update.gradients, state.guesses, ())
        middle = middle_weights(state.tensors, later.tensors, local_steps)
        state = replace(state, tensors=middle)
    else:
        assert step.gradients is not None
        found = _match_gradients(step.gradients, state_shapes, buffers, given, ordered)
    source = gradients if gradients is not None else after
    _check_gradients(found.tensors, source)
    parameters = [name for name in state_shapes if name not in buffers]
    tensors = {GRAD + name: tensor for name, tensor in found.tensors.items()}
    for name, tensor in (state.tensors if state else {}).items():
        tensors[(BUFFER if name in buffers else PARAM) + name] = tensor
    bundle = Bundle(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        _metadata(known, lr, update, local_steps, batch_size, mode),
    )
    notes = list(_notes(state, update, local_steps))
    if network is None and known.head is None:
        try:
            known = replace(known, head=find_head(bundle))
            bundle = bundle.extended(metadata={"model": known.to_json()})
        except InputError as error:
            notes.append(f"{error.wrong}: name it with --head")
    seconds = time.perf_counter() - start
    told: dict[str, object] = {"lr": lr, "local_steps": local_steps} if update else {}
    record = StageRecord("import", told, seconds=seconds)
    return Imported(
        bundle.extended(record=record),
        found.guesses,
        tuple(name for name in parameters if name not in found.tensors),
        update.precision if update and lr != "unknown" else None,
        tuple(notes),
        seconds,
    )


def _check_gradients(gradients: Mapping[str, Tensor], source: Path | str | None) -> None:
    """Raise :class:`InputError` where there is no gradient at all, or one that is not finite."""
    if not gradients:
        raise InputError(
            f"{source} holds no gradient",
            "save them after loss.backward(), before they are set to None",
        )
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            kind = "NaN" if bool(torch.isnan(gradient).any()) else "infinity"
            raise InputError(
                f"the gradient of {name} in {source} holds {kind}", "save another step"
            )


def _read(
    gradients: Path | str | None,
    before: Path | str | None,
    after: Path | str | None,
    lr: float | str | None,
) -> SavedStep:
    if (before is None) is not (after is None):
        raise UsageError("--before and --after go together", "give both checkpoints")
    if (gradients is None) is (before is None):
        raise UsageError(
            "a file of gradients or two checkpoints are imported, one of the two",
            "give GRADIENTS, or --before and --after",
        )
    if gradients is not None:
        step = read_step(gradients)
    else:
        assert before is not None
        assert after is not None
        step = SavedStep(before=read_state(before), after=read_state(after))
    if step.before is not None and lr is None:
        raise UsageError(
            "two checkpoints give the gradient times the learning rate",
            "say the client's learning rate with --lr, or --lr unknown",
        )
    if step.before is None and lr is not None:
        raise UsageError("--lr is about two checkpoints", "leave it out, or give --before/--after")
    return step


def _wanted(
    network: nn.Module | None, held: Saved | None, step: SavedStep
) -> tuple[dict[str, Shape], set[str]]:
    """Return the state dict's names and shapes, and which of them are buffers.

    They are the network's, else the weights file's, else the gradients' own; where there are no
    names at all, by place.
    """
    if network is not None:
        shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        parameters = {name for name, _ in network.named_parameters()}
        return shapes, set(shapes) - parameters
    source = held or step.gradients
    assert source is not None
    named = (source if source.names is not None else names_by_place(source)).named()
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return shapes, {name for name, tensor in named.items() if is_buffer(name, tensor)}


def _match_gradients(
    saved: Saved,
    state: Mapping[str, Shape],
    buffers: set[str],
    given: Mapping[str, str] | None,
    ordered: bool,
) -> Match:
    """Match gradients to parameters; entries that stand for buffers are no gradients."""
    if saved.names is None and len(saved.tensors) == len(state):
        whole = match(saved, state, given=given)
        return replace(whole, tensors={n: t for n, t in whole.tensors.items() if n not in buffers})
    if saved.names is not None:
        pairs = zip(saved.names, saved.tensors, strict=True)
        kept = [(n, t) for n, t in pairs if n not in buffers and (t is None or not is_buffer(n, t))]
        saved = Saved(tuple(t for _, t in kept), tuple(n for n, _ in kept))
    parameters = {name: shape for name, shape in state.items() if name not in buffers}
    return match(saved, parameters, given=given, ordered=ordered)


def _metadata(
    spec: ModelSpec,
    lr: float | str | None,
    update: Update | None,
    local_steps: int,
    batch_size: int | None,
    mode: str | None,
) -> dict[str, str]:
    metadata = {"model": spec.to_json(), "loss": LOSS, "defenses": "[]"}
    if update is not None:
        told = {"lr": None if lr == "unknown" else lr, "local_steps": local_steps}
        metadata["update"] = json.dumps(told)
    if lr == "unknown":
        metadata["loss"] = json.dumps({**json.loads(LOSS), "scale": None})
    if batch_size is not None:
        metadata["batch_size"] = str(batch_size)
    if mode is not None:
        metadata["mode"] = mode
    return metadata


def _notes(state: Match | None, update: Update | None, local_steps: int) -> list[str]:
    notes = []
    if state is None:
        notes.append("no weights: the next stages need them with --weights")
    if update is not None and update.unchanged:
        notes.append(f"{len(update.unchanged)} parameters did not change and have no gradient here")
    if local_steps > 1:
        notes.append(
            f"the mean of {local_steps} gradients at weights that moved, taken for one at the "
            "weights in their middle: right to second order in the learning rate"
        )
    return notes
