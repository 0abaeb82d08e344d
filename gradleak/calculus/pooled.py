"""The mask of a rectifier under global average pooling, from the convolution below it (§6c).

Under the pooling δ is the same at all places of a channel, v_o, so which units were open cannot be
read off the layer above. The gradient of the 3×3 convolution below knows: with X its unknown input
(places × channels), Δ = diag(v) · mask and S_t the shift of tap t with zeros coming in,

    G_t = Δ S_t X            for all nine taps t.

With U the leading subspace of G and A_t = Uᵀ G_t, the matrices A_t A_c⁺ = B S_t B⁻¹, c the centre,
are the shifts in an unknown basis, all in the same: B = UᵀΔ. A combination of the shifts that is
symmetric and has well separated eigenvalues gives B up to the scale of its eigenvectors, and the
other shifts give those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.calculus.gates import Gate, GatedLayer
from gradleak.calculus.solve import least_squares
from gradleak.calculus.window import Window

_TAPS = 9
_CENTRE, _WEST, _EAST, _NORTH, _SOUTH = 4, 3, 5, 1, 7
# Entries of δ above the pooling that are this much smaller than the largest say too little.
_SMALL = 1e-2
# A unit whose share of v is within this of one or zero is sure, by odds of so many nats.
_SURE, _ODDS, _UNSURE = 0.15, 30.0, 5.0
_FRACTIONS = [0.05 * k for k in range(1, 30)]


def pooled_gate(layer: GatedLayer) -> Gate | None:
    """Find the mask (1, O, P) above ``layer``, whose coefficient is the same at all its places.

    None where this does not apply: more than one sample, a leaky rectifier, another kernel than
    3×3 with stride and padding 1, more places than channels, nothing that comes down.
    """
    coefficient, gradient = layer.coefficient[0], layer.gradient
    channels, places = coefficient.shape
    per_channel = coefficient[:, 0]
    if (
        len(layer.coefficient) > 1
        or layer.closed != 0.0
        or not _is_same_convolution(layer.window)
        or places > min(channels, gradient.shape[1])
        or not bool(per_channel.any())
        or not torch.allclose(coefficient, per_channel[:, None].expand_as(coefficient))
    ):
        return None
    delta = _blind_delta(gradient, layer.window)
    if delta is None:
        return None
    large = per_channel.abs() > _SMALL * per_channel.abs().amax()
    share = torch.zeros_like(delta)
    share[large] = _unit_clusters(delta[large] / per_channel[large, None])
    if not bool(large.all()):
        # What is open in the small channels follows from the patches that the large ones show.
        rows = per_channel[large, None] * (share[large] > 0.5)
        flat = gradient.flatten(1)
        patches = least_squares(rows, flat[large])
        small = least_squares(patches.mT, flat[~large].mT).mT
        share[~large] = small / per_channel[~large, None]
    odds = _ODDS * (2.0 * share - 1.0)
    # A share that is neither near one nor near zero tells little, on whichever side it lies.
    beside = ((share - 0.5).abs() - 0.5).abs()
    return Gate(torch.where(beside > _SURE, odds.clamp(-_UNSURE, _UNSURE), odds)[None])


def _is_same_convolution(window: Window) -> bool:
    """Return whether the windows are those of a 3×3 convolution with stride and padding 1."""
    if window.taps != _TAPS or window.index.shape[1] != window.places:
        return False
    centre = window.index[_CENTRE]
    return bool((centre == torch.arange(window.places, device=centre.device)).all())


def _shift(window: Window, tap: int, like: Tensor) -> Tensor:
    """Return S (P, P) with (S X)[p] = what tap ``tap`` of window p reads of X."""
    places = window.places
    padded = torch.eye(places + 1, dtype=like.dtype, device=like.device)[:, :places]
    return padded[window.index[tap].to(like.device)]


def _blind_delta(gradient: Tensor, window: Window) -> Tensor | None:
    """Return Δ (O, P) up to one factor, from the gradient (O, C, 9) alone."""
    places = window.places
    left, _, _ = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    left = left[:, :places]
    seen = torch.einsum("op,oct->tpc", left, gradient)
    inverse = torch.linalg.pinv(seen[_CENTRE], rtol=1e-12)
    turned = seen @ inverse  # (9, P, P): the shifts in the basis B
    shifts = torch.stack([_shift(window, tap, gradient) for tap in range(_TAPS)])
    fraction = max(_FRACTIONS, key=lambda c: _gap(_combined(shifts, c)))
    _, known = torch.linalg.eigh(_combined(shifts, fraction))
    values, vectors = torch.linalg.eig(_combined(turned, fraction))
    vectors = vectors[:, values.real.argsort()].real
    if not math.isfinite(float(torch.linalg.cond(vectors))):
        return None
    one = torch.linalg.solve(vectors, turned @ vectors)
    two = known.mT @ shifts @ known
    others = torch.arange(_TAPS, device=gradient.device) != _CENTRE
    one, two = one[others], two[others]
    # Σ_t ‖D⁻¹ one_t D − two_t‖², made a quadratic form in the diagonal of D: (one D − D two).
    form = torch.diag(one.square().sum((0, 1)) + two.square().sum((0, 2)))
    cross = (one * two).sum(0)
    form = form - cross - cross.mT
    scale = torch.linalg.eigh(form).eigenvectors[:, 0]
    basis = vectors @ torch.diag(scale) @ known.mT
    below = torch.linalg.solve(basis, seen[_CENTRE])  # X, which rectifiers keep from being negative
    delta: Tensor = left @ basis
    return delta if float(below.sum()) > 0.0 else -delta


def _combined(shifts: Tensor, fraction: float) -> Tensor:
    across, along = shifts[_WEST] + shifts[_EAST], shifts[_NORTH] + shifts[_SOUTH]
    return across + fraction * along


def _gap(symmetric: Tensor) -> float:
    values = torch.linalg.eigvalsh(symmetric)
    return float((values[1:] - values[:-1]).amin()) if len(values) > 1 else 1.0


def _unit_clusters(share: Tensor) -> Tensor:
    """Scale shares so that those of open units are around one."""
    share = share if float(share.sum()) > 0.0 else -share
    high = share.flatten().kthvalue(max(1, int(0.95 * share.numel()))).values
    return share / share[share > 0.5 * high].median()
