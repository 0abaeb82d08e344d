"""Whether a float32 gradient determines its label at all, judged from the truth in float64.

This is the referee of the label solver and shares no code with it. It knows the feature x, and asks
of the equations softmax(r W x + b) − δ/r = y, with r = 1 at the truth and δ = G x / ‖x‖²:

1. Is the truth's own family well conditioned there? The Jacobian over (log r, label parameters),
   weighted by the rounding of a float32 softmax, gives the label's standard error.
2. Is it overdetermined: more classes outside the support that say anything than unknowns?
3. Would the scale be open with one more class in the support? Then labels of that larger family
   all have doubles in the smaller, and nothing tells which of the two a gradient came from.
4. Does another label of a family with no more parameters fit within rounding, at any r of either
   sign? A larger family always contains the truth; it is no rival while 2 and 3 hold, because its
   labels would have to lie on a set of measure zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.softlabels import FAMILIES, Family

ROUNDING = 2.0**-24
SMALLEST = 1e-38
# A label is determined when its standard error is below DETERMINED; another one is another
# answer when it differs by more than DIFFERENT; it fits when its misfit is below FITS roundings.
DETERMINED, DIFFERENT, FITS = 1e-6, 1e-5, 4.0
# A log r known no better than this is open: a label of the larger family would have a double with
# a chance of √2π times this, one in a hundred.
OPEN = 4e-3
# Steps of the scan in log r while the logits are small, and in r·range(W x) when they are not.
_LOG_STEP, _STEP, _FROM, _TO, _END = 0.08, 0.4, 5.0, 300.0, 3000.0
_KEEP, _CANDIDATES, _GOLDEN_STEPS = 4, 3, 38
_GOLDEN = 0.5 * (5.0**0.5 - 1.0)


@dataclass(frozen=True)
class Judgement:
    """Whether a label is ``identifiable``, or the ``reason`` why not.

    ``error`` is its standard error, ``misfit`` the truth's own residual in roundings, ``found``
    whether the scan for rivals met the truth too, as it must.
    """

    identifiable: bool
    reason: str
    error: float
    misfit: float
    found: bool


@dataclass(frozen=True)
class Truth:
    """What is known of one gradient: turn W x (C,), bias b (C,), δ (C,) seen, label y (C,)."""

    turn: Tensor
    bias: Tensor
    delta: Tensor
    label: Tensor

    @classmethod
    def of(
        cls, gradient: Tensor, feature: Tensor, label: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Truth:
        """Take the float64 truth of a gradient (C, D) at a head ``weight`` (C, D)."""
        x = feature.double()
        turn = weight.double() @ x
        offset = torch.zeros_like(turn) if bias is None else bias.double()
        return cls(turn, offset, gradient.double() @ x / (x @ x), label.double())

    def seen(self, r: Tensor, classes: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return y(r) and its rounding error at ratios (M,), both (M, K) for K ``classes``."""
        logits = r[:, None] * self.turn + self.bias
        largest = r.abs()[:, None] * self.turn.abs().max() + self.bias.abs().max()
        total = torch.logsumexp(logits, 1, keepdim=True)
        p = (logits[:, classes] - total).exp()
        # A float32 softmax times Σy does not sum to one, an error that all classes share.
        blur = p * (1.0 + largest * (1.0 - p))  # an error of the logits, as the softmax takes it
        p = p * (1.0 + self.delta.sum() / r)[:, None]
        share = self.delta[classes] / r[:, None]
        y = p - share
        error = blur.square() + share.square() + y.square()
        floor = SMALLEST * (1.0 + 1.0 / r.abs())[:, None]
        return y, ROUNDING * error.sqrt() + floor


def judge(truth: Truth, family: str) -> Judgement:
    """Judge one gradient whose label is of ``family``."""
    if not bool((truth.delta != 0).any()):
        return Judgement(False, "the gradient is zero", float("inf"), 0.0, True)
    own = next(f for f in FAMILIES if f.name == family)
    at = _At.truth(truth)
    top = truth.label.topk(own.support).indices
    misfit = at.misfit(truth.label, top)
    blur = max(1.0, misfit)
    spare = at.spare(top, own.base)
    spread, base = at.errors(top, own.base)
    error = blur * at.label_error(top, own.base, spread, base)
    mimic = _mimic(truth, own, at, top)
    rivals, found = _rivals(truth, own, FITS * blur)
    reason = ""
    if spare < 1:
        reason = "no more equations than unknowns"
    elif not error <= DETERMINED:
        reason = f"the label's standard error is above {DETERMINED:g}"
    elif mimic:
        reason = "one more class in the support would leave the scale open"
    elif rivals:
        reason = f"a label of the {rivals[0]} family fits as well"
    return Judgement(not reason, reason, error, misfit, found)


