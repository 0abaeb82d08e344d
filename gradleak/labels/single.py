"""Gradients of one sample each: label and feature from the head's alone (ALGORITHMS §2–3).

Any number of them is solved in one batched computation; one gradient is a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.errors import GradleakError, InputError
from gradleak.labels.answer import Solved, resimulate, results
from gradleak.labels.batch.recover import recover_batch
from gradleak.labels.bias import foreign_bias, scales_from_bias
from gradleak.labels.checks import column_sums, not_softmax
from gradleak.labels.decide import decide
from gradleak.labels.factorise import Rank, RankOne, as_one_sample, leading_triple, ranks_of
from gradleak.labels.gaussian import Observation
from gradleak.labels.lossscale import solve_unknown_scale
from gradleak.labels.noisy import solve_under_noise
from gradleak.labels.options import LabelOptions
from gradleak.labels.problem import FamilyTable, ScaleProblem
from gradleak.labels.recognise import is_doubtful, with_recognised_scale
from gradleak.labels.refine import describe, refine
from gradleak.labels.search import find_candidates
from gradleak.labels.verdict import LabelResult
from gradleak.linalg import matmul, matvec, precision
from gradleak.softlabels import FAMILIES, Family

# Classes, and values of the gradients, that are worked on at once: what stays in a core's cache,
# and what fills a GPU.
_CLASSES, _GPU_CLASSES = 1 << 13, 1 << 19
_VALUES, _GPU_VALUES = 1 << 22, 1 << 28


def recover_single(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    families: Sequence[Family] = FAMILIES,
    method: str = "auto",
    options: LabelOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    noise_std: float | None = None,
    loss_scale: float | None = 1.0,
) -> LabelResult:
    """Recover the soft label and the head's input feature of one sample.

    ``grad_weight`` and ``weight`` are (C, D), ``bias`` and ``grad_bias`` (C,) or None. With a bias
    gradient the closed form of §2 answers for any label (``method='bias'``); without one the
    scale search of §3 does (``method='scale'``); ``auto`` prefers the former. Under noise both are
    starts for the maximum of the likelihood. ``noise_std`` is the standard deviation of the noise
    on an entry of the gradient, 0 for none; by default it is estimated. ``loss_scale`` is the
    factor of the loss, None where it is unknown and to be recovered.

    Raises :class:`InputError` when the gradient is not of softmax cross-entropy (Theorem 1 of arXiv
    2402.03124: every column sums to zero over the classes), or holds NaN or infinity.
    """
    (result,) = recover_singles(
        grad_weight[None],
        weight,
        bias=bias,
        grad_bias=None if grad_bias is None else grad_bias[None],
        families=families,
        method=method,
        options=options,
        progress=progress,
        noise_std=noise_std,
        loss_scale=loss_scale,
    )
    if isinstance(result, GradleakError):
        raise result
    return result


def recover_singles(
    grad_weight: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    families: Sequence[Family] = FAMILIES,
    method: str = "auto",
    options: LabelOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    noise_std: float | None = None,
    loss_scale: float | None = 1.0,
) -> list[LabelResult | GradleakError]:
    """Recover soft label and feature from each of B gradients, on the device that holds them.

    ``grad_weight`` is (B, C, D), ``grad_bias`` (B, C) or None. ``weight`` is (C, D) and ``bias``
    (C,) where the gradients are of one head, (B, C, D) and (B, C) where each has its own. The
    memory used does not grow with B. Each answer is what :func:`recover_single` gives for the
    gradient alone, and what it would raise stands in the answer's place: no gradient spoils
    another's. Gradients of several samples go to ``recover_batch``, one by one.
    """
    count, classes, width = grad_weight.shape
    if options is None:
        options = LabelOptions(families, method, noise_std=noise_std, loss_scale=loss_scale)
    cpu = grad_weight.device.type == "cpu"
    most, values = (_CLASSES, _VALUES) if cpu else (_GPU_CLASSES, _GPU_VALUES)
    step = min(most // classes, values // (classes * width)) or 1
    answers: list[LabelResult | GradleakError] = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        answers += _recover(
            grad_weight[part],
            weight if weight.dim() == 2 else weight[part],
            bias if bias is None or bias.dim() == 1 else bias[part],
            None if grad_bias is None else grad_bias[part],
            options,
            progress,
        )
    return answers


@dataclass(frozen=True)
class _Singles:
    """Gradients of one sample each: their places in the chunk, their factors and problems."""

    members: list[int]
    leading: RankOne
    problem: ScaleProblem
    grad_bias: Tensor | None

    def part(self, keep: Sequence[bool]) -> _Singles:
        """Return those that ``keep`` says."""
        if all(keep):
            return self
        places = [place for place, kept in enumerate(keep) if kept]
        index = torch.tensor(places, dtype=torch.long, device=self.problem.a.device)
        return _Singles(
            [self.members[place] for place in places],
            self.leading.at(index),
            self.problem.part(index),
            None if self.grad_bias is None else self.grad_bias[index],
        )


def _recover(
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    options: LabelOptions,
    progress: Callable[[int, int], None] | None,
) -> list[LabelResult | GradleakError]:
    """Do the work of :func:`recover_singles` for as many gradients as memory allows at once."""
    # Thousands of small operations: without autograd's bookkeeping they cost a fifth less.
    with torch.inference_mode():
        leading = leading_triple(gradient)
        ranks = ranks_of(gradient, leading, noise_std=options.noise_std)
        if 1 in (options.batch_size, options.recorded_size):
            ranks = [as_one_sample(rank, leading, b) for b, rank in enumerate(ranks)]
        sums = column_sums(gradient, leading, ranks)
        found = _without_sample(leading, ranks, sums)
        gamma, given_bias = options.loss_scale or 1.0, grad_bias
        if gamma != 1.0:
            leading = replace(leading, sigma=leading.sigma / gamma)
            grad_bias = None if grad_bias is None else grad_bias.double() / gamma
        every = _Singles(
            list(range(len(ranks))),
            leading,
            scale_problem(leading, weight, bias, noise=_noise(ranks, leading) / gamma),
            grad_bias,
        )
        alone = [rank.rank == 1 == options.samples(1) for rank in ranks]
        singles = every.part([b not in found and one for b, one in enumerate(alone)])
        clean, noisy = _by_method(singles, options)
        table = FamilyTable.of(options.families, gradient.device)
        groups = list(_solve(clean, found, table, options))
        if noisy.members:
            groups.append((noisy.members, _likeliest(noisy, gradient, weight, bias, options)))
    for members, solved in groups:
        mine = [ranks[b] for b in members], [sums[b][0] for b in members]
        found.update(zip(members, results(solved, *mine), strict=True))
    for b, rank in enumerate(ranks):
        if b not in found:
            result = recover_batch(
                gradient[b],
                weight if weight.dim() == 2 else weight[b],
                rank=rank,
                bias=bias if bias is None or bias.dim() == 1 else bias[b],
                grad_bias=None if given_bias is None else given_bias[b],
                options=options,
                progress=progress,
            )
            found[b] = replace(result, column_sums=sums[b][0])
        elif options.recognise and is_doubtful(found[b], noisy=rank.noisy):
            (free,) = _recover(
                gradient[b, None],
                weight if weight.dim() == 2 else weight[b, None],
                bias if bias is None or bias.dim() == 1 else bias[b, None],
                None if given_bias is None else given_bias[b, None],
                replace(options, loss_scale=None, recognise=False),
                progress,
            )
            found[b] = with_recognised_scale(found[b], free, noisy=rank.noisy)
    return [found[b] for b in range(len(ranks))]


def _without_sample(
    leading: RankOne, ranks: Sequence[Rank], sums: Sequence[tuple[float, bool]]
) -> dict[int, LabelResult | GradleakError]:
    """Answer for the gradients, by index, in which there is no sample to look for."""
    found: dict[int, LabelResult | GradleakError] = {}
    finite = leading.finite().tolist()
    for b, (rank, (share, zero)) in enumerate(zip(ranks, sums, strict=True)):
        if not finite[b]:
            found[b] = _not_finite("gradient")
        elif rank.rank == 0 and not rank.noisy:
            reason = "the gradient is exactly zero and determines nothing"
            found[b] = LabelResult("unidentifiable", reason, "none", None, 0, rank=0)
        elif not zero:
            found[b] = not_softmax(share)
        elif rank.rank == 0:
            found[b] = LabelResult(
                "failed",
                "no singular value of the head gradient rises above its noise (std "
                f"{rank.noise:.2g})",
                "none",
                None,
                0,
                rank=0,
                noise=rank.noise,
                column_sums=share,
            )
    return found


def _not_finite(what: str) -> InputError:
    return InputError(f"the head's {what} holds NaN or infinity", "capture the gradient again")


def _noise(ranks: Sequence[Rank], leading: RankOne) -> Tensor:
    """Return (B,) the standard deviation of additive noise on an entry, 0 where there is none."""
    return leading.sigma.new_tensor([rank.noise if rank.noisy else 0.0 for rank in ranks])


def scale_problem(
    leading: RankOne, weight: Tensor, bias: Tensor | None, *, noise: Tensor | float
) -> ScaleProblem:
    """Set up the one-scalar problems of B factorised gradients and their heads.

    ``weight`` is (C, D) or (B, C, D), ``bias`` (C,), (B, C) or None, ``noise`` the std of additive
    noise on one entry. Weights of a lower precision than the gradient's limit what can be compared.
    """
    noise = torch.zeros_like(leading.sigma) + noise
    norms = torch.zeros_like(leading.u)
    if bool((noise > 0.0).any()):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        centred = wide - wide.mean(-2, keepdim=True)
        norms = norms + torch.linalg.vector_norm(centred, dim=-1).double()
    shared = weight.dim() == 2
    return ScaleProblem(
        a=matmul(weight, leading.v.mT).mT if shared else matvec(weight, leading.v),
        b=torch.zeros_like(leading.u) if bias is None else bias.double().expand_as(leading.u),
        u=leading.u,
        sigma=leading.sigma,
        noise=noise,
        unit=leading.unit.clamp(min=precision(weight.dtype)),
        weight_norms=norms,
    )


def _by_method(singles: _Singles, options: LabelOptions) -> tuple[_Singles, _Singles]:
    """Split into the gradients that are solved exactly and those whose likelihood is maximised.

    The latter are the noisy ones, the ratio of whose gradients is biased, and all of them where the
    scale of the loss is unknown, except that heads which are not finite are left to the former.
    """
    finite = torch.isfinite(singles.problem.a + singles.problem.b).all(1)
    likely = finite & ((singles.problem.noise > 0.0) | (options.loss_scale is None))
    return singles.part((~likely).tolist()), singles.part(likely.tolist())


def _likeliest(
    singles: _Singles, gradient: Tensor, weight: Tensor, bias: Tensor | None, options: LabelOptions
) -> Solved:
    """Maximise the likelihood of the ``singles`` among the gradients (B, C, D) of a chunk."""
    index = torch.tensor(singles.members, device=gradient.device)
    own = weight.expand_as(gradient) if weight.dim() == 2 else weight[index]
    seen = Observation.of(
        gradient[index].double() / (options.loss_scale or 1.0),
        own[: len(index)],
        singles.problem.b,
        None if options.method == "scale" else singles.grad_bias,
        singles.problem.noise,
    )
    if options.loss_scale is None:
        exact = (singles.problem.noise == 0.0).tolist()
        return solve_unknown_scale(seen, singles.problem.unit, exact, options.families)
    return solve_under_noise(seen, singles.problem.unit, options.families)


def _solve(
    singles: _Singles,
    found: dict[int, LabelResult | GradleakError],
    table: FamilyTable,
    options: LabelOptions,
) -> Iterator[tuple[list[int], Solved]]:
    """Solve the problems, with the bias gradients where they serve; errors go to ``found``."""

    def usable(group: _Singles, holds: Tensor, error: Callable[[], InputError]) -> _Singles:
        good = holds.tolist()
        found.update({b: error() for b, ok in zip(group.members, good, strict=True) if not ok})
        return group.part(good)

    heads = torch.isfinite(singles.problem.a + singles.problem.b).all(1)
    singles = usable(singles, heads, lambda: _not_finite("weight or bias"))
    has_bias = singles.grad_bias is not None and options.method != "scale"
    closed = [has_bias] * len(singles.members)
    searched = singles.part([not chosen for chosen in closed])
    if searched.members:
        fits = refine(searched.problem, find_candidates(searched.problem, table), table)
        decisions = decide(searched.problem, fits, table)
        yield searched.members, resimulate(searched.problem, searched.leading, decisions, "scale")
    biased = singles.part(closed)
    if biased.grad_bias is not None and biased.members:
        scale, holds = scales_from_bias(biased.leading, biased.grad_bias, biased.problem.noise)
        biased = usable(biased, holds, foreign_bias)
        if biased.members:
            every = torch.arange(len(table.support), device=scale.device)
            given = scale[holds, None].expand(-1, len(every))
            fits = describe(biased.problem, given, every, table, scale_known=True)
            decisions = decide(biased.problem, fits, table, scale_known=True)
            yield biased.members, resimulate(biased.problem, biased.leading, decisions, "bias")
