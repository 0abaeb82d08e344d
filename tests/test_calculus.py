"""The calculus of layers: what passes them, what their gradients say, and where a walk ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from calculus_cases import Case
from photographs import crops
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.calculus.gates import Gate, GatedLayer, read_gate, read_sign
from gradleak.calculus.layer import layer_of
from gradleak.calculus.logits import rounded_delta
from gradleak.calculus.pooled import pooled_gate
from gradleak.calculus.settle import settle
from gradleak.calculus.solve import LayerEquations, solve_input
from gradleak.calculus.trace import trace
from gradleak.calculus.walk import walk_down
from gradleak.calculus.window import Window
from gradleak.models.build import build_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, written with functions, operators and in-place calls."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.one = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.short = nn.Conv2d(24, 32, 1, stride=2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(32 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = F.relu_(self.norm(self.one(x)))
        y = self.two(y)
        y += self.short(x)
        y = self.drop(nn.functional.relu(y))
        logits: Tensor = self.fc(y.reshape(len(y), -1))
        return logits


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# --- The trace ----------------------------------------------------------------------------------


def test_a_trace_names_what_is_computed_and_not_who_computes_it() -> None:
    model = Residual()
    steps = trace(model, torch.zeros(2, 3, 16, 16))
    kinds = [operation.kind for operation in steps.operations]
    assert kinds == [
        *("conv2d", "relu", "conv2d", "batch_norm", "relu", "conv2d", "conv2d", "add"),
        *("relu", "dropout", "view", "linear"),
    ]
    names = [operation.name for operation in steps.operations if operation.kind == "conv2d"]
    assert names == ["stem", "one", "two", "short"]
    assert model.training
    assert steps.shapes[steps.logits] == (2, 10)


@pytest.mark.parametrize("name", ["fcn4", "lenet", "resnet18", "resnet50", "alexnet"])
def test_a_trace_runs_again_to_the_same_logits(name: str) -> None:
    size = 64 if name != "lenet" else 32
    model = build_model(name, classes=10, size=size).eval()
    images = crops(size, 2, torch.Generator().manual_seed(0))
    steps = trace(model, torch.zeros_like(images))
    values = {0: images}
    for operation in steps.operations:
        inputs = [values[number] for number in operation.inputs]
        values[operation.output] = operation.run(inputs, model.state_dict())
    torch.testing.assert_close(values[steps.logits], model(images))


# --- Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (5, 2, 2, 1),
        (1, 2, 0, 1),
        (3, 1, 2, 2),
        (7, 2, 3, 1),
        (2, 3, 0, 1),
    ],
)
def test_a_window_gives_the_gradient_of_the_weight(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    images = crops(14, 2, torch.Generator().manual_seed(0)).double()[..., :11]
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=False).double()
    output = layer(images)
    delta = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, layer.weight, delta)
    sizes = [(size, size) for size in (kernel, stride, padding, dilation)]
    window = Window.of_convolution((14, 11), *sizes)
    found = window.gradient(delta.flatten(2), images.flatten(2))
    torch.testing.assert_close(found.view_as(gradient), gradient)
    rows = window.matrix(delta.flatten(2)) @ images.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(rows.view(4, -1, 3).mT.reshape_as(gradient), gradient)


# --- Walks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_residual_network_of_ones_own_gives_its_maps(samples: int) -> None:
    torch.manual_seed(0)
    case = Case(Residual(), 16, samples)
    walk = case.walk()
    names = case.check(walk, 1e-4)
    assert names[:3] == ["two", "one", "short"]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, lambda: nn.LeakyReLU(0.1)])
def test_an_mlp_gives_its_images(activation: Callable[[], nn.Module], samples: int) -> None:
    torch.manual_seed(0)
    model = plain(
        nn.Flatten(), nn.Linear(768, 200), activation(), nn.Linear(200, 60, bias=False),
        activation(), nn.Linear(60, 10),
    )  # fmt: skip
    case = Case(model, 16, samples)
    walk = case.walk()
    assert not walk.barriers
    assert walk.image is not None
    assert float((walk.image - case.images).abs().max()) < 1e-3


def test_a_network_that_is_sure_of_a_hard_label_gives_its_maps() -> None:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.fc.bias[0] += 11.0  # of p − 1 float32 keeps three digits or four
    case = Case(model, 16)
    walk = case.walk()
    assert walk.maps
    assert max(found.residual for found in walk.maps) < 1e-5
    assert case.check(walk, 1e-3)[:3] == ["two", "one", "short"]


def test_the_delta_of_a_head_is_computed_where_its_gradient_is_noisier() -> None:
    dice = torch.Generator().manual_seed(0)
    feature = torch.rand((2, 40), generator=dice, dtype=torch.float64)
    exact = torch.softmax(torch.randn((2, 10), generator=dice, dtype=torch.float64), 1) - 0.1
    rounded = exact.float().double() * (1.0 + 1e-4)  # as a client's arithmetic might have it
    for noise, expected in ((0.0, rounded), (1e-3, exact)):
        gradient = rounded.mT @ feature
        gradient = gradient + noise * torch.randn(gradient.shape, generator=dice).double()
        found = rounded_delta(exact, feature, gradient.float())
        assert float((found - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, lambda: nn.LeakyReLU(0.1)])
def test_an_invertible_convolutional_network_gives_its_image(
    activation: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(1)
    model = plain(
        nn.Conv2d(3, 12, 5, 2, 2), activation(), nn.Conv2d(12, 12, 5, 2, 2), activation(),
        nn.Conv2d(12, 12, 5, 1, 2), activation(), nn.Flatten(), nn.Linear(12 * 16, 10),
    )  # fmt: skip
    case = Case(model, 16)
    walk = case.walk()
    assert walk.image is not None, walk.barriers
    assert float((walk.image - case.images).abs().max()) < 1e-3


def test_a_resnet_with_a_pooling_stem_gives_every_map_and_the_image() -> None:
    case = Case(build_model("resnet18", classes=20, size=32), 32)
    walk = case.walk()
    names = case.check(walk, 1e-3)
    assert len(names) == 20
    assert names[-2:] == ["layer1.0.conv1", "conv1"]
    assert not walk.barriers


def test_the_mask_under_global_pooling_is_found() -> None:
    case = Case(build_model("resnet18-cifar", classes=20, size=32), 32)
    walk = case.walk()
    names = case.check(walk, 1e-3)
    assert names[0] == "layer4.1.conv2"
    # Of what layer2 reads stride 2 leaves some to its output: 65536 unknowns solved for together.
    assert names[-2:] == ["layer2.0.conv1", "layer2.0.downsample.0"]
    assert walk.barriers[0].why == "576 equations for 1024 unknowns a channel"


def test_two_samples_under_global_pooling_are_a_barrier() -> None:
    case = Case(build_model("resnet18-cifar", classes=20, size=32), 32, 2)
    walk = case.walk()
    assert not walk.maps
    assert walk.barriers[0].name.startswith("relu")


def test_a_layer_that_nobody_knows_stops_the_walk_and_is_named() -> None:
    torch.manual_seed(0)
    model = plain(
        nn.Flatten(), nn.Linear(768, 200), nn.Softplus(), nn.Linear(200, 60), nn.ReLU(),
        nn.Linear(60, 10),
    )  # fmt: skip
    case = Case(model, 16, 2)
    walk = case.walk()
    assert case.check(walk, 1e-4) == ["3"]
    assert str(walk.barriers[0]).endswith("no layer of the kind softplus is known")
    assert walk.image is None
    assert layer_of("softplus") is None


def test_float64_gradients_give_float64_maps() -> None:
    case = Case(build_model("resnet18", classes=20, size=32), 32, 1, torch.float64)
    case.check(case.walk(), 1e-11)


# --- Gates --------------------------------------------------------------------------------------


def gated(
    noise: float, seed: int, closed: float = 0.0, outputs: int = 40
) -> tuple[Tensor, Tensor, Tensor, GatedLayer, Tensor]:
    """Return a rectifier's noisy output with its errors, its mask, and the layer below it."""
    dice = torch.Generator().manual_seed(seed)
    window = Window.of_convolution((6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    below = crops(6, 16, dice).double().reshape(2, 24, 36)
    before = torch.randn(2, outputs, 36, generator=dice, dtype=torch.float64)
    mask, coefficient = before > 0, torch.randn(before.shape, generator=dice, dtype=torch.float64)
    slope = torch.where(mask, 1.0, closed).double()
    gradient = window.gradient(coefficient * slope, below)
    gradient = gradient + 1e-8 * torch.randn(gradient.shape, generator=dice, dtype=torch.float64)
    value = before * slope + noise * torch.randn(before.shape, generator=dice).double()
    layer = GatedLayer(window, coefficient, gradient, closed)
    return value, torch.full_like(value, noise), mask, layer, below


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-3])
def test_a_gate_is_settled_by_the_gradient_below_it(noise: float) -> None:
    for seed in range(3):
        value, std, mask, layer, below = gated(noise, seed)
        settled = settle(read_gate(value, std), layer, [], 1e-9)
        assert bool((settled.mask == mask).all())
        assert float((settled.solution.x - below).abs().max()) < 1e-5


