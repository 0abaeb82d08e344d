"""recover-label --plot shows the search as it was: the curves, every root, and the label."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Capture, assert_refused, run_cli
from photographs import photograph
from PIL import Image
from safetensors.torch import load_file

from gradleak import Bundle, UsageError, plots, recover_label
from gradleak.bundle import GRAD
from gradleak.labels.curves import Curves
from gradleak.labels.verdict import LabelResult
from gradleak.plots import label_figure
from gradleak.stages.label import label_curves

SMOOTH = ("--smooth", "0.1", "--label", "3", "--withhold-bias")


@pytest.fixture(scope="module")
def lenet_smooth(capture: Capture) -> Path:
    return capture(*SMOOTH, model="lenet", size=32)


def curves_of(path: Path) -> tuple[Curves, LabelResult]:
    bundle = Bundle.open(path)
    outcome = recover_label(bundle, device="cpu")
    return label_curves(outcome), outcome.result


def axes_of(curves: Curves, result: LabelResult) -> list[Any]:
    """Return the axes: ρ and loss of the negative scales, of the positive ones, and the label."""
    figure = label_figure(curves, result, "lenet")
    axes = figure.get_axes()
    assert len(axes) == 5
    return [axes[0], axes[2], axes[1], axes[3], axes[4]]


def marks(panel: Any) -> list[tuple[float, float]]:
    """Return the places of the round marks of a panel."""
    lines = [line for line in panel.get_lines() if line.get_marker() == "o"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


def test_the_curves_are_the_residuals_at_each_scale(lenet_smooth: Path) -> None:
    curves, _ = curves_of(lenet_smooth)
    tensors = load_file(lenet_smooth)
    gradient, weight = tensors[GRAD + "fc.weight"].double(), tensors["param/fc.weight"].double()
    bias = tensors["param/fc.bias"].double()
    _, _, right = torch.linalg.svd(gradient)
    v = right[0] * right[0].sum().sign()
    delta = gradient @ v
    for index in torch.linspace(0, len(curves.scales) - 1, 40).long().tolist():
        s = curves.scales[index]
        p = torch.softmax(s * (weight @ v) + bias, 0)
        y = p - delta / s
        rest = y < y.max()
        rho = y[rest].var() / (delta[rest] / s).var()
        (smooth,) = (c for c in curves.residuals if c.family == "smooth")
        assert float(smooth.values[index]) == pytest.approx(float(rho), rel=1e-4, abs=1e-12)
        loss = float(curves.losses[0].values[index])
        assert loss == pytest.approx(1000.0 * float(y[rest].var()), rel=1e-4, abs=1e-9)
        assert bool(curves.valid[index]) == bool(y.min() >= -1e-6)


def test_the_answer_is_marked_where_the_residual_vanishes(lenet_smooth: Path) -> None:
    curves, result = curves_of(lenet_smooth)
    (sample,) = result.samples
    negative, negative_loss, positive, positive_loss, label = axes_of(curves, result)
    assert sample.scale > 0
    assert marks(negative) == marks(negative_loss) == []
    ((scale, depth),) = marks(positive)
    assert scale == pytest.approx(sample.scale)
    assert depth < 1e-9
    ((scale, depth),) = marks(positive_loss)
    assert scale == pytest.approx(sample.scale)
    assert depth < curves.tolerance
    # Nowhere else do the curves come near that depth.
    far = (curves.scales / sample.scale - 1.0).abs() > 0.1
    assert all(float(c.values[far].min()) > 1e-4 for c in curves.residuals)
    assert result.labels is not None
    bars = [patch.get_width() for patch in label.patches]
    assert bars == pytest.approx(result.labels[0].tolist())


def test_every_alternative_is_marked_too(lenet_smooth: Path) -> None:
    curves, result = curves_of(lenet_smooth)
    (sample,) = result.samples
    other = replace(sample, family="mixup", classes=(1, 2), weights=(0.6, 0.4), base=0.0)
    other = replace(other, scale=-2.0 * sample.scale, weight_errors=(0.0, 0.0))
    bundle = Bundle.open(lenet_smooth)
    outcome = recover_label(bundle, device="cpu")
    ambiguous = replace(outcome.result, verdict="ambiguous", alternatives=(other,))
    curves = label_curves(replace(outcome, result=ambiguous))
    negative, _, positive, _, label = axes_of(curves, ambiguous)
    assert [scale for scale, _ in marks(negative)] == pytest.approx([2.0 * sample.scale])
    assert [scale for scale, _ in marks(positive)] == pytest.approx([sample.scale])
    assert {c.family for c in curves.residuals} >= {"hard", "smooth", "mixup"}
    (rings,) = (line for line in label.get_lines() if line.get_marker() == "o")
    assert list(rings.get_xdata())[1:3] == [0.6, 0.4]


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_picture_is_written_in_the_kind_it_is_named(
    suffix: str, start: bytes, lenet_smooth: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"loss.{suffix}"
    done = run_cli("recover-label", lenet_smooth, "--plot", path, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.object["plot"] == str(path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_same_gradient_gives_the_same_picture(lenet_smooth: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in pictures:
        assert run_cli("recover-label", lenet_smooth, "--plot", path, "-q").code == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with Image.open(pictures[0]) as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 100


def test_a_noisy_gradient_and_one_of_no_family_are_drawn(
    lenet_smooth: Path, save: Any, tmp_path: Path
) -> None:
    tensors = load_file(lenet_smooth)
    dice = torch.Generator().manual_seed(0)
    gradient = tensors[GRAD + "fc.weight"]
    noisy = {
        **tensors,
        GRAD + "fc.weight": gradient + 1e-3 * torch.randn(gradient.shape, generator=dice),
    }
    path = save(noisy, name="noisy.safetensors")
    done = run_cli("recover-label", path, "--plot", tmp_path / "noisy.png", "--json")
    assert done.object["noise"] == pytest.approx(1e-3, rel=0.1)
    assert (tmp_path / "noisy.png").stat().st_size > 10_000
    foreign = {**tensors, "param/fc.weight": tensors["param/fc.weight"].flip(0).contiguous()}
    path = save(foreign, name="foreign $x$ 猫.safetensors")
    done = run_cli("recover-label", path, "--plot", tmp_path / "foreign.png", "--json")
    assert (done.code, done.err) == (4, "")
    assert done.object["verdict"] in ("failed", "unidentifiable")
    assert (tmp_path / "foreign.png").stat().st_size > 10_000


def test_the_papers_answer_is_drawn(lenet_smooth: Path, tmp_path: Path) -> None:
    told = ("--method", "paper", "--family", "smooth")
    done = run_cli("recover-label", lenet_smooth, *told, "--plot", tmp_path / "p.png", "-q")
    assert done.code == 0
    assert (tmp_path / "p.png").exists()


def test_what_has_no_one_scale_is_not_drawn(
    capture: Capture, lenet_smooth: Path, save: Any, tmp_path: Path
) -> None:
    path = tmp_path / "loss.png"
    images = (x for name in ("chelsea", "coffee") for x in ("--image", photograph(name)))
    two = capture(*images, "--label", "1", "--label", "3", model="lenet", size=32)
    assert_refused(run_cli("recover-label", two, "--plot", path), 2, "rank 2; leave --plot out")
    tensors = load_file(lenet_smooth)
    zero = {n: torch.zeros_like(t) if n.startswith(GRAD) else t for n, t in tensors.items()}
    done = run_cli("recover-label", save(zero), "--plot", path)
    assert_refused(done, 2, "rank 0; leave --plot out")
    assert not path.exists()


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(
    lenet_smooth: Path, tmp_path: Path
) -> None:
    given = ("recover-label", lenet_smooth, "--plot")
    assert_refused(run_cli(*given, tmp_path / "loss.jpg"), 2, "name it .png, .pdf, .svg")
    assert_refused(run_cli(*given, "-"), 2, "standard output")
    assert_refused(run_cli(*given, tmp_path / "none" / "loss.png"), 2, "does not exist")
    both = run_cli(*given, tmp_path / "loss.png", "-o", tmp_path / "loss.png")
    assert_refused(both, 2, "would replace")
    many = run_cli("recover-label", lenet_smooth, lenet_smooth, "--plot", tmp_path / "loss.png")
    assert_refused(many, 2, "--plot takes one input")
    own = tmp_path / "grads.png"
    own.write_bytes(lenet_smooth.read_bytes())
    assert_refused(run_cli("recover-label", own, "--plot", own), 2, "would replace")
    assert own.read_bytes() == lenet_smooth.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["grads.png"]


def test_without_matplotlib_the_extra_is_named(
    lenet_smooth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    done = run_cli("recover-label", lenet_smooth, "--plot", tmp_path / "loss.png")
    assert_refused(done, 2, "matplotlib")
    assert "pip install 'gradleak[plot]'" in done.line
    with pytest.raises(UsageError):
        plots.check_plot("loss.png")


def test_drawing_leaves_no_figure_behind_and_no_setting_changed(
    lenet_smooth: Path, tmp_path: Path
) -> None:
    script = f"""
import matplotlib
before = dict(matplotlib.rcParams)
from gradleak import Bundle, recover_label
from gradleak.plots import save_label_plot
from gradleak.stages.label import label_curves
bundle = Bundle.open({str(lenet_smooth)!r})
outcome = recover_label(bundle, device="cpu")
save_label_plot({str(tmp_path / "x.png")!r}, label_curves(outcome), outcome.result, "x")
assert dict(matplotlib.rcParams) == before
from matplotlib import pyplot
assert pyplot.get_fignums() == []
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
