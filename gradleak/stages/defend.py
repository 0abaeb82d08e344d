"""The client's filter: a bundle's gradients, changed as a defence changes them before sending."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from gradleak.bundle import GRAD, Bundle, StageRecord
from gradleak.defenses import Defense, apply_all
from gradleak.errors import InputError, UsageError

STAGE = "defend"


@dataclass(frozen=True)
class DefenseOutcome:
    """The defended ``bundle``; ``change`` is ‖g′ − g‖ / ‖g‖ over all tensors."""

    bundle: Bundle
    change: float
    norm_before: float
    norm_after: float
    dropped: tuple[str, ...]
    seconds: float


def defend(bundle: Bundle, defenses: Sequence[Defense], *, seed: int = 0) -> DefenseOutcome:
    """Apply ``defenses``, one after the other, to a bundle's gradients.

    They are recorded in the metadata, ``defenses``, after those that were there. What earlier
    stages recovered is dropped: it came from the gradient without them. Raises
    :class:`UsageError` without any defence, :class:`InputError` where a gradient holds NaN or
    infinity or becomes too large for its dtype.
    """
    started = time.monotonic()
    if not defenses:
        raise UsageError("no defence was named", "name one, --noise 1e-2 for example")
    given = bundle.tensors(GRAD)
    changed = apply_all(defenses, given, torch.Generator().manual_seed(seed))
    for name, gradient in changed.items():
        if not bool(torch.isfinite(gradient).all()):
            raise InputError(
                f"the defended gradient of {name} does not fit {gradient.dtype}",
                "choose a smaller amount, or save the gradients in float32",
            )
    before, after = (_norm(list(gradients.values())) for gradients in (given, changed))
    moved = _norm([changed[name].double() - g.double() for name, g in given.items()])
    seconds = time.monotonic() - started
    arguments = [{"name": defense.name, **asdict(defense)} for defense in defenses]  # type: ignore[call-overload]
    kept = bundle.without_answers()
    record = StageRecord(STAGE, {"defenses": arguments}, seed=seed, device="cpu", seconds=seconds)
    defended = kept.extended(
        {GRAD + name: gradient for name, gradient in changed.items()},
        record=record,
        metadata={"defenses": json.dumps([*bundle.defenses, *arguments])},
    )
    return DefenseOutcome(
        bundle=defended,
        change=moved / before if before else math.inf,
        norm_before=before,
        norm_after=after,
        dropped=tuple(name for name in bundle if name not in kept),
        seconds=seconds,
    )


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
