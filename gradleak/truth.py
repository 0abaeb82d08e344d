"""The ground-truth file: written by ``capture --truth``, read by ``score`` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradleak.errors import InputError
from gradleak.files import atomic_path
from gradleak.tensorfile import TensorFile, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "gradleak.truth"
LABEL, IMAGE, FEATURE = "truth/label", "truth/image", "truth/feature/"


@dataclass(frozen=True)
class Truth:
    """What an attack must not see: ``labels`` (N, C), ``images`` (N, 3, H, W) in [0, 1].

    ``features`` maps each Linear layer of the classifier to its input (N, D).
    """

    labels: Tensor
    images: Tensor
    features: Mapping[str, Tensor]

    def save(self, path: Path | str) -> None:
        """Write the truth to a file of its own, whole or not at all."""
        tensors = {LABEL: self.labels, IMAGE: self.images}
        tensors |= {FEATURE + name: x for name, x in self.features.items()}
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            write_tensors(out, tensors, {"format": FORMAT, "schema": "1"})

    @classmethod
    def load(cls, path: Path | str) -> Truth:
        """Read a truth file; raises :class:`InputError` for any other file."""
        file = TensorFile(path)
        if file.metadata.get("format") != FORMAT or not {LABEL, IMAGE} <= file.infos.keys():
            raise InputError(f"{path} is no truth file", "write one with gradleak capture --truth")
        names = [name for name in file.infos if name.startswith(FEATURE)]
        for name, count in {LABEL: 2, IMAGE: 4, **dict.fromkeys(names, 2)}.items():
            shape = file.infos[name].shape
            if len(shape) != count or shape[0] != file.infos[LABEL].shape[0]:
                raise InputError(
                    f"{path}: {name} has shape {list(shape)}, beside {LABEL} of "
                    f"{list(file.infos[LABEL].shape)}",
                    "write the truth again with gradleak capture --truth",
                )
        return cls(
            file.tensor(LABEL),
            file.tensor(IMAGE),
            {name[len(FEATURE) :]: file.tensor(name) for name in names},
        )
