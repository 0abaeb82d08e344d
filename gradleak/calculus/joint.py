"""The input of a layer from its gradient and from its output together (ALGORITHMS §6b).

Where a layer's output is known, entry by entry, it joins in: W x + b = z. Each equation has the
weight of its own error, which after a saturating activation differs by orders of magnitude. Few
unknowns are solved for by Cholesky's factor of MᵀM; for many, conjugate gradients run in
coordinates in which the gradient's part of MᵀM and a Kronecker product like the output's part are
both diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradleak.calculus.conjugate import conjugate_gradients
from gradleak.calculus.solve import LayerEquations, Solution
from gradleak.calculus.weighted import Equations, ForwardEquations

# Unknowns up to which MᵀM is made as a matrix, and places of all samples up to which the
# gradient's part of it is.
DENSE, PLACES = 4600, 4096
# A pivot below this, of normal equations with a unit diagonal, is rounding.
_SINGULAR = 1e-15
_REFINEMENTS, _POWER = 3, 20
# Draws of the solution's error: of a factor they cost little.
_DRAWS_DENSE, _DRAWS = 32, 2
# Draws that the errors of the Kronecker product are worth, which are right within a factor of two.
_PRIOR = 5.0
# Most steps of conjugate gradients, and the residuals asked for: of the solution, in what rounding
# of the gradients amounts to; of the draws; of an arbitrary right-hand side, which only a
# determined input has a solution for, in a direction's share of it; of the weakest direction.
_STEPS = 1000
_OF_ROUNDING, _DRAWN, _OF_ARBITRARY, _WEAKEST = 2e-3, 1e-3, 0.1, 0.1
_LEAST = 1e-13
# Weight given to directions that the Kronecker product does not see.
_UNSEEN = 1e-6


class _Solver(Protocol):
    """A way to solve the equations.

    ``weak`` is a batch of inputs in which those of which the equations say least stand out;
    ``scale`` (N, C, places) are the lengths of the columns of M.
    """

    weak: Tensor
    scale: Tensor

    def solve(self) -> Tensor | None:
        """Return the solution (1, N, C, places), None where there is no unique one."""

    def variance(self) -> Tensor:
        """Return the variance (N, C, places) of the solution for errors of one."""


def too_many(
    forward: Sequence[ForwardEquations], shape: tuple[int, ...], *, thorough: bool = True
) -> bool:
    """Return whether an input of ``shape`` (N, C, …) has more unknowns than can be solved for.

    Unless it is to be ``thorough``, only what takes seconds counts as solvable.
    """
    if math.prod(shape) <= DENSE:
        return False
    if not thorough or math.prod(shape) // shape[1] > PLACES:
        return True
    return any(part.taps is None for part in forward)


def solve_jointly(
    gradient: Sequence[LayerEquations],
    forward: Sequence[ForwardEquations],
    shape: tuple[int, ...],
    precision: float,
) -> Solution:
    """Solve for an input of ``shape`` (N, C, …) by weighted least squares.

    ``precision`` is the relative rounding of the gradients. Errors and condition number are
    estimated from draws. There must not be :func:`too_many` unknowns.
    """
    equations = Equations(gradient, forward, shape, precision)
    dice = torch.Generator(device=equations.gram.device).manual_seed(0)
    x = None
    for way in _ways(equations):
        solver = way(equations, precision, dice)
        x = solver.solve()
        if x is not None:
            break
    if x is None:
        nothing = equations.zeros()[0]
        return Solution(nothing, torch.full_like(nothing, math.inf), 1.0, math.inf)
    left = equations.left(x)
    spare = max(equations.count - equations.unknowns, 1)
    return Solution(
        x=x[0],
        std=(solver.variance() * (left / spare)).sqrt(),
        residual=math.sqrt(left) / max(equations.size, 1e-300),
        condition=_condition(equations, solver, dice),
    )


def _ways(equations: Equations) -> list[Callable[[Equations, float, torch.Generator], _Solver]]:
    """Return the ways to solve ``equations``, the quickest first.

    Where the gradient alone has enough equations, conjugate gradients need few steps.
    """
    if equations.unknowns > DENSE:
        return [_Conjugate]
    return [_Conjugate, _Factor] if equations.gradient_suffices else [_Factor]


class _Factor:
    """Cholesky's factor of MᵀM with a unit diagonal."""

    def __init__(self, equations: Equations, precision: float, dice: torch.Generator) -> None:
        self._equations = equations
        normal = equations.matrix()
        root = normal.diagonal().clamp(min=1e-300).sqrt()
        self.scale, self._scale = root.view_as(equations.zeros()[0]), root.reciprocal()
        normal *= self._scale[:, None]
        normal *= self._scale
        self._factor, info = torch.linalg.cholesky_ex(normal)
        pivots = self._factor.diagonal().square()
        self._singular = bool(info) or not float(pivots.amin()) >= _SINGULAR
        shape = (len(normal), _DRAWS_DENSE)
        some = torch.randn(shape, generator=dice, dtype=normal.dtype, device=normal.device)
        drawn = torch.linalg.solve_triangular(self._factor.mT, some, upper=True)
        self.draws: Tensor = self._inputs(drawn)
        self.weak = self._inputs(self._solved(drawn))

    def solve(self) -> Tensor | None:
        """Solve, and refine by what is left."""
        if self._singular:
            return None
        x = self._equations.zeros()
        for _ in range(_REFINEMENTS):
            pull = self._scale * self._equations.pull(x).flatten()
            x = x + self._inputs(self._solved(pull[:, None]))
        return x

    def variance(self) -> Tensor:
        """Take the mean square of the draws."""
        return self.draws.square().mean(0)

    def _solved(self, columns: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._factor, columns, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self._factor.mT, half, upper=True)
        return whole

    def _inputs(self, columns: Tensor) -> Tensor:
        """Return columns (n, K), in units of the diagonal, as a batch of inputs."""
        return (self._scale * columns.mT).view(-1, *self._equations.zeros().shape[1:])


