"""The filter that defends a gradient, alone and in a pipe with the attacks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, run_cli

import gradleak
from gradleak.bundle import Bundle
from gradleak.defenses import Clipping, Defense, DpSgd, Noise, Quantisation, TopK, apply_all
from gradleak.errors import InputError, UsageError

GRADIENTS = {
    "a": torch.randn(40, 50, generator=torch.Generator().manual_seed(1)),
    "b": 0.01 * torch.randn(300, generator=torch.Generator().manual_seed(2)),
}


def _applied(*defenses: Defense, seed: int = 0) -> dict[str, torch.Tensor]:
    return apply_all(defenses, GRADIENTS, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_the_deviation_and_the_shape_of_its_law(law: str, relative: bool) -> None:
    changed = _applied(Noise(0.1, law=law, relative=relative))
    for name, gradient in GRADIENTS.items():
        noise = changed[name] - gradient
        std = 0.1 * (float(gradient.square().mean().sqrt()) if relative else 1.0)
        assert float(noise.std()) == pytest.approx(std, rel=0.15)
    noise = (changed["a"] - GRADIENTS["a"]).flatten()
    kurtosis = float((noise / noise.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0 if law == "gaussian" else 6.0, rel=0.25)


def test_clipping_scales_everything_by_one_factor_and_only_down() -> None:
    changed = _applied(Clipping(1.0))
    assert math.hypot(*(float(g.norm()) for g in changed.values())) == pytest.approx(1.0, rel=1e-6)
    factors = [float((changed[n] / g).flatten()[0]) for n, g in GRADIENTS.items()]
    assert factors[0] == pytest.approx(factors[1], rel=1e-5)
    untouched = _applied(Clipping(1e6))
    assert all(torch.equal(untouched[name], g) for name, g in GRADIENTS.items())


def test_dp_sgd_clips_and_then_adds_noise_of_its_share() -> None:
    clipped, private = _applied(Clipping(2.0)), _applied(DpSgd(2.0, 0.5, samples=4))
    noise = torch.cat([(private[n] - clipped[n]).flatten() for n in GRADIENTS])
    assert float(noise.std()) == pytest.approx(0.25, rel=0.1)


def test_top_k_keeps_the_largest_of_each_tensor() -> None:
    changed = _applied(TopK(0.1))
    for name, gradient in GRADIENTS.items():
        kept = changed[name] != 0.0
        assert int(kept.sum()) == round(0.1 * gradient.numel())
        assert torch.equal(changed[name][kept], gradient[kept])
        assert float(gradient[~kept].abs().max()) <= float(gradient[kept].abs().min())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_tensors_have_no_more_values_than_their_bits_allow(bits: int) -> None:
    changed = _applied(Quantisation(bits))
    for name, gradient in GRADIENTS.items():
        assert len(changed[name].unique()) <= 2**bits - 1
        step = float(gradient.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((changed[name] - gradient).abs().max()) <= 0.5001 * step


def test_one_bit_is_the_sign() -> None:
    changed = _applied(Quantisation(1))
    assert torch.equal(changed["a"].sign(), GRADIENTS["a"].sign())
    assert len(changed["a"].abs().unique()) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Noise(0.0),
        lambda: Noise(math.nan),
        lambda: Noise(1.0, law="cauchy"),
        lambda: Clipping(-1.0),
        lambda: DpSgd(1.0, 0.0),
        lambda: DpSgd(math.inf, 1.0),
        lambda: TopK(0.0),
        lambda: TopK(1.5),
        lambda: Quantisation(0),
    ],
)
def test_amounts_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]


def test_a_defence_is_recorded_and_drops_what_was_recovered(lenet: Path) -> None:
    labelled = gradleak.recover_label(Bundle.open(lenet)).bundle
    outcome = gradleak.defend(labelled, [Clipping(1e-3), Noise(1e-6)], seed=3)
    assert outcome.dropped
    assert not any(name.startswith("label/") for name in outcome.bundle)
    assert [entry["name"] for entry in outcome.bundle.defenses] == ["clip", "noise"]
    assert outcome.bundle.stages[-1]["stage"] == "defend"
    assert outcome.norm_after < outcome.norm_before
    again = gradleak.defend(outcome.bundle, [TopK(0.5)])
    assert [entry["name"] for entry in again.bundle.defenses] == ["clip", "noise", "top-k"]


def test_the_same_seed_draws_the_same_noise(lenet: Path) -> None:
    bundle = Bundle.open(lenet)
    one, same, other = (gradleak.defend(bundle, [Noise(0.1)], seed=s).bundle for s in (0, 0, 1))
    name = "grad/" + bundle.names("grad/")[0]
    assert torch.equal(one.tensor(name), same.tensor(name))
    assert not torch.equal(one.tensor(name), other.tensor(name))


def test_strong_noise_ends_the_label_and_weak_noise_does_not(lenet: Path) -> None:
    bundle = Bundle.open(lenet)
    weak = gradleak.recover_label(gradleak.defend(bundle, [Noise(1e-6)]).bundle)
    assert int(weak.bundle.tensor("label/soft").argmax()) == 3
    strong = run_cli("defend", lenet, "--noise", "10", "-o", "-", "-q")
    assert run_cli("recover-label", stdin=strong.out).code != 0


def test_what_half_precision_cannot_hold_is_refused() -> None:
    half = Bundle({"grad/fc.weight": torch.ones(3, 4, dtype=torch.float16)})
    with pytest.raises(InputError, match="does not fit"):
        gradleak.defend(half, [Noise(1e7)])
    with pytest.raises(UsageError, match="no defence was named"):
        gradleak.defend(half, [])


def test_the_command_line_applies_what_its_options_name(lenet: Path, tmp_path: Path) -> None:
    out = tmp_path / "defended.safetensors"
    done = run_cli(
        *("defend", lenet, "--clip", "0.1", "--noise", "1e-3", "--relative"),
        *("--dp-sgd", "0.05", "0.01", "--laplace", "1e-4", "--top-k", "0.5", "--bits", "8"),
        *("-o", out, "--json"),
    )
    report = json.loads(done.out)
    names = [entry["name"] for entry in report["defenses"]]
    assert names == ["clip", "dp-sgd", "noise", "noise", "top-k", "quantise"]
    assert report["norms"][1] < report["norms"][0]
    assert Bundle.open(out).defenses == report["defenses"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no defence was named"),
        (("--relative",), "--relative is about"),
        (("--noise", "-1"), "noise is -1"),
        (("--top-k", "2"), "top-k is 2"),
    ],
)
def test_usage_errors_are_one_line(lenet: Path, arguments: tuple[str, ...], said: str) -> None:
    assert_refused(run_cli("defend", lenet, *arguments), 2, said)


def test_a_pipe_goes_through_the_filter(lenet: Path) -> None:
    defended = run_cli("defend", "--noise", "1e-7", "-o", "-", "-q", stdin=lenet.read_bytes())
    assert defended.code == 0
    label = run_cli("recover-label", "--json", stdin=defended.out)
    assert json.loads(label.out)["samples"][0]["classes"]
