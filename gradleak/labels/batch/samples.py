"""Finding the samples of a batch one after another (ALGORITHMS §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.labels.batch.roots import Equations, Roots
from gradleak.labels.batch.screening import propose
from gradleak.labels.batch.subspace import Subspace
from gradleak.softlabels import Family

ROUNDS = 6
"""Rounds of a search, each with more starts than the one before."""

# Starts of a family in a round: so many for each sample that is left, and some.
_STARTS, _MORE = 8, 16
_STEPS, _REFINEMENTS = 40, 15
# In what is left of a subspace, ‖r‖²/‖c‖² and |aᵀS⁻¹c/M − 1| below which an end is worth a look.
_PROMISING, _NEARLY = 1e-7, 1e-2
# Roundings of the samples taken out that blur the others, and ‖r‖²/‖c‖² they may lead to at most.
_BLUR, _BLURRED = 128.0, 1e-3
# Starts along the weak directions.
_AROUND = 6
# In the whole one: an end is a sample if both are within this many standard deviations.
_SIGMAS = 8.0
_MEMBER = 1e-3
_DISTINCT = 1e-2
# The weights of a label add up to one at most; far beyond that a start has run away.
_FULL = 1.5
# A descent leaves this of p, however precise the gradient; the joint polish goes further.
_SOLVED = 1e-12
# Ends of a descent this near each other, relative, have met.
_SAME = 1e-3
# Rounding of a float32 softmax cross-entropy, in units of the roundoff.
_SOFTMAX_ROUNDINGS = 4.0


@dataclass(frozen=True)
class Found:
    """Samples of one family, in the coordinates of the whole subspace."""

    roots: Roots
    family: Family


def find_samples(
    whole: Subspace,
    families: Sequence[Family],
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
    *,
    found: Sequence[Found] = (),
    rounds: Iterable[int] = range(ROUNDS),
) -> list[Found]:
    """Find the samples of a batch, each taken out of the gradient once it is found.

    Every round tries all ``families``, with more and wilder starts than the one before, the more
    successful families first. An end of a descent is recognised as a sample by Wedderburn's
    identity after it was refined in the whole subspace. ``progress`` is told found and all. What
    was ``found`` in earlier ``rounds`` is returned with the rest.
    """
    found = list(found)
    left = _without(whole, found)
    score = {
        family.name: sum(len(f.roots.a) for f in found if f.family == family) for family in families
    }
    for round_ in rounds:
        for family in sorted(families, key=lambda f: -score[f.name]):
            while left.size > 0 and overdetermined(left, family):
                roots = _search(whole, left, family, round_, generator)
                if len(roots.a):
                    roots, found = _more(whole, roots, found)
                if not len(roots.a):
                    break
                found.append(Found(roots, family))
                score[family.name] += len(roots.a)
                left = _without(whole, found)
                if progress is not None:
                    progress(whole.size - left.size, whole.size)
        if left.size == 0:
            break
    return found


def _more(whole: Subspace, roots: Roots, found: list[Found]) -> tuple[Roots, list[Found]]:
    """Return which ``roots`` are samples besides those ``found``, and those.

    Where all roots contradict what was found, the greater number of samples that agree with one
    another is right: a mistaken one keeps every true one out.
    """
    new = _distinct(whole, roots, found)
    if len(new.a) or not found:
        return new, found
    alone = _distinct(whole, roots, [])
    return (alone, []) if len(alone.a) > sum(len(f.roots.a) for f in found) else (new, found)


def search_once(
    whole: Subspace, found: Sequence[Found], family: Family, generator: torch.Generator
) -> Roots | None:
    """Return all ends of one more search that are samples, those ``found`` among them or not.

    None where one sample alone has too few equations, or no end is a sample.
    """
    left = _without(whole, found)
    if not overdetermined(left, family):
        return None
    ends = _search(whole, left, family, 0, generator)
    return ends if len(ends.a) else None


def _without(whole: Subspace, found: Sequence[Found]) -> Subspace:
    """Return what is left of the subspace once the samples found are taken out."""
    if not found:
        return whole
    return whole.without(
        torch.cat([f.roots.a for f in found]), torch.cat([f.roots.c for f in found])
    )


def find_mass(
    whole: Subspace, families: Sequence[Family], generator: torch.Generator
) -> float | None:
    """Find M = aᵀS⁻¹c from samples that are recognised without it, or None.

    A label without a base has a scale of its own. Two samples at least must agree on M.
    """
    free = replace(whole, mass=1.0, mass_known=False)
    for family in families:
        if family.base or not overdetermined(free, family):
            continue
        starts = propose(free, family.support, family.base, _STARTS * free.size + _MORE)
        ends = Equations(free, family.base).descend(starts.a, starts.classes, _STEPS)
        inside = ends.weights.amin(1) > -_MEMBER
        ends = ends.take((excess_of(free, ends) < _SIGMAS**2) & inside & (ends.membership > 0))
        if not len(ends.a):
            continue
        mass = float(ends.membership.median())
        agree = ends.take((ends.membership / mass - 1.0).abs() < _MEMBER)
        if len(_distinct(replace(free, mass=mass), agree, []).a) >= 2:
            return mass
    return None


def overdetermined(left: Subspace, family: Family) -> bool:
    """Return whether one sample alone has more equations than unknowns: C > 2n + q."""
    known = 0 if left.unit_row is None else 1
    return left.classes + known > 2 * left.size + family.parameters


def _search(
    whole: Subspace, left: Subspace, family: Family, round_: int, generator: torch.Generator
) -> Roots:
    """Descend from the starts of a round, and return the samples among the ends."""
    count = (_STARTS * left.size + _MORE) * (1 + round_)
    starts = propose(left, family.support, family.base, count, wide=round_ > 0)
    a = starts.a
    if round_ > 0:
        wobble = torch.randn(a.shape, generator=generator, dtype=a.dtype, device=a.device)
        a = a + (0.2 * round_ / left.size**0.5) * a.norm(dim=1, keepdim=True) * wobble
    ends = Equations(left, family.base).descend(a, starts.classes, _STEPS)
    good = (ends.misfit < _promising(whole, left)) | (excess_of(left, ends) < _SIGMAS**2)
    good &= _member(left, ends, _NEARLY)
    ends = _different(ends.take(good), 2 * left.size + _MORE)
    if not len(ends.a):
        return ends
    return _refined(whole, ends.a @ left.turn.T, ends.classes, family, generator)


def _refined(
    whole: Subspace, a: Tensor, classes: Tensor, family: Family, generator: torch.Generator
) -> Roots:
    """Refine ends ``a`` (M, n) in the whole subspace, and return the samples among them.

    Samples taken out blur the weakest directions of what is left, along which samples of one class
    differ that the network hardly tells apart: there, descents start from several places.
    """
    weak = whole.weak()
    if bool(weak.any()):
        a, classes = a.repeat(_AROUND, 1), classes.repeat(_AROUND, 1)
        shift = torch.randn(a.shape, generator=generator, dtype=a.dtype, device=a.device)
        a = a + shift * weak * a.square().mean(1, keepdim=True).sqrt()
    refined = Equations(whole, family.base).descend(a, classes, _REFINEMENTS)
    if bool(weak.any()):
        again, classes = torch.cat([a, refined.a]), torch.cat([classes, refined.classes])
        loose = Equations(whole, family.base, loosely=True).descend(again, classes, _STEPS)
        refined = Roots.join([refined, loose])  # a free base needs the firm one for its scale
    return refined.take(belongs(whole, refined))


def _different(ends: Roots, most: int) -> Roots:
    """Keep the best of the ends that met at one point, and ``most`` of the points."""
    ends = ends.take(ends.misfit.argsort())
    size = ends.a.norm(dim=1)
    near = torch.cdist(ends.a, ends.a) < _SAME * torch.minimum(size, size[:, None])
    first = ~near.tril(-1).any(1)
    return ends.take(first.nonzero()[:most, 0])


def _promising(whole: Subspace, left: Subspace) -> float:
    """Return the ‖r‖²/‖c‖² of a sample in what is left, which the rounding of the others blurs."""
    least = min(float(whole.values[-1]), float(left.values[-1]))
    blur = _BLUR * whole.unit * float(whole.values[0]) / least
    return max(_PROMISING, min(blur**2, _BLURRED))


def belongs(whole: Subspace, roots: Roots) -> Tensor:
    """Return (M,) whether each root is a sample of the batch, to the gradient's own precision."""
    inside = (roots.weights.amin(1) > -1e-3) & (roots.weights.sum(1) < _FULL)
    # The rounding of p is known by its order of magnitude, noise is measured: ‖r‖² is chi-squared.
    most = 1.0 + _SIGMAS * math.sqrt(2.0 / whole.classes) if whole.noisy else _SIGMAS**2
    return (excess_of(whole, roots) < most) & _member(whole, roots, _MEMBER) & inside