class _Conjugate:
    """Conjugate gradients for y, where x = Q y Vᵀ by channels and places."""

    def __init__(self, equations: Equations, precision: float, dice: torch.Generator) -> None:
        self._equations = equations
        self._dice = dice
        across, along = equations.traces()
        both = equations.gram + across
        scale = both.diagonal().clamp(min=1e-300).rsqrt()
        factor, info = torch.linalg.cholesky_ex(scale[:, None] * both * scale)
        # What neither part sees of a place is seen by no equation at all.
        self._blind = bool(info) or not float(factor.diagonal().square().amin()) >= _SINGULAR
        half = torch.linalg.solve_triangular(
            factor, scale[:, None] * equations.gram * scale, upper=False
        )
        share, vectors = torch.linalg.eigh(
            torch.linalg.solve_triangular(factor, half.mT, upper=False)
        )
        share = share.clamp(0.0, 1.0)  # of the gradient's equations, in each direction
        energies, channels = torch.linalg.eigh(along)
        self._mix: Tensor = channels
        energies = energies.clamp(min=_UNSEEN)[:, None]
        self._size: Tensor = (share + (1.0 - share) * energies).sqrt()  # (C, N·places)
        self._own: Tensor = share / self._size.square()
        turned = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
        self._turn: Tensor = scale[:, None] * turned
        self.scale = equations.diagonal().clamp(min=1e-300).sqrt()
        self.draws = self.weak = equations.zeros()

    def solve(self) -> Tensor | None:
        """Solve for the input, draws of its error and an arbitrary right-hand side together."""
        if self._blind:
            return None
        right = self._down(self._equations.pull(self._equations.zeros()))
        drawn = self._down(self._equations.noise(_DRAWS, self._dice))
        any_ = torch.randn(
            right.shape, generator=self._dice, dtype=right.dtype, device=right.device
        )
        size = float(torch.linalg.vector_norm(right))
        rounding = float(torch.linalg.vector_norm(drawn)) / math.sqrt(_DRAWS)
        tolerance = max(_OF_ROUNDING * rounding / max(size, 1e-300), _LEAST)
        goals = [tolerance, *[_DRAWN] * _DRAWS, _OF_ARBITRARY / math.sqrt(right.numel())]
        found, done = self._conjugate(torch.cat([right, drawn, any_]), goals)
        if not done:
            return None
        x, others = self._up(found[:1]), found[1:]
        # The recursion's residual drifts from the true one.
        rest = self._down(self._equations.pull(x))
        off = float(torch.linalg.vector_norm(rest)) / max(size, 1e-300)
        if off > tolerance:
            x = x + self._up(self._conjugate(rest, [tolerance / off])[0])
        self.draws = self._up(others[:-1])
        self.weak = self._weakest(others)
        return x

    def _weakest(self, solved: Tensor) -> Tensor:
        """Return the inputs of ``solved`` coordinates, and of one step of inverse iteration."""
        inputs = self._up(solved) * self.scale
        span = torch.linalg.qr(inputs.flatten(1).mT).Q.mT.view_as(inputs) / self.scale
        seen = span.flatten(1) @ self._equations.normal(span).flatten(1).mT
        least = torch.linalg.eigh(0.5 * (seen + seen.mT)).eigenvectors[:, :1].mT
        weakest = (least @ span.flatten(1)).view_as(span[:1]) * self.scale.square()
        further, _ = self._conjugate(self._down(weakest), [_WEAKEST])
        return torch.cat([span, self._up(further)])

    def _conjugate(self, right: Tensor, goals: Sequence[float]) -> tuple[Tensor, bool]:
        goal = torch.tensor(goals, dtype=right.dtype, device=right.device)
        found, done = conjugate_gradients(self._operator, right, goal, _STEPS)
        return found, bool(done.all())

    def variance(self) -> Tensor:
        """Take the Kronecker product's, made right on the mean, and the draws together."""
        own = (self._mix.square() @ self._size.square().reciprocal()) @ self._turn.square().mT
        prior = self._equations.by_sample(own[None])[0]
        seen = self.draws.square().mean(0)
        prior = prior * float((seen / prior).mean())
        return (_PRIOR * prior + len(self.draws) * seen) / (_PRIOR + len(self.draws))

    def _operator(self, y: Tensor) -> Tensor:
        return self._own * y + self._down(self._equations.of_outputs(self._up(y)))

    def _up(self, y: Tensor) -> Tensor:
        """Return the inputs (K, N, C, places) that the coordinates y (K, C, N·places) are of."""
        return self._equations.by_sample(self._mix @ (y / self._size) @ self._turn.mT)

    def _down(self, x: Tensor) -> Tensor:
        """Apply the transpose of :meth:`_up`."""
        return (self._mix.mT @ self._equations.by_channel(x) @ self._turn) / self._size


def _condition(equations: Equations, solver: _Solver, dice: torch.Generator) -> float:
    """Estimate the condition number of the equations, their columns scaled to length one.

    The largest stretch is found by the power method, the least among the inputs spanned by
    the solver's weak ones.
    """
    root, weak = solver.scale, solver.weak
    v, most = torch.randn(root.shape, generator=dice, dtype=root.dtype, device=root.device), 1.0
    for _ in range(_POWER):
        v = equations.normal((v / root)[None])[0] / root
        most = float(v.norm())
        v = v / most
    span = torch.linalg.qr((weak * root).flatten(1).mT).Q  # (n, K)
    inputs = span.mT.view_as(weak) / root
    seen = inputs.flatten(1) @ equations.normal(inputs).flatten(1).mT
    least = float(torch.linalg.eigvalsh(0.5 * (seen + seen.mT))[0])
    return math.sqrt(most / max(least, 1e-300 * most))
