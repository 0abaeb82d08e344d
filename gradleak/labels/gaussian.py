"""A noisy gradient of one sample as a least-squares problem, and its linearisation (§3).

    minimise ‖G − γ (p − y) xᵀ‖²,   p = softmax(W x + b),  y = y(θ)     over x, θ (and γ)

Split dx = t v + g + h with v = x/‖x‖ and g, h ⊥ v. Along v the residual has C entries; across it
the best g is known, and h costs ‖δ‖²‖h‖², so h is eliminated in closed form. That leaves a
least-squares problem in (t, θ, γ) alone, a handful of unknowns, with the C × C covariance
Ω = I + κ B Bᵀ, B = γ (diag p − p pᵀ) W (I − v vᵀ), κ = ‖x‖²/‖δ‖². Its normal matrix is the Schur
complement over x of the Fisher information, hence the standard errors and the Cramér–Rao bound.
Systems with Ω are solved by conjugate gradients: all but a few of its eigenvalues are near one.

A bias gradient is one more column of G that multiplies the constant 1: [G g_b] = δ [xᵀ 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import vecdot

_CG_STEPS, _CG_TOLERANCE = 200, 1e-6
_TINY, _DAMPING = 1e-300, 1e-12
_LARGEST_STEP, _SMALLEST_FACTOR = 0.5, 0.3
# float64 sums of squares resolve no noise smaller than this, relative to the whole gradient.
_RESOLVED = 1e-7


@dataclass(frozen=True)
class Observation:
    """B noisy head gradients, float64, made to sum to zero over the classes, where δ lives.

    ``gradient`` and ``weight`` are (B, C, D), ``bias`` (B, C), ``grad_bias`` (B, C) or None,
    ``noise`` (B,) the standard deviation of one entry of either gradient, or the
    least that can be told from none, ``squares`` (B,) the sum of the squares of all of them.
    """

    gradient: Tensor
    weight: Tensor
    bias: Tensor
    grad_bias: Tensor | None
    noise: Tensor
    squares: Tensor

    @classmethod
    def of(
        cls,
        gradient: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_bias: Tensor | None,
        noise: Tensor,
    ) -> Observation:
        """Take (B, C, D) and (B, C) tensors of any dtype."""
        wide = gradient.double()
        wide = wide - wide.mean(1, keepdim=True)
        squares: Tensor = wide.square().sum((1, 2))
        if grad_bias is not None:
            grad_bias = grad_bias.double()
            grad_bias = grad_bias - grad_bias.mean(1, keepdim=True)
            squares = squares + grad_bias.square().sum(1)
        return cls(
            gradient=wide,
            weight=weight.double(),
            bias=torch.zeros_like(wide[..., 0]) if bias is None else bias.double(),
            grad_bias=grad_bias,
            noise=torch.maximum(noise.double(), _RESOLVED * squares.sqrt()),
            squares=squares,
        )

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.gradient.shape[1]

    def rows(self, index: Tensor, gram: Tensor | None) -> tuple[Observation, Tensor | None]:
        """Return the observations ``index`` and their part of :meth:`gram`."""
        part = Observation(
            gradient=self.gradient[index],
            weight=self.weight[index],
            bias=self.bias[index],
            grad_bias=None if self.grad_bias is None else self.grad_bias[index],
            noise=self.noise[index],
            squares=self.squares[index],
        )
        return part, None if gram is None else gram[index]

    def with_noise(self, noise: Tensor) -> Observation:
        """Return the observations with another ``noise`` (B,)."""
        return replace(self, noise=torch.maximum(noise, _RESOLVED * self.squares.sqrt()))

    def gram(self) -> Tensor | None:
        """Return W Wᵀ (B, C, C) where it is smaller than W itself, else None."""
        small = self.classes <= self.weight.shape[2]
        return self.weight @ self.weight.mT if small else None


@dataclass(frozen=True)
class Model:
    """M hypotheses for each of B observations, and their parameters.

    ``top`` (B, M, K) are the classes of the support, the ``support`` (B, M) first of them in use;
    ``base`` (B, M) says whether the other classes share a value. ``theta`` (B, M, K) are the
    weights β_2 … β_K of all but the first class and, last, the smoothing α:
    y = (1 − Σβ − α) e_1 + Σ β_j e_j + α/C. ``feature`` is x (B, M, D), ``loss_scale`` γ (B, M).
    """

    top: Tensor
    support: Tensor
    base: Tensor
    theta: Tensor
    feature: Tensor
    loss_scale: Tensor

    @property
    def active(self) -> Tensor:
        """Return (B, M, K) which entries of ``theta`` are free."""
        order = torch.arange(1, self.top.shape[-1], device=self.top.device)
        return torch.cat([order < self.support[..., None], self.base[..., None]], -1)

    def entries(self, to_label: Tensor) -> Tensor:
        """Return (B, M, K + 1) the label on the K support classes, and elsewhere.

        ``to_label`` is the :func:`label_map`.
        """
        values: Tensor = self.theta @ to_label.mT
        values[..., 0] += 1.0
        return values

    def directions(self, classes: int) -> Tensor:
        """Return E (B, M, C, K) = ∂y/∂θ; zero where a parameter is not free."""
        one = torch.nn.functional.one_hot(self.top, classes).mT.to(self.theta.dtype)
        first, others = one[..., :1], one[..., 1:]
        columns = torch.cat([others, torch.full_like(first, 1.0 / classes)], -1) - first
        return columns * self.active[..., None, :]

    def labels(self, directions: Tensor) -> Tensor:
        """Return y (B, M, C) for the ``directions`` of this model."""
        first = torch.zeros_like(directions[..., 0]).scatter(-1, self.top[..., :1], 1.0)
        return first + (directions @ self.theta[..., None]).squeeze(-1)


def label_map(theta: Tensor, classes: int) -> Tensor:
    """Return (K + 1, K): the label on its K support classes, and elsewhere, per unit of θ."""
    eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    rows = torch.cat([-torch.ones_like(eye[:1]), eye], 0)
    rows[1:, -1] = 0.0
    rows[:, -1] += 1.0 / classes
    return rows


@dataclass(frozen=True)
class Linear:
    """The problem linearised at a model; tensors (B, M, …).

    ``step`` is that of (‖x‖, θ, γ), ``across`` that of x perpendicular to ``direction`` = x/‖x‖;
    ``move`` is the square of the step in the metric of the information, ``promise`` what it should
    take off ``squares``. ``inverse`` is the inverse of the
    information in (‖x‖, θ, γ) and ``log_det`` log det of that in (x, θ, γ), both for a noise of 1;
    ``across_variance`` is the variance of x̂ perpendicular to x for a noise of 1, all of it.
    """

    step: Tensor
    across: Tensor
    direction: Tensor
    norm: Tensor
    squares: Tensor
    move: Tensor
    promise: Tensor
    free: Tensor
    inverse: Tensor
    log_det: Tensor
    across_variance: Tensor


Fields = TypeVar("Fields", Model, Linear)


def take(whole: Fields, rows: Tensor, columns: Tensor) -> Fields:
    """Return the hypotheses ``columns`` (B', M') of the problems ``rows`` (B',)."""
    picked = {name: value[rows[:, None], columns] for name, value in vars(whole).items()}
    return type(whole)(**picked)


@dataclass(frozen=True)
class Aim:
    """Where a profile of the likelihood is to be followed to.

    ``along`` (B, M, K + 2) is the linear combination of (‖x‖, θ, γ) that is to be as large as it
    can, ``squares`` (B, M) the residual sum of squares at which.
    """

    along: Tensor
    squares: Tensor


def linearise(
    seen: Observation,
    model: Model,
    gram: Tensor | None,
    loss_scale_free: bool,
    aim: Aim | None = None,
) -> Linear:
    """Form the least-squares problem in (t, θ, γ) at ``model`` and solve it.

    The step is to the least sum of squares, or to the ``aim``.
    """
    weight, x, gamma = seen.weight, model.feature, model.loss_scale[..., None]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    v = x / norm
    a = v @ weight.mT  # (B, M, C)
    p = torch.softmax(norm * a + seen.bias[:, None], -1)
    directions = model.directions(seen.classes)
    delta = gamma * (p - model.labels(directions))
    size = vecdot(delta, delta)[..., None]
    long = norm if seen.grad_bias is None else (norm.square() + 1.0).sqrt()

    along = v @ seen.gradient.mT  # G v
    residual = along - norm * delta
    if seen.grad_bias is not None:
        residual = (norm * along + seen.grad_bias[:, None]) / long - long * delta
    across = delta @ seen.gradient / size
    across = across - vecdot(across, v)[..., None] * v

    def spread(t: Tensor) -> Tensor:
        """Apply γ (diag p − p pᵀ) to the columns of t (B, M, C, R)."""
        weighted = p[..., None] * t
        return gamma[..., None] * (weighted - p[..., None] * weighted.sum(-2, keepdim=True))

    turn = spread(torch.stack([a, across @ weight.mT], -1))  # B v, B g
    columns = [
        long[..., None] * turn[..., :1] + (delta * norm / long)[..., None],
        -(long * gamma)[..., None] * directions,
        (long / gamma * float(loss_scale_free) * delta)[..., None],
    ]
    jacobian = torch.cat(columns, -1)
    target = residual - long * turn[..., 1]
    kappa = long.square() / size

    def covariance(t: Tensor) -> Tensor:
        """Apply Ω to the columns of t (B, M, C, R)."""
        u = spread(t)
        flat = u.transpose(1, 2).flatten(2)  # (B, C, M·R)
        turned = gram @ flat if gram is not None else weight @ (weight.mT @ flat)
        turned = turned.view(len(u), -1, u.shape[1], u.shape[3]).transpose(1, 2)
        turned = turned - a[..., None] * (a[..., None, :] @ u)
        out: Tensor = t + kappa[..., None] * spread(turned)
        return out

    wanted = torch.cat([jacobian, target[..., None]], -1)
    whitened = _conjugate_gradients(covariance, wanted)
    normal = jacobian.mT @ whitened
    normal, pull = normal[..., :-1], normal[..., -1]
    if seen.grad_bias is not None:
        # Across the plane of v and the constant: one more equation for t alone.
        crossed = vecdot(delta, along - norm * seen.grad_bias[:, None])[..., None]
        normal[..., 0, 0] += (size / long.square()).squeeze(-1)
        pull[..., 0] += (crossed / long.square()).squeeze(-1)
    free = torch.cat(
        [
            torch.ones_like(model.base)[..., None],
            model.active,
            torch.full_like(model.base, loss_scale_free)[..., None],
        ],
        -1,
    )
    normal = torch.where(free[..., None] & free[..., None, :], normal, 0.0)
    normal = normal + torch.diag_embed((~free).to(normal.dtype))
    normal = 0.5 * (normal + normal.mT)
    inverse, log_det = _inverse(normal)
    step = (inverse @ pull[..., None]).squeeze(-1)
    squares = squares_at(seen, along, delta, norm.squeeze(-1), size.squeeze(-1))
    promise = vecdot(residual, residual) + size.squeeze(-1) * vecdot(across, across)
    promise = promise - vecdot(target, whitened[..., -1]) + vecdot(step, pull)
    move = vecdot(step, pull)
    if aim is not None:
        step = step + _sideways(aim, inverse, squares - promise)
    # h, from what the step leaves of the residual
    rest = whitened[..., -1] - (whitened[..., :-1] @ step[..., None]).squeeze(-1)
    bent = spread(rest[..., None])[..., 0] @ weight
    bent = bent - vecdot(bent, v)[..., None] * v
    bent = long / size * bent
    move = move + size.squeeze(-1) * vecdot(across + bent, across + bent)
    # The part of x that the logits hold, class by class: exact where Ω is diagonal.
    held = kappa * (gamma * p).square() * weight.square().sum(-1)[:, None]
    width, size = weight.shape[2] - 1, size.squeeze(-1)
    return Linear(
        step=step,
        across=across + bent,
        direction=v,
        norm=norm.squeeze(-1),
        squares=squares,
        move=move,
        promise=promise,
        free=free,
        inverse=inverse,
        log_det=log_det + held.log1p().sum(-1) + width * size.log(),
        across_variance=(width - (held / (1.0 + held)).sum(-1)).clamp(min=0.0) / size,
    )


def _sideways(aim: Aim, inverse: Tensor, least: Tensor) -> Tensor:
    """Return what to add to the step that ends at the ``least`` sum of squares, to get to ``aim``.

    The largest c·d at S(d) = S: where S(d) = ``least`` + dᵀ N d it is d = μ N⁻¹ c.
    """
    turned = (inverse @ aim.along[..., None]).squeeze(-1)
    variance = vecdot(aim.along, turned).clamp(min=_TINY)
    sideways: Tensor = ((aim.squares - least).clamp(min=0.0) / variance).sqrt()[..., None] * turned
    return sideways


def moved(model: Model, now: Linear, length: Tensor) -> Model:
    """Return ``model`` moved along the step by ``length`` (B, M), the norm by a half at most.

    ``now`` is the problem linearised at ``model``.
    """
    limit = _LARGEST_STEP * now.norm / now.step[..., 0].abs().clamp(min=_TINY)
    by = length * limit.clamp(max=1.0)
    forward = now.step[..., :1] * now.direction + now.across
    gamma = model.loss_scale
    return replace(
        model,
        theta=model.theta + by[..., None] * now.step[..., 1:-1],
        feature=model.feature + by[..., None] * forward,
        loss_scale=torch.maximum(gamma + by * now.step[..., -1], _SMALLEST_FACTOR * gamma),
    )


def squares_at(
    seen: Observation, along: Tensor, delta: Tensor, norm: Tensor, size: Tensor
) -> Tensor:
    """Return (B, M) ‖[G g_b] − δ [xᵀ 1]‖² from G v, δ, ‖x‖ and ‖δ‖²."""
    product, square = norm * vecdot(delta, along), norm.square()
    if seen.grad_bias is not None:
        product = product + vecdot(delta, seen.grad_bias[:, None])
        square = square + 1.0
    left: Tensor = seen.squares[:, None] - 2.0 * product + size * square
    return left


def squares_of(seen: Observation, model: Model) -> Tensor:
    """Return (B, M) the residual sum of squares of ``model``."""
    norm = torch.linalg.vector_norm(model.feature, dim=-1)
    logits = model.feature @ seen.weight.mT + seen.bias[:, None]
    labels = model.labels(model.directions(seen.classes))
    delta = model.loss_scale[..., None] * (torch.softmax(logits, -1) - labels)
    along = model.feature @ seen.gradient.mT / norm[..., None]
    return squares_at(seen, along, delta, norm, vecdot(delta, delta))


def _inverse(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse and log det of small systems (..., R, R), scaled to a unit diagonal.

    A trace of damping keeps the singular ones finite; they state the large errors they have.
    """
    root = normal.diagonal(dim1=-2, dim2=-1).clamp(min=_TINY).sqrt()
    outer = root[..., None] * root[..., None, :]
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    factor = torch.linalg.cholesky_ex((normal / outer).nan_to_num(0.0) + _DAMPING * eye).L
    log_det = 2.0 * (factor.diagonal(dim1=-2, dim2=-1).clamp(min=_TINY).log() + root.log()).sum(-1)
    return torch.cholesky_inverse(factor) / outer, log_det


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Solve Ω t = ``wanted`` (B, M, C, R), every column by itself; ``apply`` multiplies by Ω."""
    solution = wanted  # Ω is nearly the identity
    residual = wanted - apply(solution)
    direction = residual
    square = residual.square().sum(-2, keepdim=True)
    enough = _CG_TOLERANCE**2 * wanted.square().sum(-2, keepdim=True)
    for _ in range(_CG_STEPS):
        left = square > enough
        if not bool(left.any()):
            break
        turned = apply(direction)
        along = square / (direction * turned).sum(-2, keepdim=True).clamp(min=_TINY)
        along = torch.where(left, along, 0.0)  # no column depends on what its neighbours need
        solution = solution + along * direction
        residual = residual - along * turned
        before, square = square, residual.square().sum(-2, keepdim=True)
        square = torch.where(left, square, before)
        direction = residual + square / before.clamp(min=_TINY) * direction
    return solution