@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_a_leaky_gate_is_settled_by_the_gradient_below_it(noise: float) -> None:
    for seed in range(3):
        value, std, mask, layer, below = gated(noise, seed, closed=0.1)
        read = read_sign(value, std)
        assert not bool((read.mask == mask).all())
        settled = settle(read, layer, [], 1e-9)
        assert bool((settled.mask == mask).all())
        assert float((settled.solution.x - below).abs().max()) < 1e-5


def test_the_odds_of_a_gate_are_right() -> None:
    dice = torch.Generator().manual_seed(0)
    before = torch.randn(1, 200, 400, generator=dice, dtype=torch.float64)
    std = torch.full_like(before, 0.02)
    noisy = before.clamp(min=0.0) + std * torch.randn(before.shape, generator=dice).double()
    odds = read_gate(noisy, std).odds
    for low, high in ((-3.0, -1.0), (-1.0, 1.0), (1.0, 3.0)):
        here = (odds > low) & (odds < high)
        share = float((before[here] > 0.0).double().mean())
        assert abs(share - float(torch.sigmoid(odds[here]).mean())) < 0.1


def test_units_that_come_out_as_zero_are_closed() -> None:
    dice = torch.Generator().manual_seed(0)
    before = torch.randn(1, 200, 4, generator=dice, dtype=torch.float64)
    gate = read_gate(before.clamp(min=0.0), torch.full_like(before, 1e-9))
    assert torch.equal(gate.mask, before > 0.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gate_is_settled_under_a_noisy_gradient(seed: int) -> None:
    value, std, mask, layer, _ = gated(0.01, seed)
    size = layer.gradient.square().mean().sqrt()
    dice = torch.Generator().manual_seed(1)
    noise = torch.randn(layer.gradient.shape, generator=dice, dtype=torch.float64)
    layer = replace(layer, gradient=layer.gradient + 1e-3 * size * noise)
    read = read_gate(value, std)
    wrong = int((read.mask != mask).sum())
    settled = settle(read, layer, [], 1e-7)
    assert wrong > 30
    assert int((settled.mask != mask).sum()) < wrong / 8
    assert settled.solution.residual < 1e-3


def test_a_mistaken_unit_is_found_by_the_residual() -> None:
    value, std, mask, layer, _ = gated(1e-6, 0)
    odds = read_gate(value, std).odds.clamp(-20.0, 20.0)
    for unit in ((0, 3, 7), (1, 20, 30), (0, 3, 20)):
        odds[unit] = -odds[unit]
    settled = settle(Gate(odds), layer, [], 1e-9)
    assert bool((settled.mask == mask).all())
    assert settled.changed == 3


@pytest.mark.parametrize("seed", range(6))
def test_a_mistaken_unit_is_found_where_few_equations_are_to_spare(seed: int) -> None:
    value, std, mask, layer, _ = gated(1e-6, seed, outputs=10)  # 90 for 72 unknowns
    odds = read_gate(value, std).odds.clamp(-12.0, 12.0)
    odds[1, 4, 17] = -0.3 * odds[1, 4, 17]
    settled = settle(Gate(odds), layer, [], 1e-9)
    assert bool((settled.mask == mask).all())


def test_a_pooled_gate_needs_a_3x3_convolution() -> None:
    _, _, _, layer, _ = gated(1e-6, 0)
    assert pooled_gate(layer) is None


# --- Networks that need care --------------------------------------------------------------------


def gradient_network(middle: Callable[[Tensor], Tensor] | nn.Module) -> nn.Module:
    """Return a small network with ``middle`` between two convolutions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 24, 3, padding=1)
            self.two = nn.Conv2d(24, 24, 3, padding=1)
            self.middle = middle if isinstance(middle, nn.Module) else None
            self.fc = nn.Linear(24 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            x = middle(x) if self.middle is None else self.middle(x)
            logits: Tensor = self.fc(torch.tanh(self.two(x)).flatten(1))
            return logits

    torch.manual_seed(0)
    return Net()


def test_overlapping_means_are_not_taken_for_the_map() -> None:
    case = Case(gradient_network(lambda x: F.avg_pool2d(torch.tanh(x), 3, 1, 1)), 8)
    walk = case.walk()
    case.check(walk, 1e-3)
    assert walk.image is None or float((walk.image - case.images).abs().max()) < 1e-2


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: (torch.tanh(x) - 0.3) / 0.25,
        lambda x: 0.7 - 2.0 * torch.tanh(x),
        lambda x: -torch.tanh(x),
        lambda x: torch.tanh(x) + torch.ones(24, 1, 1),
    ],
)
def test_arithmetic_with_constants_is_undone(middle: Callable[[Tensor], Tensor]) -> None:
    case = Case(gradient_network(middle), 8)
    walk = case.walk()
    assert walk.image is not None, walk.barriers
    assert float((walk.image - case.images).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("middle", "named"),
    [
        (lambda x: torch.cat(torch.tanh(x).chunk(2, 1)[::-1], 1), "cat"),
        (lambda x: torch.tanh(x) * x, "mul"),
        (lambda x: torch.tanh(x).max(1, keepdim=True)[0] + torch.tanh(x), "max"),
    ],
)
def test_what_is_not_known_stops_the_walk_and_nothing_false_passes(
    middle: Callable[[Tensor], Tensor], named: str
) -> None:
    case = Case(gradient_network(middle), 8)
    walk = case.walk()
    assert walk.image is None
    assert any(named in str(barrier) for barrier in walk.barriers)
    assert case.check(walk, 1e-3) == ["two"]


def test_an_assignment_is_part_of_the_trace() -> None:
    def middle(x: Tensor) -> Tensor:
        y = torch.tanh(x) + 0.0
        y[:, :4] = 0.0
        return y

    case = Case(gradient_network(middle), 8)
    assert any("assigned" in str(barrier) for barrier in case.walk().barriers)


def test_weights_used_twice_are_no_equations_of_one_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 12, 3, padding=1)
            self.two = nn.Conv2d(12, 12, 3, padding=1)
            self.fc = nn.Linear(12 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.one(x))
            for _ in range(2):
                x = torch.tanh(self.two(x))
            logits: Tensor = self.fc(x.flatten(1))
            return logits

    torch.manual_seed(0)
    case = Case(Twice(), 8)
    walk = case.walk()
    # The sum of both uses' gradients is no equation of either; outputs alone tell, twice inverted.
    assert case.check(walk, 2e-2)[:2] == ["two@2", "two"]


def test_a_wide_batch_through_a_narrow_layer_is_solved_with_its_output() -> None:
    torch.manual_seed(0)
    model = plain(
        nn.Flatten(), nn.Linear(192, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(),
        nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 100),
    )  # fmt: skip
    case = Case(model, 8, 32)
    case.check(case.walk(), 1e-2)


def test_weights_that_the_network_computes_are_run_in_any_precision() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 3, 3, 3))
            self.fc = nn.Linear(24 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight / self.weight.norm()
            logits: Tensor = self.fc(torch.tanh(F.conv2d(x, weight, padding=1)).flatten(1))
            return logits

    torch.manual_seed(0)
    Case(Normed(), 8).walk()
    Case(Normed(), 8, dtype=torch.float64).walk()


def test_a_rectifier_below_an_activation_that_needs_its_value_is_a_barrier() -> None:
    torch.manual_seed(0)
    model = plain(
        nn.Conv2d(3, 12, 3, 2, 1), nn.Tanh(), nn.ReLU(), nn.Conv2d(12, 20, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 10),
    )  # fmt: skip
    case = Case(model, 16)
    walk = case.walk()
    assert "3" in case.check(walk, 1e-4)
    assert walk.image is None
    assert walk.barriers


def test_places_that_no_window_reads_do_not_hide_the_others() -> None:
    torch.manual_seed(0)
    model = plain(
        nn.Conv2d(3, 300, 4, 4), nn.Sigmoid(), nn.Flatten(), nn.Linear(4800, 10)
    )  # fmt: skip
    images = torch.rand(1, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    labels = F.one_hot(torch.tensor([3]), 10).double()
    loss = F.cross_entropy(model(images), labels.float())
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, model.parameters()), strict=True))
    feature = model[:3](images).detach()
    walk = walk_down(model, torch.zeros_like(images), gradients, labels, feature)
    found = walk.recovered(0)
    assert found is not None
    assert found.known is not None
    assert bool(found.known[..., :16, :16].all())
    assert not bool(found.known[..., 16:, :].any())
    assert float((found.value - images)[..., :16, :16].abs().max()) < 1e-4
    assert bool(found.std[..., 16:].isinf().all())


def test_a_layer_whose_units_are_all_closed_determines_nothing() -> None:
    """No equation is left where noise closes every unit; that is an answer, and no crash."""
    closed = LayerEquations(Window.of_linear(), torch.zeros(1, 6, 1), torch.ones(6, 4, 1))
    assert not solve_input([closed], 1e-7).determined
