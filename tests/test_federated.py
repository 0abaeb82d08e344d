"""The federated examples: a real server of Flower, a loop of averaging, a step of DP-SGD."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CAT, environment, run_cli, run_command
from test_examples import example

import gradleak
from gradleak.images import load_image, to_uint8
from gradleak.stages.importing import import_gradients

EXAMPLES = CAT.parent


def recovered(folder: Path, *update: object) -> tuple[dict[str, object], torch.Tensor]:
    """Run the shell's pipeline on a folder's checkpoints: the label's report, and the picture."""
    common = ("--before", folder / "before.pt", "--after", folder / "after.pt", "-o", "-", "-q")
    imported = run_cli("import", *common, *update, cwd=EXAMPLES)
    assert (imported.code, imported.err) == (0, "")
    labelled = run_cli("recover-label", "-o", "-", "--json", stdin=imported.out)
    featured = run_cli("recover-feature", "-o", "-", "-q", stdin=labelled.out)
    picture = folder / "out.png"
    run_cli("reconstruct", "-o", picture, "-q", stdin=featured.out, cwd=EXAMPLES)
    return json.loads(labelled.err), load_image(picture, None).pixels


def test_flower_gives_a_client_away(tmp_path: Path) -> None:
    """A server and three clients on loopback: the watched client's label and picture come back."""
    pytest.importorskip("flwr")
    script = EXAMPLES / "flower_update.py"
    done = run_command(
        [sys.executable, str(script), "--folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment(),
        timeout=600,
    )
    assert done.code == 0, done.err
    assert "3 answers are averaged, and client 0's is kept" in done.text
    told, picture = recovered(tmp_path, "--lr", 0.1, "--model", "federated_networks:mlp")
    networks = example("federated_networks")
    images, labels = networks.data_of(0)
    assert told["verdict"] == "unique"
    (sample,) = told["samples"]  # type: ignore[misc]
    assert sample["classes"] == [int(labels)]
    assert sample["weights"] == [1.0]
    assert torch.equal(to_uint8(picture), to_uint8(images[0]))


def test_flower_is_told_no_photograph() -> None:
    """The server's own function knows neither photographs nor labels."""
    source = (EXAMPLES / "flower_update.py").read_text(encoding="utf-8")
    server = source.partition("def run_server")[2].partition("\ndef ")[0]
    assert "data_of" not in server
    assert "images" not in server


@pytest.mark.parametrize(("network", "lr"), [("mlp", 0.1), ("cnn", 0.1)])
def test_a_loop_of_averaging_gives_a_client_away(network: str, lr: float, tmp_path: Path) -> None:
    loop, networks = example("fedavg_loop"), example("federated_networks")
    before, after = loop.run_rounds(network, lr=lr, local_steps=1, photographs=1, rounds=2)
    torch.save(before, tmp_path / "before.pt")
    torch.save(after, tmp_path / "after.pt")
    images, labels = networks.data_of(0)
    model = networks.NETWORKS[network]()
    imported = import_gradients(
        before=tmp_path / "before.pt", after=tmp_path / "after.pt", lr=lr, model=model, size=32
    )
    labelled = gradleak.recover_label(imported.bundle)
    assert labelled.result.samples[0].classes == (int(labels),)
    featured = gradleak.recover_feature(labelled.bundle)
    outcome = gradleak.reconstruct(featured.bundle, model=model)
    assert torch.equal(to_uint8(outcome.images[0]), to_uint8(images[0]))


def test_averaging_is_the_mean_of_the_answers() -> None:
    loop, networks = example("fedavg_loop"), example("federated_networks")
    start, _ = loop.run_rounds("mlp", lr=0.1, local_steps=2, photographs=2, rounds=1)
    second, _ = loop.run_rounds("mlp", lr=0.1, local_steps=2, photographs=2, rounds=2)
    answers = []
    for client in range(networks.CLIENTS):
        model = networks.initial("mlp")
        model.load_state_dict(start)
        answers.append(loop.train(model, *networks.data_of(client, 2), lr=0.1, steps=2))
    for name, averaged in second.items():
        assert torch.allclose(averaged, torch.stack([a[name] for a in answers]).mean(0))


def test_dp_sgd_hides_the_label_only_behind_noise() -> None:
    pytest.importorskip("opacus")
    private = example("dp_sgd")
    clipped = private.attack("mlp", 0.0, 1.0)
    assert clipped.class_right
    assert clipped.differing == 0
    assert clipped.label == "cat 1.000, unique"
    drowned = private.attack("mlp", 1.0, 1.0)
    assert not drowned.class_right
    assert drowned.picture == "none"
    assert 1.0 < drowned.epsilon < 10.0


def test_dp_sgd_captures_what_the_optimiser_steps_with() -> None:
    pytest.importorskip("opacus")
    private = example("dp_sgd")
    bundle, epsilon = private.private_step("mlp", 0.0, 0.5)
    gradients = bundle.tensors("grad/").values()
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-4)
    assert epsilon == float("inf")
    noisy, _ = private.private_step("mlp", 0.1, 0.5)
    gaps = [noisy.tensor(name) - bundle.tensor(name) for name in bundle if "grad/" in name]
    spread = torch.cat([gap.flatten() for gap in gaps]).std()
    assert float(spread) == pytest.approx(0.05, rel=0.02)


def test_last_stops_at_the_first_gap() -> None:
    private = example("dp_sgd")
    rows = [
        private.Attacked(noise, 1.0, "", "", right, 0.0, 1)
        for noise, right in ((0.0, True), (0.1, False), (1.0, True))
    ]
    assert private.last(rows, lambda row: row.class_right) == "up to noise 0"
    assert private.last(rows, lambda row: row.differing == 0) == "at no noise"