@dataclass(frozen=True)
class _At:
    """The equations at the truth: y (C,), its rounding, its slope in log r, and what says much."""

    y: Tensor
    noise: Tensor
    slope: Tensor
    informative: Tensor
    p: Tensor

    @classmethod
    def truth(cls, truth: Truth) -> _At:
        """Evaluate them at r = 1."""
        y, noise = (t[0] for t in truth.seen(torch.ones(1, dtype=torch.float64)))
        p = torch.softmax(truth.turn + truth.bias, 0)
        slope = p * (truth.turn - p @ truth.turn) + truth.delta
        return cls(y, noise, slope, (p > SMALLEST) | (truth.delta.abs() > SMALLEST), p)

    def outside(self, top: Tensor) -> Tensor:
        """Return (C,) which classes are not in the support ``top`` (K,)."""
        return torch.ones_like(self.informative).scatter(0, top, False)

    def misfit(self, label: Tensor, top: Tensor) -> float:
        """Return the root mean square over the rest of y − label in roundings."""
        rest = self.outside(top)
        return float(((self.y - label)[rest] / self.noise[rest]).square().mean().sqrt())

    def spare(self, top: Tensor, base: bool) -> int:
        """Return how many equations there are beyond the unknowns r and the base."""
        return int((self.outside(top) & self.informative).sum()) - 1 - int(base)

    def errors(self, top: Tensor, base: bool) -> tuple[float, float]:
        """Return the standard errors of log r and of the base, inf where they are not determined.

        By a QR of scaled columns: the normal equations would square the condition.
        """
        rest = self.outside(top)
        columns = [self.slope[rest], *([-torch.ones_like(self.slope[rest])] if base else [])]
        jacobian = torch.stack(columns, 1) / self.noise[rest, None]
        size = torch.linalg.vector_norm(jacobian, dim=0)
        if len(jacobian) < len(columns) or not bool((size > 0).all()):
            return float("inf"), float("inf")
        r = torch.linalg.qr(jacobian / size).R
        if float(r.diagonal().abs().min()) < 1e-12:
            return float("inf"), float("inf")
        half = torch.linalg.inv(r) / size[:, None]
        return float(half[0].norm()), float(half[1].norm()) if base else 0.0

    def label_error(self, top: Tensor, base: bool, spread: float, of_base: float) -> float:
        """Return the largest standard error of a class, given those of log r and of the base."""
        if len(top) == 1:  # its weight is what the base leaves of one
            return of_base * (len(self.y) - 1) if base else 0.0
        own = (self.slope[top] * spread).square() + self.noise[top].square()
        return max(of_base, float(own.sqrt().max()))


def _mimic(truth: Truth, own: Family, at: _At, top: Tensor) -> bool:
    """Return whether a label with one more class in its support looks like one of ``own``.

    Where the softmax is saturated at a class k outside the support, the equation of k alone may
    fix the scale. With k in the support nothing does, and every such label has a double in ``own``.
    """
    richer = [f for f in FAMILIES if (f.support, f.base) == (own.support + 1, own.base)]
    if not richer or len(truth.label) < own.support + 2:
        return False
    candidates = at.p.masked_fill(~at.outside(top), -1.0).topk(_CANDIDATES).indices
    return any(at.errors(torch.cat([top, k[None]]), own.base)[0] > OPEN for k in candidates)


