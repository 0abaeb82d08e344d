"""The gradient bundle: the one file that every stage reads and writes (docs/bundle-format.md).

A bundle is a safetensors file with prefixed tensors and JSON strings as metadata. It never holds
ground truth. Opening one reads the header only; tensors are read when asked for, and the ones no
stage touches are copied from file to file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from gradleak import __version__
from gradleak.errors import IncompleteError, InputError
from gradleak.files import atomic_path
from gradleak.models.spec import ModelSpec
from gradleak.tensorfile import FLOATING, TensorFile, TensorInfo, tensor_info, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORMAT = "gradleak.bundle"
SCHEMA = 1
GRAD, PARAM, BUFFER = "grad/", "param/", "buffer/"
LABEL, FEATURE, IMAGE = "label/soft", "feature/", "image/reconstructed"
LOSS_SCALE, WEIGHT_DECAY = "label/loss_scale", "label/weight_decay"
ANSWERS = ("label/", FEATURE, "image/")
# What is left of an entry after weight decay may be so many errors of it and still be nothing.
_UNSURE = 4.0
LOSS = json.dumps({"name": "cross_entropy", "reduction": "mean", "scale": 1.0})


@dataclass(frozen=True)
class StageRecord:
    """What a stage leaves in the metadata about its own run; ``arguments`` never hold an answer."""

    stage: str
    arguments: dict[str, object] = field(default_factory=dict)
    seed: int | None = None
    device: str | None = None
    seconds: float | None = None
    verdict: str | None = None
    version: str = __version__


class Bundle:
    """Gradients, model state and what was recovered so far; immutable.

    ``tensors`` maps bundle names (``grad/fc.weight``) to tensors, or to the file that holds them;
    ``metadata`` is as in the file. Raises :class:`InputError` when pieces contradict each other.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor | TensorFile], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Check the schema; see the class."""
        self._tensors = dict(tensors)
        self.metadata = dict(metadata or {})
        self._check()

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle file; only its header is read. A named pipe is spooled as ``read`` does."""
        if _is_pipe(Path(path)):
            with Path(path).open("rb") as stream:
                return cls.read(stream, str(path))
        return cls._from_file(TensorFile(path))

    @classmethod
    def read(cls, stream: BinaryIO, name: str = "standard input") -> Bundle:
        """Read a bundle from a stream, which is spooled to a temporary file."""
        return cls._from_file(TensorFile.from_stream(stream, name))

    @classmethod
    def _from_file(cls, file: TensorFile) -> Bundle:
        bundle = cls(dict.fromkeys(file.infos, file), file.metadata)
        if not any(name.startswith(GRAD) for name in file.infos):
            raise InputError(
                f"{file.name} holds no gradient (no tensor named grad/…)",
                "write one with gradleak capture, or see docs/bundle-format.md",
            )
        return bundle

    @classmethod
    def from_gradients(
        cls,
        model: nn.Module,
        gradients: Mapping[str, Tensor | None] | Sequence[Tensor | None] | None = None,
        *,
        example: Tensor | None = None,
        spec: ModelSpec | None = None,
        batch_size: int | None = None,
    ) -> Bundle:
        """Make a bundle of a training step's own gradients, right after ``loss.backward()``.

        ``gradients`` are a mapping by parameter name or a sequence in parameter order, and default
        to what the parameters hold in ``.grad``. ``example`` (N, C, H, W) is a batch as the model
        takes it, used for its shape alone; ``spec`` adds what only the caller knows (mean and std
        of the pictures, the network's name). The loss is taken to be the mean softmax
        cross-entropy. Everything is copied. Raises :class:`InputError` without a gradient, for
        gradients of another model, and for a network without a Linear head.
        """
        from gradleak.models.recording import gradients_of, recorded

        made = cls._of_parts(
            gradients_of(model, gradients),
            dict(model.named_parameters()),
            dict(model.named_buffers()),
            recorded(model, spec or ModelSpec(), example),
            batch_size,
        )
        mode = "train" if model.training else "eval"
        return made.extended(
            record=StageRecord("capture", {"own_step": True}), metadata={"mode": mode}
        )

    @classmethod
    def from_update(
        cls,
        before: nn.Module | Mapping[str, Tensor],
        after: nn.Module | Mapping[str, Tensor],
        lr: float,
        *,
        local_steps: int = 1,
        example: Tensor | None = None,
        spec: ModelSpec | None = None,
        batch_size: int | None = None,
    ) -> Bundle:
        """Make a bundle of a client's update: its weights ``before`` and ``after`` plain SGD.

        The gradient is (before − after) / (lr · local_steps): of one step the gradient, to the
        weights' rounding over ``lr``; of several the mean of gradients at weights that moved, and
        the bundle's weights are those in their middle (:func:`middle_weights`). Give ``before`` as
        a module, and head, layers and input shape are recorded, as :meth:`from_gradients` does; of
        a state dict they are not. Raises :class:`InputError` where the two are not of one network,
        or nothing changed.
        """
        from gradleak.updates import middle_weights, update_gradient

        old = before if isinstance(before, Mapping) else before.state_dict()
        new = after if isinstance(after, Mapping) else after.state_dict()
        update = update_gradient(old, new, lr, local_steps=local_steps)
        told: dict[str, object] = {"lr": lr, "local_steps": local_steps}
        if isinstance(before, Mapping):
            buffers = {name: old[name] for name in update.buffers}
            state = {name: t for name, t in old.items() if name not in buffers}
            made = cls._of_parts(update.gradients, state, buffers, spec or ModelSpec(), batch_size)
        else:
            made = cls.from_gradients(
                before, update.gradients, example=example, spec=spec, batch_size=batch_size
            )
        moved = {
            PARAM + name: tensor.detach().cpu().contiguous()
            for name, tensor in middle_weights(old, new, local_steps).items()
            if local_steps > 1 and name not in update.buffers
        }
        return made.extended(
            moved, record=StageRecord("import", told), metadata={"update": json.dumps(told)}
        )

    @classmethod
    def _of_parts(
        cls,
        gradients: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        spec: ModelSpec,
        batch_size: int | None,
    ) -> Bundle:
        """Copy gradients and state, so that the model may be trained on."""
        parts = {GRAD: gradients, PARAM: parameters, BUFFER: buffers}
        tensors = {
            prefix + name: tensor.detach().to("cpu", copy=True)
            for prefix, part in parts.items()
            for name, tensor in part.items()
        }
        metadata = {"model": spec.to_json(), "loss": LOSS, "defenses": "[]"}
        if batch_size is not None:
            metadata["batch_size"] = str(batch_size)
        return cls(tensors, metadata)

    @property
    def model(self) -> ModelSpec:
        """What is known of the network."""
        text = self.metadata.get("model")
        return ModelSpec.from_json(text) if text else ModelSpec()

    @property
    def batch_size(self) -> int | None:
        """Number of samples, if whoever wrote the bundle knew."""
        value = self._json("batch_size")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def local_steps(self) -> int:
        """Number of a client's steps whose mean gradient this is, 1 unless an import says so."""
        update = self._json("update")
        steps = update.get("local_steps") if isinstance(update, dict) else None
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else 1

    def require_softmax_loss(self, *, scaled: bool = False) -> None:
        """Raise :class:`InputError` if the metadata name a loss that no attack here applies to.

        A loss that was multiplied by a factor is one, unless the caller knows what to do with
        ``scaled`` gradients.
        """
        loss = self._json("loss")
        if not isinstance(loss, dict):
            return
        name, scale = loss.get("name", "cross_entropy"), loss.get("scale", 1.0)
        if name != "cross_entropy":
            raise InputError(
                f"the bundle's loss is {name!r}, and the attacks are on softmax cross-entropy",
                "capture with cross-entropy",
            )
        if scale != 1.0 and not scaled:
            by = "an unknown factor" if scale is None else scale
            raise InputError(
                f"the bundle's loss was scaled by {by}",
                "divide the gradients by it, scale 1; or recover-label --loss-scale",
            )

    def plain_loss(self) -> Bundle:
        """Return the bundle with the gradients of the plain mean loss.

        The weight decay that the label came with is taken off, (λ, that of biases, the error of λ)
        of every parameter, and the loss scale divided by. Entries that are weight decay alone, to
        its error and rounding, become zero as they were. Raises :class:`InputError` where these are
        no such numbers, :class:`IncompleteError` where weight decay has no weights to be taken off.
        """
        if LOSS_SCALE not in self and WEIGHT_DECAY not in self:
            return self
        import torch

        scale, rate, rate_of_bias, error = 1.0, 0.0, 0.0, 0.0
        if LOSS_SCALE in self:
            scale = self._numbers(LOSS_SCALE, 1)[0]
            if not scale > 0.0:
                raise InputError(
                    f"{LOSS_SCALE} is not positive", "run gradleak recover-label again"
                )
        if WEIGHT_DECAY in self:
            rate, rate_of_bias, error = self._numbers(WEIGHT_DECAY, 3)
        dropped = (LOSS_SCALE, WEIGHT_DECAY)
        tensors = {name: value for name, value in self._tensors.items() if name not in dropped}
        for name in self.names(GRAD):
            given = self.unchecked(GRAD + name)
            plain, by = given.double(), rate_of_bias if name.endswith("bias") else rate
            if by and PARAM + name not in self:
                raise IncompleteError(
                    f"weight decay cannot be taken off {GRAD}{name} without {PARAM}{name}",
                    "give the weights with --weights FILE",
                )
            if by:
                state = self.unchecked(PARAM + name).double()
                left = plain - by * state
                unsure = _UNSURE * (abs(by) * torch.finfo(given.dtype).eps + error) * state.abs()
                plain = torch.where(left.abs() <= unsure, 0.0, left)
            tensors[GRAD + name] = (plain / scale).to(given.dtype)
        loss = self._json("loss")
        known = json.dumps({**(loss if isinstance(loss, dict) else {}), "scale": 1.0})
        return Bundle(tensors, {**self.metadata, "loss": known})

    def _numbers(self, name: str, count: int) -> list[float]:
        """Return the finite numbers of a small tensor."""
        tensor = self.tensor(name).double().flatten()
        if tensor.numel() != count:
            raise InputError(
                f"{name} has {tensor.numel()} numbers instead of {count}",
                "run gradleak recover-label again",
            )
        return [float(value) for value in tensor]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages that worked on this bundle, in order."""
        value = self._json("stages")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(stage, dict) for stage in value):
            raise InputError(
                "the bundle's metadata 'stages' is not a list of objects",
                "correct it, or leave the key out",
            )
        return value

    @property
    def defenses(self) -> list[dict[str, Any]]:
        """What was done to the gradients before they were sent, in order."""
        value = self._json("defenses")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise InputError(
                "the bundle's metadata 'defenses' is not a list of objects",
                "correct it, or leave the key out",
            )
        return value

    def without_answers(self) -> Bundle:
        """Return the bundle without anything that a stage recovered."""
        kept = {n: v for n, v in self._tensors.items() if not n.startswith(ANSWERS)}
        return Bundle(kept, self.metadata)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the tensors that begin with ``prefix``, without it."""
        return [name[len(prefix) :] for name in self._tensors if name.startswith(prefix)]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor without reading it."""
        value = self._tensors[name]
        return value.infos[name] if isinstance(value, TensorFile) else tensor_info(value)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor onto ``device``.

        Raises :class:`IncompleteError` when it is not there, :class:`InputError` when it holds NaN
        or infinity.
        """
        tensor = self.unchecked(name, device)
        check_finite(name, tensor)
        return tensor

    def unchecked(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor without looking for NaN: one pass less over a large one.

        The caller checks what it computes from it, and on a surprise calls ``check_finite``.
        """
        if name not in self._tensors:
            raise IncompleteError(f"the bundle holds no {name}", "run the stage that writes it")
        value = self._tensors[name]
        tensor = value.tensor(name) if isinstance(value, TensorFile) else value
        return tensor.to(device)

    def tensors(self, prefix: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read every tensor that begins with ``prefix``; the keys come without it."""
        return {name: self.tensor(prefix + name, device) for name in self.names(prefix)}

    def extended(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        record: StageRecord | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Bundle:
        """Return this bundle with further tensors and metadata, and a stage's record appended."""
        merged = {**self.metadata, **(metadata or {})}
        if record is not None:
            merged["stages"] = json.dumps([*self.stages, asdict(record)])
        return Bundle({**self._tensors, **(tensors or {})}, merged)

    def write(self, out: IO[bytes]) -> None:
        """Write the bundle to a binary stream, seekable or not."""
        head = {"format": FORMAT, "schema": str(SCHEMA)}
        write_tensors(out, self._tensors, {**self.metadata, **head})

    def save(self, path: Path | str) -> None:
        """Write the bundle to ``path``: whole or not at all; ``path`` may be the input itself."""
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            self.write(out)

    def _json(self, key: str) -> Any:
        if key not in self.metadata:
            return None
        try:
            return json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the bundle's metadata '{key}' is not JSON", "correct it, or leave the key out"
            ) from error

    def _check(self) -> None:
        if self.metadata.get("format") == FORMAT:
            _check_schema(self.metadata.get("schema", str(SCHEMA)))
        for name in self._tensors:
            if name.startswith((GRAD, PARAM)):
                self._check_dtype_and_shape(name)
        maps = {FEATURE + layer: (2, 4) for layer in self.names(FEATURE)}
        dimensions: dict[str, tuple[int, ...]] = {LABEL: (2,), IMAGE: (4,), **maps}
        for name, counts in dimensions.items():
            if name in self._tensors and len(self.info(name).shape) not in counts:
                known = " or ".join(str(count) for count in counts)
                raise InputError(
                    f"{name} has shape {list(self.info(name).shape)}, not {known} dimensions",
                    "run the stage that writes it again",
                )
        self._check_layers()

    def _check_dtype_and_shape(self, name: str) -> None:
        info = self.info(name)
        if info.dtype not in FLOATING:
            raise InputError(
                f"{name} has dtype {info.dtype}, which no gradient or weight has",
                "save it in a floating-point type",
            )
        other = PARAM + name[len(GRAD) :]
        if name.startswith(GRAD) and other in self._tensors:
            shape = self.info(other).shape
            if shape != info.shape:
                raise InputError(
                    f"{name} has shape {list(info.shape)} and {other} has {list(shape)}",
                    "use the weights that the gradient was taken at",
                )

    def _check_layers(self) -> None:
        """Hold the Linear layers of the metadata against the shapes of their tensors."""
        model = self.model
        if model.from_image and not model.layers:
            raise InputError(
                "the model's metadata has from_image, and no layers",
                "list the Linear layers, or leave the key out",
            )
        below: int | None = None  # the width of the layer before, where it is known
        for layer in model.layers:
            prefix = f"{layer.name}." if layer.name else ""
            matrix, vector = self._shape(f"{prefix}weight"), self._shape(f"{prefix}bias")
            follows = matrix is None or below is None or matrix[1:] == (below,)
            if matrix is not None and (len(matrix) != 2 or not follows):
                wanted = f"(…, {below})" if below is not None else "(out, in)"
                raise InputError(
                    f"{prefix}weight has shape {list(matrix)}, and as a Linear layer of the "
                    f"model's metadata it has {wanted}",
                    "correct the metadata's layers, or the tensors",
                )
            if matrix is not None and vector is not None and vector != matrix[:1]:
                raise InputError(
                    f"{prefix}bias has shape {list(vector)} for a layer of {matrix[0]} outputs",
                    "use the bias that belongs to the layer",
                )
            below = None if matrix is None else matrix[0]

    def _shape(self, parameter: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter from its gradient or itself, whichever is there."""
        for name in (GRAD + parameter, PARAM + parameter):
            if name in self._tensors:
                return self.info(name).shape
        return None


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # opening it will say what is wrong
        return False


def _check_schema(schema: str) -> None:
    # The length keeps int() from numbers that it refuses to read.
    if not (schema.isascii() and schema.isdecimal() and len(schema) < 10):
        raise InputError(f"the bundle's schema is {schema[:20]!r}, not a number", "correct it")
    if int(schema) > SCHEMA:
        raise InputError(
            f"the bundle has schema {schema}, and this gradleak {__version__} reads up to {SCHEMA}",
            f"install a gradleak that reads schema {schema}",
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise :class:`InputError` naming the tensor if it holds NaN or infinity."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return
    # One pass without a mask: NaN and infinity both reach the extremes.
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        kind = "NaN" if bool(torch.isnan(low)) else "infinity"
        raise InputError(f"{name} holds {kind}", "capture the gradient again")