def _member(subspace: Subspace, roots: Roots, tolerance: float) -> Tensor:
    """Return (M,) whether aᵀS⁻¹c / M is one, but for ``tolerance`` and what noise makes of it."""
    allowed = tolerance + _SIGMAS * _crosstalk(subspace, roots.a, roots.c)
    return (roots.membership - 1.0).abs() < allowed


def _crosstalk(subspace: Subspace, a: Tensor, c: Tensor) -> Tensor:
    """Return (M,) the standard deviation of aᵀS⁻¹c / M under noise: τ ‖S⁻¹a‖ ‖S⁻¹c‖ / M."""
    sizes: Tensor = (a / subspace.values).norm(dim=1) * (c / subspace.values).norm(dim=1)
    return subspace.noise * sizes / subspace.mass


def excess_of(whole: Subspace, roots: Roots) -> Tensor:
    """Return (M,) ‖r‖² in units of what noise of the gradient and rounding of p would leave.

    Noise E on G turns span(U): (I − UUᵀ) δ = −(I − UUᵀ) E V S⁻¹ c.
    """
    noise = whole.noise**2 * (roots.c / whole.values).square().sum(1) * whole.classes
    size = whole.probabilities(roots.a).square().sum(1) + roots.c.square().sum(1)
    rounding = rounding_of(whole, roots.a).clamp(min=_SOLVED).square() * size
    return roots.misfit * roots.c.square().sum(1) / (noise + rounding)


def rounding_of(whole: Subspace, a: Tensor) -> Tensor:
    """Return (M,) the relative rounding error expected of a probability at ``a`` (M, n)."""
    logits = a @ whole.logits.T + whole.bias
    return whole.unit * (_SOFTMAX_ROUNDINGS + logits.abs().amax(1))


def _distinct(subspace: Subspace, roots: Roots, found: Sequence[Found]) -> Roots:
    """Keep the roots that are samples of their own: orthogonal to one another through S⁻¹."""
    a, c = [f.roots.a for f in found], [f.roots.c for f in found]
    blur = _SIGMAS * _crosstalk(subspace, roots.a, roots.c)
    chosen: list[int] = []
    for m in roots.misfit.argsort().tolist():
        if a:
            left, right = torch.cat(a) / subspace.values, torch.cat(c)
            across = (right @ (roots.a[m] / subspace.values)).abs().max()
            across = torch.maximum(across, (left @ roots.c[m]).abs().max()) / subspace.mass
            if bool(across > _DISTINCT + blur[m]):
                continue
        chosen.append(m)
        a.append(roots.a[m, None])
        c.append(roots.c[m, None])
    return roots.take(torch.tensor(chosen, dtype=torch.long, device=roots.a.device))