def _rivals(truth: Truth, own: Family, allowed: float) -> tuple[list[str], bool]:
    """Return the families of other labels that fit within rounding, and if the truth was met."""
    families = [f for f in FAMILIES if f.parameters <= own.parameters]
    families = [f for f in families if len(truth.label) - f.support - int(f.base) >= 2]
    support = torch.tensor([f.support for f in families])
    base = torch.tensor([f.base for f in families])
    grids = _grid(truth)
    low, high, kind = [], [], []
    some = _some_classes(truth)
    for grid in (grids, -grids):
        y, noise = truth.seen(grid, some)
        order = _largest(y)
        for place in range(len(families)):
            ones = torch.ones_like(grid, dtype=torch.int64)
            depth = _misfit(y, noise, order, support[place] * ones, base[place] & (ones > 0))[0]
            dips = torch.ones_like(depth, dtype=torch.bool)
            dips[1:] &= depth[1:] <= depth[:-1]
            dips[:-1] &= depth[:-1] <= depth[1:]
            depth = depth.masked_fill(~dips, float("inf"))
            best = depth.topk(min(_KEEP, len(depth)), largest=False).indices
            low.append(grid[(best - 1).clamp(min=0)])
            high.append(grid[(best + 1).clamp(max=len(grid) - 1)])
            kind.append(torch.full_like(best, place))
    family, ends = torch.cat(kind), (torch.cat(low), torch.cat(high))
    r, square = _golden(truth, *ends, support[family], base[family], some)
    # All classes are asked where some of them do not exclude a fit of all.
    kept = square <= allowed**2 * len(truth.label)
    r, family, ends = r[kept], family[kept], (ends[0][kept], ends[1][kept])
    if len(some) < len(truth.label):
        r, _ = _golden(truth, *ends, support[family], base[family], slice(None))
    y, noise = truth.seen(r)
    square, middle, inside = _misfit(y, noise, _largest(y), support[family], base[family])
    fits = (square / (~inside).sum(1)).sqrt() <= allowed
    label = torch.where(inside, y, middle[:, None])
    lone = (support[family] == 1)[:, None] & inside
    label = torch.where(lone, 1.0 - (len(truth.label) - 1) * middle[:, None], label)
    slack = allowed * noise.amin(1)
    smallest_inside = torch.where(inside, label, float("inf")).amin(1)
    fits &= (middle >= -slack) & (smallest_inside > middle)
    apart = (label - truth.label).abs().amax(1)
    other = fits & (apart > DIFFERENT)
    mine = torch.tensor([f == own for f in families])[family]
    near = (r - 1.0).abs() < 1e-3
    return [families[int(i)].name for i in family[other]], bool((fits & mine & near).any())


def _largest(y: Tensor) -> Tensor:
    """Return (M, 3) the places of the largest entries of y (M, K), descending."""
    return y.topk(min(3, y.shape[1] - 1), 1).indices


def _misfit(
    y: Tensor, noise: Tensor, order: Tensor, support: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return χ² (M,), the base (M,) and the support (M, K) of a family each at y(r) (M, K)."""
    chosen = torch.arange(order.shape[1]) < support[:, None]
    inside = torch.zeros_like(y, dtype=torch.bool).scatter(1, order, chosen)
    weight = noise.square().reciprocal().masked_fill(inside, 0.0)
    mean = (weight * y).sum(1) / weight.sum(1)
    middle = torch.where(base, mean, torch.zeros_like(mean))
    return (weight * (y - middle[:, None]).square()).sum(1), middle, inside


def _golden(
    truth: Truth,
    low: Tensor,
    high: Tensor,
    support: Tensor,
    base: Tensor,
    classes: Tensor | slice,
) -> tuple[Tensor, Tensor]:
    """Return where the misfit is smallest between ``low`` and ``high``, and the misfit, both (M,).

    By golden section.
    """

    def depth(r: Tensor) -> Tensor:
        y, noise = truth.seen(r, classes)
        return _misfit(y, noise, _largest(y), support, base)[0]

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = depth(left), depth(right)
    for _ in range(_GOLDEN_STEPS):
        down = at_left < at_right
        low, high = torch.where(down, low, left), torch.where(down, right, high)
        new = torch.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = depth(new)
        left, right = torch.where(down, new, right), torch.where(down, left, new)
        at_left, at_right = torch.where(down, at_new, at_right), torch.where(down, at_left, at_new)
    return torch.where(at_left < at_right, left, right), torch.minimum(at_left, at_right)


def _grid(truth: Truth) -> Tensor:
    """Return positive ratios (S,): from the simplex's bound Σ|δ| ≤ 2 r to full saturation."""
    reach = float(truth.turn.max() - truth.turn.min())
    first = max(0.45 * float(truth.delta.abs().sum()) * reach, 1e-12)

    def climb(start: float, end: float) -> Tensor:
        count = max(2, int(torch.log(torch.tensor(end / start)) / _LOG_STEP))
        return torch.logspace(0.0, 1.0, count, base=end / start, dtype=torch.float64) * start

    parts = []
    if first < _FROM:
        parts.append(climb(first, _FROM))
    if first < _TO:
        parts.append(torch.arange(max(first, _FROM), _TO, _STEP, dtype=torch.float64))
    parts.append(climb(max(first, _TO), 10.0 * max(first, _END)))
    return torch.cat(parts).unique() / reach


def _some_classes(truth: Truth, count: int = 40) -> Tensor:
    """Return places of the largest labels and logits and an even choice of the other classes.

    What does not fit some of the classes does not fit all of them.
    """
    classes = len(truth.label)
    if classes <= count:
        return torch.arange(classes)
    order = truth.turn.argsort()
    even = order[torch.linspace(0, classes - 1, count - 16).long()]
    return torch.cat([even, truth.label.topk(4).indices, order[-8:], order[:4]]).unique()
