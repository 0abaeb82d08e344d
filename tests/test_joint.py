"""The input of a layer from its gradient and its output together: by factor and by conjugation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

from gradleak.calculus import joint
from gradleak.calculus.conjugate import conjugate_gradients
from gradleak.calculus.joint import solve_jointly, too_many
from gradleak.calculus.solve import LayerEquations, Solution
from gradleak.calculus.weighted import Equations, ForwardEquations, Taps
from gradleak.calculus.window import Window

PRECISION = 1e-9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Layer:
    """A 3×3 convolution of stride 2 over photographs, whose output is known in part.

    ``known`` is the share of it; gradient and output have Gaussian errors, those of the gradient
    relative to its size.
    """

    def __init__(
        self,
        samples: int = 1,
        channels: int = 3,
        outputs: int = 12,
        known: float = 0.9,
        noise: float = PRECISION,
        size: int = 12,
    ) -> None:
        dice = torch.Generator().manual_seed(samples + outputs)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=dice, dtype=torch.float64)

        maps = crops(size, samples * math.ceil(channels / 3), dice).double()
        self.input = maps.reshape(samples, -1, size, size)[:, :channels]
        self.weight, bias = draw(outputs, channels, 3, 3) / 3.0, draw(outputs)
        window = Window.of_convolution((size, size), (3, 3), (2, 2), (1, 1), (1, 1))

        def apply(x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, bias, 2, 1)

        output = apply(self.input)
        std = noise * (10.0 + 20.0 * torch.rand(output.shape, generator=dice).double())
        seen = torch.rand(output.shape, generator=dice) < known
        delta = draw(*output.shape).flatten(2)
        gradient = window.gradient(delta, self.input.flatten(2))
        size_of = gradient.square().mean().sqrt()
        gradient = gradient + noise * size_of * draw(*gradient.shape)
        self.gradient = LayerEquations(window, delta, gradient)
        taps = Taps(window, self.weight.flatten(2))
        self.output = ForwardEquations(apply, output + std * draw(*std.shape), std, seen, taps)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.input.shape)

    def equations(self) -> Equations:
        return Equations([self.gradient], [self.output], self.shape, PRECISION)

    def solve(self) -> Solution:
        return solve_jointly([self.gradient], [self.output], self.shape, PRECISION)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Return the weighted equations M and t, pushed through the layer one by one."""
        offset = self.output.apply(torch.zeros_like(self.input))
        root = self.output.known / self.output.std

        def push(x: Tensor) -> Tensor:
            x = x.view(self.shape)
            out = root * (self.output.apply(x) - offset)
            own = self.gradient.window.gradient(self.gradient.delta, x.flatten(2))
            return torch.cat([out.flatten(), own.flatten() / self._gradient_error()])

        eye = torch.eye(self.input.numel(), dtype=torch.float64)
        columns = torch.stack([push(row) for row in eye], 1)
        target = root * (self.output.output - offset)
        own = self.gradient.gradient / self._gradient_error()
        return columns, torch.cat([target.flatten(), own.flatten()])

    def _gradient_error(self) -> float:
        return PRECISION * float(self.gradient.gradient.square().mean().sqrt())


