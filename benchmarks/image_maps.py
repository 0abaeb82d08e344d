"""Which feature maps the walk recovers, beside those of the true images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from image_cases import Captured
from torch import Tensor, nn

from gradleak.bundle import FEATURE, GRAD, LABEL, Bundle
from gradleak.calculus.trace import trace
from gradleak.calculus.walk import walk_down
from gradleak.normalisation import normalise

# Relative error up to which a map from a float32 gradient counts as exact.
EXACT = 1e-4


@dataclass(frozen=True)
class MapScore:
    """Of ``layers`` with weights, the inputs of ``recovered`` were; ``exact`` of these are right.

    ``worst`` is the largest relative error, ``barriers`` say what ended the walk.
    """

    layers: int
    recovered: int
    exact: int
    worst: float
    barriers: tuple[str, ...]


def score_maps(bundle: Bundle, given: Captured) -> MapScore | None:
    """Walk down from the recovered label and feature, and compare the maps with the truth.

    Samples are matched as the scores of pictures are: by label and feature. None without either.
    """
    head = f"{FEATURE}{bundle.model.head}"
    if (
        LABEL not in bundle
        or head not in bundle
        or len(bundle.tensor(LABEL)) != len(given.truth.images)
    ):
        return None
    labels, feature = bundle.tensor(LABEL), bundle.tensor(head)
    model = given.built.model
    walk = walk_down(
        model, torch.zeros_like(given.truth.images), bundle.tensors(GRAD), labels, feature
    )
    true_feature = given.truth.features[bundle.model.head or ""].double()
    order = torch.cdist(true_feature, feature.double()).argmin(1)
    true, worst, exact, recovered = _true_inputs(model, given), 0.0, 0, 0
    for found in walk.maps:
        goal = true[found.names[0]]
        error = float((found.estimate.value[order] - goal).norm() / goal.norm())
        worst = max(worst, error)
        recovered += len(found.names)
        exact += len(found.names) * (error <= EXACT)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) - 1
    return MapScore(layers, recovered, exact, worst, tuple(map(str, walk.barriers)))


def _true_inputs(model: nn.Module, given: Captured) -> dict[str, Tensor]:
    """Return what every operation of the network reads of the true images, by its name."""
    spec, images = given.built.spec, given.truth.images
    inputs = images if spec.mean is None else normalise(images, spec.mean, spec.std or ())
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    steps = trace(model, inputs)
    values, read = {0: inputs.double()}, {}
    for operation in steps.operations:
        args = [values[number] for number in operation.inputs]
        values[operation.output] = operation.run(args, state)
        read[operation.name] = args[0]
    return read
