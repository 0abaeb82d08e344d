"""Images by gradient matching: the fallback for every network that cannot be peeled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import IncompleteError
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.objectives import MatchingObjective
from gradleak.reconstruction.options import MatchOptions, default_options

Progress = Callable[[int, int, float], None]

# Standard deviation of the first image in normalised space. Smooth networks start near the mean
# picture; piecewise linear ones must not, since all their kinks meet there.
_SPREAD = {"adam": 1.0, "lbfgs": 0.1}
_DECAY_AT, _DECAY = (3 / 8, 5 / 8, 7 / 8), 0.1
# Steps from an image that is near are shorter: they are to end there, not to lose it.
_SHORTER = 0.3
_HISTORY = 100
# torch's L-BFGS drops curvature pairs with yᵀs <= 1e-10, an absolute bound that an objective of
# 1e-9 never passes: without this factor it stalls far from the picture.
_LBFGS_SCALE = 1e12


@dataclass(frozen=True)
class MatchResult:
    """The image whose gradient is nearest, and how near it is.

    ``images`` (N, C, H, W) are float32 in [0, 1]; ``objective`` is the smallest value met;
    ``steps`` evaluations were made over all restarts, ``restart`` (from 0) won, and ``stopped``
    says what ended it: ``steps``, ``time limit``, ``converged`` or ``not finite``. ``options``
    are those used, with nothing left to a default.
    """

    images: Tensor
    objective: float
    steps: int
    restart: int
    seconds: float
    stopped: str
    options: MatchOptions


def match_gradients(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    labels: Tensor,
    *,
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    head: str | None = None,
    features: Tensor | None = None,
    options: MatchOptions | None = None,
    start: Tensor | None = None,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> MatchResult:
    """Search the images of ``shape`` (C, H, W) whose gradient is the given one.

    ``gradients`` map parameters of ``model`` (eval mode) to their gradients and may hold only
    some; ``labels`` are the recovered (N, classes) and stay fixed; ``features`` (N, D) are the
    recovered inputs of the Linear layer ``head``, used if given; ``options`` None means
    ``default_options``. The first run begins at ``start`` (N, C, H, W) in [0, 1], if given, with
    shorter steps; others at random. The pictures stay in the box [0, 1], and the best iterate by
    the objective is returned. ``progress`` is called after each evaluation with those made, their
    greatest number, and the objective. Runs where the gradients are; the outcome depends on
    ``generator`` alone unless the time limit takes part.

    Sources: Inverting Gradients (arXiv 2003.14053) and the feature term of arXiv 2402.03124.
    Raises ``InputError`` for tensors that do not fit the network, ``UsageError`` for features
    without a ``head``, ``IncompleteError`` when the objective is never finite.
    """
    started = time.monotonic()
    used = (options or default_options(model, shape)).complete()
    smooth = used.optimiser == "lbfgs"
    objective = MatchingObjective(
        model,
        gradients,
        labels,
        mean=mean,
        std=std,
        distance=used.distance,
        tv=used.tv,
        feature_weight=used.feature_weight,
        head=head,
        features=features,
        dtype=torch.float64 if smooth else next(model.parameters()).dtype,
    )
    run = _Run(objective, used.steps or 1, used.restarts, used.time_limit, progress)
    for restart in range(used.restarts):
        drawn = torch.randn(
            (labels.shape[0], *shape), generator=generator, device=generator.device
        ).to(objective.low)
        x, rate = drawn * _SPREAD[used.optimiser], used.learning_rate or 1.0
        if start is not None and restart == 0:
            x, rate = normalise(start.to(drawn), mean, std), rate * (1.0 if smooth else _SHORTER)
        run.begin(restart)
        try:
            (_descend_lbfgs if smooth else _descend_adam)(run, objective.clamp(x), rate)
        except _Stop as stop:
            run.end(stop.reason)
        else:
            run.end("converged")
        if time.monotonic() >= run.started + run.limit:
            break
    if run.best_inputs is None:
        raise IncompleteError(
            "the matching objective was never finite", "check the gradients and the weights"
        )
    images = denormalise(run.best_inputs.double(), mean, std).clamp(0, 1).float()
    return MatchResult(
        images=images,
        objective=run.best,
        steps=run.evaluations,
        restart=run.best_restart,
        seconds=time.monotonic() - started,
        stopped=run.stopped,
        options=used,
    )


class _Stop(Exception):
    """Ends a descent from inside the objective, wherever the optimiser is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Run:
    """Counts evaluations, keeps the best iterate of all restarts, and says when to stop."""

    def __init__(
        self,
        objective: MatchingObjective,
        steps: int,
        restarts: int,
        time_limit: float | None,
        progress: Progress | None,
    ) -> None:
        self.objective, self.progress = objective, progress
        self.steps, self.restarts = steps, restarts
        self.limit = math.inf if time_limit is None else time_limit
        self.started = self.restart_started = time.monotonic()
        self.evaluations = self.in_restart = self.restart = self.best_restart = 0
        self.best = math.inf
        self.best_inputs: Tensor | None = None
        self.stopped = "steps"

    def begin(self, restart: int) -> None:
        self.restart, self.in_restart, self.restart_started = restart, 0, time.monotonic()

    def end(self, reason: str) -> None:
        # The winner's reason is the run's; a later restart that won nothing does not change it.
        if self.best_restart == self.restart:
            self.stopped = reason

    def fraction(self) -> float:
        """How much of this restart is spent, in steps or in time, whichever is more; 0 to 1."""
        now, end = time.monotonic(), self._deadline()
        if now >= end:
            return 1.0
        elapsed = (now - self.restart_started) / (end - self.restart_started)
        return max(self.in_restart / self.steps, elapsed)

    def _deadline(self) -> float:
        return self.started + self.limit * (self.restart + 1) / self.restarts

    def evaluate(self, inputs: Tensor) -> tuple[float, Tensor]:
        """Evaluate, remember and report one iterate; raise ``_Stop`` where the run must end."""
        if self.in_restart >= self.steps:
            raise _Stop("steps")
        if self.in_restart and time.monotonic() >= self._deadline():
            raise _Stop("time limit")
        value, uphill = self.objective(inputs)
        self.evaluations += 1
        self.in_restart += 1
        if not (math.isfinite(value) and bool(torch.isfinite(uphill).all())):
            raise _Stop("not finite")
        if value < self.best:
            self.best, self.best_restart = value, self.restart
            self.best_inputs = self.objective.clamp(inputs.detach()).clone()
        if self.progress is not None:
            self.progress(self.evaluations, self.steps * self.restarts, value)
        return value, uphill


def _descend_adam(run: _Run, x: Tensor, rate: float) -> None:
    """Step by the sign of the gradient through Adam, clamping to the box after each step."""
    x = x.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=rate)
    while True:
        _, uphill = run.evaluate(x)
        x.grad = uphill.sign()
        spent = run.fraction()
        adam.param_groups[0]["lr"] = rate * _DECAY ** sum(spent >= part for part in _DECAY_AT)
        adam.step()
        with torch.no_grad():
            x.copy_(run.objective.clamp(x))


def _descend_lbfgs(run: _Run, x: Tensor, rate: float) -> None:
    """Follow L-BFGS until its line search finds no lower point; steps are cut by ``run``."""
    x = x.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [x],
        lr=rate,
        max_iter=run.steps,
        max_eval=2 * run.steps,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> float:
        value, uphill = run.evaluate(x)
        x.grad = uphill * _LBFGS_SCALE
        return value * _LBFGS_SCALE

    lbfgs.step(closure)  # type: ignore[no-untyped-call]
