"""What is known of a gradient, and the images that answer it with their certificate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gradleak.calculus.added import Added
from gradleak.calculus.fit import Fitted
from gradleak.calculus.prior import Bounds
from gradleak.calculus.walk import Walk
from gradleak.normalisation import denormalise, normalise
from gradleak.reconstruction.matching import MatchResult
from gradleak.reconstruction.objectives import soft_cross_entropy
from gradleak.reconstruction.resimulate import GradientResidual, check_reconstruction

LEVELS = 255.0
"""The largest level of an 8-bit picture."""

# How far from a level a pixel may be to count as being there.
_OFF_LEVEL = 0.3
# The picture that a fit starts from: so many smooth blots a side, of this mean and spread.
_START_GRID, _START_GREY, _START_SPREAD = 4, 0.5, 0.15


@dataclass(frozen=True)
class Answer:
    """Images (N, 3, H, W) by one method, with their certificate, and how they were found.

    ``labels`` (N, C) are better ones that the images led to, None where the given ones are kept;
    ``after`` says what was done to the images once they were found;
    ``estimated`` is between which PSNRs (dB) they are, by the errors of the equations they solve;
    None where nothing tells.
    """

    method: str
    images: Tensor
    certificate: GradientResidual
    walk: Walk | None = None
    fitted: Fitted | None = None
    match: MatchResult | None = None
    added: Added | None = None
    estimated: tuple[float, float] | None = None
    labels: Tensor | None = None
    after: tuple[str, ...] = ()

    def missing(self, numbers: int) -> int:
        """Return how many equations the images' entries lack, given ``numbers`` of a gradient."""
        if self.added is not None or (self.walk is not None and self.fitted is None):
            return 0  # solved for
        known = numbers if self.fitted is None else self.fitted.equations
        return max(0, self.images.numel() - known)


def with_eight_bits(images: Tensor) -> Tensor | None:
    """Return ``images`` in [0, 1] with exactly 8 bits, None where they are not near that."""
    levels = images * LEVELS
    if float((levels - levels.round()).abs().max()) > _OFF_LEVEL:
        return None
    return (levels.round() / LEVELS).float()


def nearest(method: str, images: Tensor, certify: Callable[[Tensor], GradientResidual]) -> Answer:
    """Make an answer of ``images`` in [0, 1], which ``certify`` compares by their gradient.

    Most pictures have 8 bits. Where these all but have, they are tried with exactly those. All
    pixels near a level are no accident: if the gradient agrees, that is the answer; if neither
    picture's does, the nearer one is.
    """
    answers = []
    for tried in (with_eight_bits(images), images.float()):
        if tried is not None:
            answers.append(Answer(method, tried, certify(tried)))
            if answers[-1].certificate.exact:
                break
    return min(answers, key=lambda tried: (not tried.certificate.exact, tried.certificate.relative))


@dataclass(frozen=True)
class Given:
    """What is known of a gradient: its network, and what the earlier stages recovered."""

    network: nn.Module
    gradients: Mapping[str, Tensor]
    labels: Tensor
    feature: Tensor | None
    shape: tuple[int, int, int]
    normalisation: tuple[Sequence[float], Sequence[float]]
    head: str | None

    def certify(self, images: Tensor) -> GradientResidual:
        """Compare the images' own gradient with the given one."""
        mean, std = self.normalisation
        return check_reconstruction(self.network, self.gradients, images, self.labels, mean, std)

    def answer(self, method: str, inputs: Tensor) -> Answer:
        """Make an answer of what the network takes, ``inputs`` (N, C, H, W).

        See :func:`nearest`.
        """
        images = denormalise(inputs, *self.normalisation).clamp(0.0, 1.0)
        return nearest(method, images, self.certify)

    def is_read(self, inputs: Tensor) -> bool:
        """Return whether ``inputs`` are pictures of 8 bits already whose gradient is the given."""
        rounded = with_eight_bits(denormalise(inputs, *self.normalisation).clamp(0.0, 1.0))
        return rounded is not None and self.certify(rounded).exact

    def without_part(self, images: Tensor) -> int:
        """Return how many pixels of ``images`` (N, 3, H, W) have no part in their gradient.

        No window reads them, or all that reads them is closed: another value is as good.
        """
        network = copy.deepcopy(self.network).double().eval()
        inputs = normalise(images.double(), *self.normalisation).requires_grad_()
        with torch.enable_grad():
            loss = soft_cross_entropy(network(inputs), self.labels.to(inputs))
            (slope,) = torch.autograd.grad(loss, inputs)
        return int((slope == 0.0).all(1).sum())

    def bounds(self) -> Bounds:
        """Return what the network takes of black and white pictures."""
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.labels.device)
        both = normalise(ends.view(2, 1, 1, 1).expand(2, self.shape[0], 1, 1), *self.normalisation)
        return Bounds(both[:1], both[1:])

    def smooth_start(self, dice: torch.Generator) -> Tensor:
        """Return smooth random inputs (N, C, H, W): at plain grey all kinks of ReLUs meet."""
        size = (len(self.labels), self.shape[0], _START_GRID, _START_GRID)
        coarse = _START_GREY + _START_SPREAD * torch.randn(size, generator=dice, device=dice.device)
        pictures = interpolate(coarse, size=self.shape[1:], mode="bicubic", align_corners=False)
        return normalise(pictures, *self.normalisation)
