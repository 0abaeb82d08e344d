"""Networks of torchvision, timm and transformers by name, random weights, nothing downloaded."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, run_cli, run_command
from photographs import crops, photograph
from torchvision_stub import REFERENCE, SITECUSTOMIZE, import_torchvision

import gradleak
from gradleak.errors import UsageError
from gradleak.models.build import build_model
from gradleak.models.providers import expected_of

# Small ones of each kind: convolutions, a transformer, a ConvNeXt, SiLUs and squeezing.
NETWORKS = {
    "torchvision:resnet18": {},
    "torchvision:vit_b_16": {"image_size": 32},
    "timm:vit_tiny_patch16_224": {"img_size": 32},
    "timm:convnext_atto": {},
    "timm:efficientnet_b0": {},
    "transformers:ViTForImageClassification": {
        "image_size": 32,
        "num_hidden_layers": 2,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    monkeypatch.syspath_prepend(REFERENCE)


def needs(name: str) -> None:
    try:
        importlib.import_module(name.partition(":")[0])
    except ImportError:
        pytest.skip(f"{name.partition(':')[0]} is installed by make test")


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_labels_and_head_features_come_back_exactly(name: str, samples: int) -> None:
    needs(name)
    model = build_model(name, classes=40, options=NETWORKS[name], seed=1)
    with torch.no_grad():  # torchvision starts a ViT's head at zero; this is one that has learnt
        head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        torch.nn.init.trunc_normal_(head.weight, std=0.02)
    pixels = 32 if "ViT" in name or "vit" in name else 96
    images = crops(pixels, samples, torch.Generator().manual_seed(samples))
    labels = 7 * torch.arange(samples) + 2
    captured = gradleak.capture(model, images, labels, head_only=True)
    labelled = gradleak.recover_label(captured.bundle)
    assert labelled.result.verdict == "unique"
    assert sorted(sample.classes[0] for sample in labelled.result.samples) == labels.tolist()
    found = gradleak.recover_feature(labelled.bundle).layers[0].features.double()
    true = captured.truth.features[str(captured.bundle.model.head)].double()
    nearest = torch.cdist(true, found).amin(1)
    assert (nearest / true.norm(dim=1)).max() < 1e-5


def test_size_and_normalisation_are_the_librarys() -> None:
    model = build_model("torchvision:vit_b_16", options={"image_size": 64})
    expected = expected_of(model)
    assert expected is not None
    assert (expected.size, expected.mean[0]) == (64, 0.485)


def test_a_transformers_picture_comes_back_through_the_command_line(tmp_path: Path) -> None:
    """In a process of its own, as users run it; the bundle's word suffices for a library's name."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = environment(PYTHONPATH=f"{tmp_path}:{REFERENCE}")
    needs("timm")
    picture = tmp_path / "out.png"
    script = (
        "gradleak capture --model timm:vit_tiny_patch16_224 --model-arg img_size=32 --label 5 "
        "--size 32 "
        f"--image {photograph('chelsea')} -o - -q | gradleak recover-label -o - -q "
        f"| gradleak recover-feature -o - -q | gradleak reconstruct -o {picture}"
    )
    done = run_command(["bash", "-c", f"set -o pipefail; {script}"], env=env, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "method     embedding" in done.text
    score = run_cli("score", picture, "--against", photograph("chelsea"))
    assert "8-bit values   0 of 3072 differ" in score.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'; use one of resnet18"),
        ("timm:convnext_tiniest", "timm has no network"),
        ("transformers:ViTModel", "transformers has no image classifier 'ViTModel'"),
    ],
)
def test_an_unknown_network_is_refused_with_near_names(name: str, reason: str) -> None:
    needs(name)
    with pytest.raises(UsageError, match=reason):
        build_model(name)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm cannot be imported .*pip install timm"):
        build_model("timm:resnet18")
