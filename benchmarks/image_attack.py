"""One case through the whole pipeline, and what came of it.

``attack`` sees the gradient and the network, as a user of the tool does; the truth enters in
``run_case`` alone, when all is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from image_cases import Captured, Case, captured
from image_maps import MapScore, score_maps
from torch import Tensor, nn

import gradleak
from gradleak.bundle import FEATURE, GRAD, IMAGE, LABEL, Bundle
from gradleak.errors import GradleakError
from gradleak.head import parameter_name
from gradleak.reconstruction.options import MatchSettings
from gradleak.stages.score import score

STAGES = ("label", "feature", "image")
# Inverting Gradients: cosine, total variation, signed Adam. The other: L2 by L-BFGS. Neither has
# the feature term, and steps do not end them: their time does.
BASELINES = {
    "Inverting Gradients": MatchSettings(
        optimiser="adam", distance="cosine", tv=0.01, feature_weight=0.0, steps=10**7
    ),
    "L-BFGS": MatchSettings(
        optimiser="lbfgs", distance="l2", tv=0.0, feature_weight=0.0, steps=10**7
    ),
}


@dataclass(frozen=True)
class Stage:
    """One stage of the attack: its wall-clock ``seconds``, and its verdict with the reason."""

    seconds: float
    verdict: str
    reason: str


@dataclass(frozen=True)
class Attack:
    """How each stage of an attack went; one that raised an error is the last.

    ``method`` is that of the image.
    """

    stages: dict[str, Stage]
    method: str

    @property
    def failed(self) -> str | None:
        """The first stage without the verdict ``unique``, None if all have it."""
        return next((name for name, s in self.stages.items() if s.verdict != "unique"), None)

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages.values())


@dataclass(frozen=True)
class Picture:
    """The picture of a case beside the truth; of a batch, its worst sample.

    ``psnr`` is in dB of the float picture, nan where there is none; ``differing`` counts the 8-bit
    values that are not the same, of ``total`` in all samples, those of missing samples among them.
    """

    psnr: float
    differing: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """One case: the attack, its picture, and those of the baselines with their seconds.

    ``name`` and ``held_out`` are the case's; ``condition`` is the first over the N-th singular
    value of the head's gradient.
    """

    name: str
    held_out: bool
    attack: Attack
    picture: Picture
    label_error: float
    condition: float
    baselines: dict[str, tuple[Picture, float]] = field(default_factory=dict)
    maps: MapScore | None = None

    @property
    def exact(self) -> bool:
        """Whether the tool says that the picture is the one."""
        return "image" in self.attack.stages and self.attack.stages["image"].verdict == "unique"

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return self.attack.seconds

    @property
    def reason(self) -> str:
        """Which stage was not certain of its answer, and why; empty if all were."""
        name = self.attack.failed
        if name is None:
            return ""
        stage = self.attack.stages[name]
        return f"{name} {stage.verdict} ({stage.reason})"


def run_case(
    case: Case, *, match_seconds: float, baseline_seconds: float = 0.0, factor: float = 10.0
) -> Outcome:
    """Attack a case and compare with the truth; then the baselines at ``factor`` × the time.

    ``match_seconds`` limits the search for an image where nothing exact applies,
    ``baseline_seconds`` each baseline (0: none).
    """
    given = captured(case)
    answer, found = attack(given.bundle, given.built.module, match_seconds, case)
    picture, label_error = compare(answer, given)
    maps = score_maps(answer, given) if case.maps else None
    baselines = {}
    if baseline_seconds > 0 and LABEL in answer:
        limit = min(baseline_seconds, factor * found.seconds)
        for name in BASELINES:
            done = match(name, answer, given.built.module, limit)
            if done is not None:
                baselines[name] = (compare(done[0], given)[0], done[1])
    condition = condition_of(given.bundle, len(given.truth.labels))
    return Outcome(
        name=case.name,
        held_out=case.held_out,
        attack=found,
        picture=picture,
        label_error=label_error,
        condition=condition,
        baselines=baselines,
        maps=maps,
    )


def attack(
    bundle: Bundle, module: nn.Module | None, match_seconds: float, case: Case | None = None
) -> tuple[Bundle, Attack]:
    """Go through the stages as far as they lead, each on the best answer of the one before.

    Returns the bundle with all answers and how the stages went. Of ``case`` the errors to put on
    label and feature are taken, nothing else.
    """
    stages: dict[str, Stage] = {}
    settings = MatchSettings(time_limit=match_seconds)
    method = "none"

    steps: tuple[Callable[..., Any], ...] = (
        gradleak.recover_label,
        gradleak.recover_feature,
        partial(gradleak.reconstruct, settings=settings, model=module),
    )
    for name, step in zip(STAGES, steps, strict=True):
        start = time.perf_counter()
        try:
            outcome = step(bundle)
        except GradleakError as error:
            stages[name] = Stage(time.perf_counter() - start, "failed", str(error))
            break
        except Exception as error:  # a fault of the tool is an outcome to be shown, not to end all
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            stages[name] = Stage(time.perf_counter() - start, "crashed", why)
            break
        seconds = time.perf_counter() - start
        said = getattr(outcome, "result", outcome)
        stages[name] = Stage(seconds, said.verdict, said.reason)
        bundle = outcome.bundle
        if name == "image":
            method = outcome.method
        elif case is not None:
            bundle = _with_errors(bundle, case, name)
    return bundle, Attack(stages, method)


def match(
    name: str, bundle: Bundle, module: nn.Module | None, seconds: float
) -> tuple[Bundle, float] | None:
    """Run a baseline on a bundle with its label, and return the seconds of its search.

    None where it finds no picture.
    """
    limited = replace(BASELINES[name], time_limit=seconds)
    try:
        found = gradleak.reconstruct(bundle, method="match", settings=limited, model=module)
    except GradleakError:
        return None
    return found.bundle, found.match.seconds if found.match else 0.0


def compare(bundle: Bundle, given: Captured) -> tuple[Picture, float]:
    """Return the picture beside the truth, and the largest error of a label (nan: not there)."""
    truth = given.truth
    each = truth.images[0].numel()
    total = each * len(truth.images)
    if LABEL not in bundle:
        return Picture(math.nan, total, total), math.nan
    found = score(bundle, truth=truth)
    label = max(found.labels.max_error) if found.labels and found.labels.max_error else math.nan
    missing = len(truth.images) - found.found
    label = math.nan if missing else label
    if found.images is None or IMAGE not in bundle:
        return Picture(math.nan, total, total), label
    psnr = math.nan if missing else min(found.images.psnr)
    return Picture(psnr, sum(found.images.differing) + missing * each, total), label


def condition_of(bundle: Bundle, samples: int) -> float:
    """Return the first over the N-th singular value of the head's gradient."""
    head = bundle.tensor(f"{GRAD}{parameter_name(bundle.model.head or '', 'weight')}")
    values = torch.linalg.svdvals(head.double())
    return float(values[0] / values[samples - 1]) if samples <= len(values) else math.inf


def _with_errors(bundle: Bundle, case: Case, stage: str) -> Bundle:
    """Put the case's relative error on what a stage found, for the next one to read."""
    dice = torch.Generator().manual_seed(case.seed)
    if stage == "label" and case.label_error:
        label = bundle.tensor(LABEL)
        draw = torch.randn(label.shape, generator=dice, dtype=torch.float64)
        draw -= draw.mean(1, keepdim=True)  # a label sums to one
        return bundle.extended({LABEL: _off(label, draw, case.label_error)})
    head = f"{FEATURE}{bundle.model.head}"
    if stage == "feature" and case.feature_error and head in bundle:
        feature = bundle.tensor(head)
        draw = torch.randn(feature.shape, generator=dice, dtype=torch.float64)
        # ReLU features that are zero are known to be zero.
        return bundle.extended({head: _off(feature, draw * (feature != 0), case.feature_error)})
    return bundle


def _off(value: Tensor, draw: Tensor, error: float) -> Tensor:
    """Return ``value`` (N, D) with an error of that relative norm in the direction of ``draw``."""
    size = value.norm(dim=1, keepdim=True) / draw.norm(dim=1, keepdim=True)
    off: Tensor = value + error * size * draw
    return off
