"""The residuals over the scale, sampled for the eye: ρ(s) of §3 and the paper's variance loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import UsageError
from gradleak.labels.factorise import leading_triple
from gradleak.labels.paper_search import SUPPORTS, PaperOptions, RowProblem
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.search import residual_curves, scale_grid
from gradleak.labels.single import scale_problem
from gradleak.labels.verdict import LabelResult, SampleLabel
from gradleak.softlabels import FAMILIES, Family, families

# Drawn are scales up to this many times the largest root, or logits this far apart without one.
_BEYOND, _FAR_LOGITS = 20.0, 300.0
# Relative distances from a root at which the curves are sampled besides the grid.
_NEAR = tuple(sign * 10.0 ** (-0.25 * k) for k in range(3, 40) for sign in (1.0, -1.0))
_FINER = 3
_RUN = 1 << 18
# Entries of a label may be this far below zero, or four standard errors of the noise.
_ROUNDING, _SIGMAS = 1e-6, 4.0


@dataclass(frozen=True)
class Curve:
    """One residual over the scale: ``values`` (S,) float64 at the scales of :class:`Curves`."""

    family: str
    values: Tensor


@dataclass(frozen=True)
class Root:
    """A recovered ``sample`` and the depths of its scale: ρ of its family, the paper's loss."""

    sample: SampleLabel
    answer: bool
    residual: float | None
    loss: float | None


@dataclass(frozen=True)
class Curves:
    """What a picture of one gradient's scale search shows.

    ``scales`` (S,) float64, signed and ascending; ``residuals`` the scale-free ρ(s) of the families
    drawn, ``losses`` the paper's loss of its own, which accepts below ``tolerance``; ``valid`` (S,)
    whether y(s) is a label; ``roots`` the answer, if there is one, and the alternatives.
    """

    scales: Tensor
    residuals: tuple[Curve, ...]
    losses: tuple[Curve, ...]
    tolerance: float
    valid: Tensor
    roots: tuple[Root, ...]


def scale_curves(
    grad_weight: Tensor, weight: Tensor, bias: Tensor | None, result: LabelResult
) -> Curves:
    """Sample ρ(s) and the paper's loss over the scales of one sample, both signs.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` (C,) or None. ``result`` names the roots;
    drawn are their families and the simpler ones that these contain, or the four common families
    where there is no root. Raises :class:`UsageError` for a gradient of another rank than one,
    whose scale is not one number.
    """
    if result.rank != 1 or len(result.samples) > 1:
        raise UsageError(
            "--plot draws the one scale of a single sample, and this gradient has rank "
            f"{result.rank}",
            "leave --plot out",
        )
    with torch.no_grad():
        leading = leading_triple(grad_weight[None])
        problem = scale_problem(leading, weight, bias, noise=0.0)
        found = (*result.samples, *result.alternatives)
        scales = _scales(problem, [sample.scale for sample in found])
        chosen = _families(found)
        table = FamilyTable.of(chosen, scales.device)
        row = RowProblem.of(grad_weight, weight, bias, 1.0)
        # x = s v = λ · row
        steps = scales / (row.row @ leading.v[0])
        told = {k: name for name, k in SUPPORTS.items() if len(grad_weight) >= k + 2}
        supports = sorted({family.support for family in chosen} & told.keys()) or sorted(told)
        residuals = _in_runs(problem, scales, lambda s: residual_curves(problem, s[None], table))
        losses = [row.loss(steps, k) for k in supports]
        margin = _ROUNDING + _SIGMAS * (result.noise or 0.0) / scales.abs()
        lowest = _in_runs(problem, scales, lambda s: problem.at(s[None]).y.amin(-1)[None])
    curves = Curves(
        scales=scales.cpu(),
        residuals=tuple(
            Curve(family.name, values.cpu())
            for family, values in zip(chosen, residuals[:, 0], strict=True)
            if bool(values.isfinite().any())
        ),
        losses=tuple(
            Curve(told[k], values.cpu()) for k, values in zip(supports, losses, strict=True)
        ),
        tolerance=PaperOptions().tolerance,
        valid=(lowest[0, 0] >= -margin).cpu(),
        roots=(),
    )
    roots = tuple(_root(curves, sample, n < len(result.samples)) for n, sample in enumerate(found))
    return Curves(**{**vars(curves), "roots": roots})


def _scales(problem: ScaleProblem, roots: list[float]) -> Tensor:
    """Return (S,) the search grid, refined, and the roots with points close to them."""
    grid = scale_grid(problem)[0]
    parts = torch.arange(_FINER, dtype=grid.dtype, device=grid.device) / _FINER
    grid = (grid[:-1, None] * (grid[1:] / grid[:-1])[:, None] ** parts).flatten()
    spread = float(problem.a.amax() - problem.a.amin())
    reach = max((_BEYOND * abs(root) for root in roots), default=0.0)
    if reach == 0.0 and spread > 0.0:
        reach = _FAR_LOGITS / spread
    grid = grid[grid <= max(reach, _BEYOND * float(grid[0]))]
    near = torch.tensor([root * (1.0 + d) for root in roots for d in (0.0, *_NEAR)]).to(grid)
    return torch.cat([-grid, grid, near]).sort().values


def _families(found: tuple[SampleLabel, ...]) -> list[Family]:
    """Return the families of the roots with the simpler ones inside them, or the four common."""
    names = {sample.family for sample in found}
    rooted = [family for family in FAMILIES if family.name in names]
    drawn = [
        family
        for family in FAMILIES
        if any(family.support <= r.support and family.base <= r.base for r in rooted)
    ]
    common = [*families("hard"), *families("smooth"), *families("mixup"), *families("mixup+smooth")]
    return drawn or common


def _in_runs(problem: ScaleProblem, scales: Tensor, evaluate: Callable[[Tensor], Tensor]) -> Tensor:
    """Evaluate (F, 1, S) over the scales (S,), in runs that take little memory."""
    runs: tuple[Tensor, ...] = torch.split(scales, max(1, _RUN // problem.classes))
    return torch.cat([evaluate(run) for run in runs], -1)


def _root(curves: Curves, sample: SampleLabel, answer: bool) -> Root:
    """Look up how deep the curves are at the scale of a sample."""
    at = int((curves.scales - sample.scale).abs().argmin())
    residual = {curve.family: float(curve.values[at]) for curve in curves.residuals}
    losses = {SUPPORTS[curve.family]: float(curve.values[at]) for curve in curves.losses}
    return Root(sample, answer, residual.get(sample.family), losses.get(len(sample.classes)))
