"""Every feature map that the gradient determines: ``recover-feature --all``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gradleak.bundle import FEATURE, GRAD, LABEL, Bundle, StageRecord
from gradleak.calculus.record import PeeledMap
from gradleak.calculus.walk import walk_down
from gradleak.device import resolve_device
from gradleak.errors import IncompleteError
from gradleak.head import with_weights
from gradleak.progress import Progress
from gradleak.stages.network import head_feature, input_shape, network_of

# A map is exact where its equations leave no more than so many roundings of the gradient, and than
# a part of it that is beyond half precision.
_ROUNDINGS, _COARSEST = 80.0, 1e-3


@dataclass(frozen=True)
class MapsOutcome:
    """The enriched ``bundle``, all recovered ``maps`` from the head downwards, and the exact ones.

    ``barriers`` say which operations the walk did not get past, and why.
    """

    bundle: Bundle
    maps: tuple[PeeledMap, ...]
    exact: tuple[PeeledMap, ...]
    barriers: tuple[str, ...]
    device: str
    seconds: float


def recover_maps(
    bundle: Bundle,
    *,
    model: nn.Module | str | None = None,
    weights: Path | str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> MapsOutcome:
    """Walk down a network as far as its gradients determine what its layers read.

    Needs what ``recover-feature`` writes. The input of a layer goes to ``feature/<layer>``
    (N, C, H, W) or (N, D) float64, where its equations hold to the gradient's own precision; the
    stage's record has the residuals. Raises :class:`IncompleteError` without labels, features or
    weights, :class:`UsageError` for a network that has to be named with ``model``.
    """
    where = resolve_device(device)
    full = with_weights(bundle, weights).plain_loss()
    feature = head_feature(full, where)
    if LABEL not in full or feature is None:
        raise IncompleteError("label or feature are missing", "run gradleak recover-feature first")
    labels = full.tensor(LABEL, where).double()
    network = network_of(full, model, where)
    gradients = full.tensors(GRAD, where)
    start = time.perf_counter()
    example = torch.zeros(len(labels), *input_shape(full.model), device=where)
    walk = walk_down(network, example, gradients, labels, feature, progress=progress)
    seconds = time.perf_counter() - start
    unit = max(torch.finfo(gradient.dtype).eps for gradient in gradients.values())
    limit = min(_ROUNDINGS * unit, _COARSEST)
    exact = tuple(found for found in walk.maps if found.residual <= limit and found.spare > 0)
    tensors = {FEATURE + found.names[0]: found.estimate.value.cpu() for found in exact}
    residuals = {found.names[0]: found.residual for found in exact}
    record = StageRecord(
        "recover-feature", {"all": True, "residuals": residuals}, seed, str(where), seconds
    )
    return MapsOutcome(
        bundle=bundle.extended(tensors, record=record),
        maps=tuple(walk.maps),
        exact=exact,
        barriers=tuple(str(barrier) for barrier in walk.barriers),
        device=str(where),
        seconds=seconds,
    )