@pytest.fixture(params=["factor", "conjugate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Solve small cases in either way."""
    if request.param == "conjugate":
        monkeypatch.setattr(joint, "DENSE", 0)
    else:
        monkeypatch.setattr(Equations, "gradient_suffices", False)
    return str(request.param)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("outputs", [12, 24])
def test_a_joint_solution_is_that_of_weighted_least_squares(
    way: str, samples: int, outputs: int
) -> None:
    layer = Layer(samples, outputs=outputs)
    matrix, target = layer.matrix()
    values = torch.linalg.svdvals(matrix / matrix.norm(dim=0))
    inverse = torch.linalg.inv(matrix.mT @ matrix)
    expected = torch.linalg.lstsq(matrix, target[:, None]).solution
    found = layer.solve()
    expected = expected.view_as(found.x)
    spread = inverse.diagonal().sqrt().view_as(found.x)
    assert float(((found.x - expected) / spread).abs().amax()) < 0.1
    assert float((found.std / spread).log().abs().amax()) < math.log(3.0)
    assert float((found.std / spread).square().mean().sqrt()) == pytest.approx(1.0, abs=0.3)
    true = float(values[0] / values[-1])
    assert 0.5 * true < found.condition < 1.1 * true


def test_what_the_equations_say_is_what_the_matrix_says() -> None:
    layer = Layer(2)
    matrix, target = layer.matrix()
    equations = layer.equations()
    normal = matrix.mT @ matrix
    torch.testing.assert_close(equations.matrix(), normal)
    torch.testing.assert_close(equations.diagonal().flatten(), normal.diagonal())
    torch.testing.assert_close(equations.pull(equations.zeros()).flatten(), matrix.mT @ target)
    x = layer.input.flatten(2)[None]
    torch.testing.assert_close(equations.normal(x).flatten(), normal @ x.flatten())
    rest = target - matrix @ x.flatten()
    assert equations.left(x) == pytest.approx(float(rest.square().sum()), rel=1e-6)


def test_traces_are_those_of_the_outputs_part() -> None:
    layer = Layer(2)
    equations = Equations([], [layer.output], layer.shape, PRECISION)
    n, c, p = equations.samples, equations.channels, equations.places
    whole = equations.matrix().view(n, c, p, n, c, p)
    across, along = equations.traces()
    torch.testing.assert_close(across.view(n, p, n, p), torch.einsum("ncpmcq->npmq", whole) / c)
    mean = torch.einsum("ncpndp->cd", whole)
    torch.testing.assert_close(along, mean * c / mean.trace())


def test_a_layer_of_unknown_windows_is_pushed_through_and_not_beyond_a_size() -> None:
    layer = Layer(2)
    whole = layer.equations().matrix()
    given = layer.output
    bare = ForwardEquations(given.apply, given.output, given.std, given.known)
    pushed = Equations([layer.gradient], [bare], layer.shape, PRECISION).matrix()
    torch.testing.assert_close(pushed, whole)
    assert not too_many([bare], (1, 3, 32, 32))
    assert too_many([bare], (1, 3, 64, 64))
    assert not too_many([given], (1, 3, 64, 64))
    assert too_many([given], (2, 3, 64, 64))


def test_a_place_that_no_equation_tells_of_leaves_the_input_undetermined(way: str) -> None:
    layer = Layer(outputs=24)
    blind = layer.output.known.clone()
    blind[:, :, 1:3, 1:3] = False  # the nine places of a window read by these alone
    layer.output = ForwardEquations(
        layer.output.apply, layer.output.output, layer.output.std, blind, layer.output.taps
    )
    layer.gradient.delta.view(1, 24, 6, 6)[:, :, 1:3, 1:3] = 0.0
    assert not layer.solve().determined


def test_fewer_equations_than_unknowns_leave_the_input_undetermined(way: str) -> None:
    layer = Layer(outputs=12, known=0.05)
    rows = layer.output.count() + 12 * 9 * 3
    assert rows < layer.input.numel()
    assert not layer.solve().determined


def test_a_side_of_conjugate_gradients_that_has_no_solution_is_not_done() -> None:
    diagonal = torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    right = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    goal = torch.full((2,), 1e-12, dtype=torch.float64)
    found, done = conjugate_gradients(lambda x: diagonal * x, right, goal, 40)
    assert done.tolist() == [True, False]
    torch.testing.assert_close(found[0], torch.tensor([1.0, 2.0, 0.5, 0.0]).double())


def test_more_unknowns_than_a_matrix_is_made_for_are_solved_for() -> None:
    layer = Layer(channels=24, outputs=32, known=0.5, size=16)
    assert layer.input.numel() > joint.DENSE
    rows = layer.gradient.matrix()
    assert len(rows) > rows.shape[1]
    assert int(torch.linalg.matrix_rank(rows)) < rows.shape[1]  # stride 2 leaves some out
    found = layer.solve()
    off = (found.x - layer.input.flatten(2)) / found.std
    assert found.determined
    assert float(off.square().mean().sqrt()) == pytest.approx(1.0, abs=0.2)
    assert float(off.abs().amax()) < 15.0
