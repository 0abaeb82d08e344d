"""Counting before solving: the groups of places, and verdicts that are those of a real walk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from calculus_cases import Case
from conftest import assert_refused, run_cli
from photographs import crops
from safetensors.torch import save_file
from torch import nn

from gradleak.bundle import Bundle
from gradleak.calculus.counting import TapGroup, count_layers, tap_groups
from gradleak.calculus.window import Window
from gradleak.errors import UsageError
from gradleak.models.build import build_model
from gradleak.stages.capture import capture
from gradleak.stages.counting import LeakCount, count_leak
from gradleak.stages.simulation import smooth_pictures


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Window:
    pairs = [(n, n) for n in (size, kernel, stride, padding, dilation)]
    return Window.of_convolution(*pairs)


# --- Groups of places ---------------------------------------------------------------------------


def test_a_3x3_convolution_of_stride_2_reads_the_even_places_with_one_tap() -> None:
    # With padding 1 the middle tap reads the even rows and the outer ones the odd rows.
    groups = tap_groups([(windows(8, 3, 2, 1), 10)], samples=2)
    assert groups[0] == TapGroup(taps=1, places=16, equations=10, unknowns=32)
    assert sorted(group.taps for group in groups) == [1, 2, 2, 4]
    assert {group.places for group in groups} == {16}


def test_a_shortcut_of_stride_2_adds_its_one_tap_to_the_even_places() -> None:
    groups = tap_groups([(windows(8, 3, 2, 1), 10), (windows(8, 1, 2, 0), 7)], samples=1)
    assert groups[0] == TapGroup(taps=2, places=16, equations=17, unknowns=16)
    assert sorted(group.taps for group in groups) == [2, 2, 2, 4]


@pytest.mark.parametrize(
    ("layer", "taps"),
    [
        (windows(9, 3, 1, 1), [9]),
        (windows(9, 5, 2, 2), [4, 6, 6, 9]),
        (windows(9, 3, 1, 2, 2), [9]),
        (windows(12, 2, 2, 0), [1, 1, 1, 1]),
        (windows(9, 1, 2, 0), [0, 1]),
        (windows(1, 3, 1, 1), [1]),
        (Window.of_linear(), [1]),
    ],
)
def test_groups_hold_all_places_and_all_taps_that_read_any(layer: Window, taps: list[int]) -> None:
    groups = tap_groups([(layer, 6)], samples=3)
    assert sorted(group.taps for group in groups) == taps
    assert sum(group.places for group in groups) == layer.places
    assert all(group.equations == 6 * group.taps for group in groups)
    assert all(group.unknowns == 3 * group.places for group in groups)


@pytest.mark.parametrize("layer", [windows(7, 3, 2, 1), windows(8, 5, 3, 1), windows(6, 3, 1, 1)])
def test_groups_are_the_blocks_of_the_equations(layer: Window) -> None:
    groups = tap_groups([(layer, 4)], samples=1)
    dice = torch.Generator().manual_seed(0)
    delta = torch.randn(1, 4, layer.index.shape[1], generator=dice, dtype=torch.float64)
    matrix = layer.matrix(delta)
    bound = sum(min(group.equations, group.unknowns) for group in groups)
    assert int(torch.linalg.matrix_rank(matrix)) <= bound < min(matrix.shape) or len(groups) == 1
    joined = ((matrix != 0.0).double().mT @ (matrix != 0.0).double()) != 0.0
    for _ in range(6):
        joined = (joined.double() @ joined.double()) != 0.0
    sizes = sorted(int(row.sum()) for row in torch.unique(joined, dim=0) if row.any())
    assert sizes == sorted(group.places for group in groups if group.taps)


# --- Verdicts -----------------------------------------------------------------------------------


def own() -> nn.Module:
    """Two strided convolutions under ReLUs, whose lower one has too few outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    ).eval()  # fmt: skip


def wide() -> nn.Module:
    """Two convolutions under leaky ReLUs, of more outputs than the places of a picture."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(40, 40, 3, 2, 1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(40 * 16, 10),
    ).eval()  # fmt: skip


NETWORKS = {
    "fcn4": (lambda: build_model("fcn4", classes=10, size=8), 8),
    "lenet": (lambda: build_model("lenet", classes=10, size=32), 32),
    "own": (own, 16),
    "wide": (wide, 8),
}


def verdicts(counted: LeakCount) -> dict[str, str]:
    return {layer.name: layer.verdict for layer in counted.layers}


@pytest.mark.parametrize(
    ("name", "samples"),
    [("fcn4", 1), ("lenet", 1), ("lenet", 2), ("own", 1), ("own", 2), ("own", 3), ("wide", 1)],
)
def test_verdicts_are_those_of_a_walk_from_photographs(name: str, samples: int) -> None:
    make, size = NETWORKS[name]
    counted = count_leak(model=make(), size=size, samples=samples)
    case = Case(make(), size, samples)
    walk = case.walk()
    real = {layer.name: layer.verdict for layer in count_layers(walk)}
    assert verdicts(counted) == real
    truth = case.truth()
    for layer in counted.layers[1:]:
        found = [m for m in walk.maps if layer.name in m.names]
        assert (layer.verdict != "out of reach") == bool(found)
        for m in found:
            true = truth[layer.name]
            assert float((m.estimate.value - true).norm() / true.norm()) < 1e-2
    assert (counted.image == "exact") == (walk.image is not None)
    ends = [barrier.partition(":")[0] for barrier in counted.barriers]
    assert ends == [barrier.name for barrier in walk.barriers]


def test_a_row_has_the_reason_of_the_walk() -> None:
    counted = count_leak(model=own(), size=16)
    head, upper, lower = counted.layers
    assert (head.equations, head.unknowns, head.verdict) == (10, 1, "exact")
    assert upper.tightest == TapGroup(taps=1, places=16, equations=32, unknowns=16)
    assert upper.verdict == "exact"
    assert upper.condition is not None
    assert upper.condition > 1.0
    assert lower.tightest == TapGroup(taps=1, places=64, equations=8, unknowns=64)
    assert lower.verdict == "out of reach"
    assert counted.barriers == (f"image: {lower.reason}",)
    assert lower.reason.startswith("72 equations for 256 unknowns a channel and ")
    assert counted.maps == 2


def test_more_samples_than_classes_are_out_of_reach() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 5))
    counted = count_leak(model=model, size=8, samples=5)
    assert set(verdicts(counted).values()) == {"out of reach"}
    assert counted.layers[0].reason == "5 classes for 5 samples"
    assert (counted.image, counted.maps) == ("out of reach", 0)


def test_a_layer_that_nobody_knows_ends_the_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 50), nn.Softplus(), nn.Linear(50, 30), nn.ReLU(),
        nn.Linear(30, 10),
    )  # fmt: skip
    counted = count_leak(model=model, size=8)
    assert verdicts(counted) == {"5": "exact", "3": "exact", "1": "out of reach"}
    assert counted.layers[2].reason.startswith("the walk ended at softplus")
    assert counted.image == "open"


def test_of_a_convolution_in_groups_no_equations_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(8, 16, 3, 1, 1, groups=4), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    upper = count_leak(model=model, size=8).layers[1]
    assert (upper.name, upper.groups, upper.tightest, upper.equations) == ("2", 0, None, 0)
    assert upper.verdict == "exact with its output"


def test_the_network_of_the_caller_stays_as_it_was() -> None:
    model = own().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    count_leak(model=model, size=16)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert next(model.parameters()).dtype == torch.float32


def test_pictures_are_smooth_and_in_range() -> None:
    pictures = smooth_pictures(2, (3, 32, 24), torch.Generator().manual_seed(0))
    assert pictures.shape == (2, 3, 32, 24)
    assert 0.0 <= float(pictures.min()) < float(pictures.max()) <= 1.0
    steps = pictures.diff(dim=-1).abs().mean()
    assert float(steps) < 0.3 * float(pictures.std())


def test_a_network_needs_a_name_and_a_size() -> None:
    with pytest.raises(UsageError, match="neither a bundle nor a network"):
        count_leak()
    with pytest.raises(UsageError, match="cannot import 'own:net'"):
        count_leak(model="own:net")
    with pytest.raises(UsageError, match=r"input size of torch\.nn:Identity is not known"):
        count_leak(model="torch.nn:Identity")


# --- Bundles and the command line ---------------------------------------------------------------


def test_a_bundle_gives_its_network_weights_and_batch_size(lenet: Path, tmp_path: Path) -> None:
    found = run_cli("reconstruct", lenet, "--dry-run", "--batch-size", 3, "--json").object
    assert (found["input"], found["model"], found["weights"]) == (str(lenet), "lenet", "given")
    assert (found["verdict"], found["batch_size"]) == ("out of reach", 3)
    assert (found["layers"][0]["name"], found["precision"]) == ("fc", "float32")
    bundle = Bundle.open(lenet)
    tensors = {n: bundle.tensor(n).half() for n in bundle if n.startswith("grad/")}
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare, {**bundle.metadata, "batch_size": "4"})
    coarse = run_cli("reconstruct", bare, "--dry-run", "--json").object
    assert (coarse["weights"], coarse["precision"]) == ("random", "float16")
    assert coarse["batch_size"] == 4


@pytest.mark.parametrize("withheld", ["5.weight", "2.weight"])
def test_gradients_that_are_not_shared_are_not_counted(withheld: str) -> None:
    images = crops(16, 1, torch.Generator().manual_seed(0))
    bundle = capture(own(), images, torch.tensor([3])).bundle
    assert verdicts(count_leak(bundle, model=own()))["2"] == "exact"
    tensors = {n: bundle.tensor(n) for n in bundle if n != f"grad/{withheld}"}
    counted = count_leak(Bundle(tensors, bundle.metadata), model=own())
    row = next(layer for layer in counted.layers if f"{layer.name}.weight" == withheld)
    assert (row.verdict, row.reason) == ("out of reach", "its gradient is not there")


def test_the_table_of_a_model_without_a_bundle() -> None:
    done = run_cli("reconstruct", "--dry-run", "--model", "lenet", "--batch-size", "4")
    assert (done.code, done.err) == (0, "")
    lines = done.text.splitlines()
    assert lines[0] == "lenet"
    assert lines[1].split(maxsplit=2)[2].startswith("4 images of 3×32×32, random weights")
    assert "synthetic pictures" in lines[2]
    (row,) = (line.split(maxsplit=4) for line in lines if line.startswith("features.2 "))
    assert row[1:4] == ["12×16×16", "300:1024", "48:256"]
    assert "out of reach: sigmoid" in row[4]
    assert any(line.startswith("image ") and "out of reach" in line for line in lines)
    assert run_cli("reconstruct", "--dry-run", "--model", "lenet", "-q").out == b""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--dry-run", "--model", "fcn4", "-o", "x.png"), "--dry-run writes no file; leave"),
        (("--batch-size", 3), "--classes, --size and --batch-size go with --dry-run; add"),
        (("BUNDLE", "--dry-run", "--size", 8), "are for --dry-run without a bundle"),
        (("--dry-run", "--model", "nothing"), "unknown model 'nothing'; use one of"),
        (("--dry-run", "--model", "alexnet", "--size", 9), "alexnet cannot take 9x9 images; use"),
    ],
)
def test_a_dry_run_called_wrongly(options: tuple[object, ...], text: str, fcn: Path) -> None:
    given = [fcn if option == "BUNDLE" else option for option in options]
    assert_refused(run_cli("reconstruct", *given), 2, text)
