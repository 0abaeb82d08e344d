"""Every stage on a GPU gives the answer that it gives on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import photographs
import pytest
import torch
from conftest import CAT, metadata_of, run_cli
from safetensors.torch import load_file
from torch import Tensor

from gradleak import Bundle, capture, reconstruct, recover_feature, recover_label
from gradleak.errors import GradleakError
from gradleak.labels.single import recover_singles
from gradleak.models.build import build_model
from gradleak.reconstruction.options import MatchSettings
from gradleak.softlabels import soft_label
from gradleak.stages.label import LabelOutcome

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than ``tolerance`` of the largest entry."""
    return float((one - other).abs().max()) <= tolerance * float(one.abs().max())


def stages(folder: Path, device: str, *arguments: object) -> dict[str, Tensor]:
    """Run the pipeline on ``device`` and return all tensors of the last bundle."""
    path, where = folder / f"{device}.safetensors", ("--device", device, "-q")
    commands = [
        ("capture", *arguments, "-o", path),
        ("recover-label", path, "-o", path),
        ("recover-feature", path, "-o", path),
        ("reconstruct", path, "-o", path),
    ]
    for command in commands:
        done = run_cli(*command, *where)
        assert (done.code, done.err) == (0, "")
    recorded = {
        stage["device"].partition(":")[0] for stage in json.loads(metadata_of(path)["stages"])
    }
    assert recorded == {device}
    return load_file(path)


def test_the_exact_pipeline_agrees(tmp_path: Path) -> None:
    arguments = ("--model", "fcn4", "--size", 16, "--image", CAT, "--smooth", 0.1, "--label", 3)
    cpu, cuda = (stages(tmp_path, device, *arguments) for device in DEVICES)
    assert cpu.keys() == cuda.keys()
    for name, tensor in cpu.items():
        tolerance = 0.0 if name.startswith(("param/", "buffer/")) else 1e-4
        assert close(tensor, cuda[name], tolerance), name
    pictures = [(t["image/reconstructed"] * 255).round() for t in (cpu, cuda)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("method", ["bias", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_labels_of_one_gradient_agree(method: str, dtype: torch.dtype) -> None:
    model = build_model("lenet")
    image, label = photographs.centre("chelsea", 32), torch.full((1, 10), 0.01)
    label[0, 3] = 0.91
    bundle = capture(model, image, label, device="cpu").bundle
    typed = bundle.extended({n: bundle.tensor(n).to(dtype) for n in bundle})
    found: list[LabelOutcome] = [
        recover_label(typed, method=method, device=device) for device in DEVICES
    ]
    cpu, cuda = (outcome.result for outcome in found)
    assert (cpu.verdict, cpu.family, cpu.method) == (cuda.verdict, cuda.family, cuda.method)
    assert (found[1].device, [s.classes for s in cpu.samples]) == (
        "cuda",
        [s.classes for s in cuda.samples],
    )
    assert cpu.labels is not None
    assert cuda.labels is not None
    uncertainty = max(sample.uncertainty() for sample in cpu.samples)
    assert float((cpu.labels - cuda.labels.cpu()).abs().max()) <= 3 * uncertainty + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_of_many_gradients_agree(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    features = photographs.crops(6, 60, dice).flatten(1).to(dtype)
    weight = 0.3 * torch.randn(100, features.shape[1], generator=dice).to(dtype)
    labels = torch.zeros(60, 100, dtype=dtype)
    labels[torch.arange(60), torch.arange(60)] = 0.7
    labels[torch.arange(60), (torch.arange(60) + 1) % 100] = 0.3
    labels = 0.9 * labels + 0.1 / 100
    delta = torch.softmax(features @ weight.T, 1) - labels
    gradients = delta[:, :, None] * features[:, None]
    gradients[7] = 0.0
    gradients[8, 3, 5] = float("nan")
    gradients[9] += 1.0
    gradients[10] += gradients[11]
    cpu, cuda = (recover_singles(gradients.to(d), weight.to(d)) for d in DEVICES)
    for b, (one, other) in enumerate(zip(cpu, cuda, strict=True)):
        if isinstance(one, GradleakError) or isinstance(other, GradleakError):
            assert (type(one), b in (8, 9)) == (type(other), True)
            continue
        assert (one.verdict, one.family, one.rank) == (other.verdict, other.family, other.rank)
        if one.labels is None or other.labels is None or b in (7, 10):
            continue
        assert one.features is not None
        assert other.features is not None
        assert (other.features.device.type, other.labels.device.type) == ("cuda", "cpu")
        uncertainty = one.samples[0].uncertainty()
        assert float((one.labels - other.labels).abs().max()) <= 3 * uncertainty + 1e-9
        assert close(one.features, other.features.cpu(), 1e-5)


@pytest.mark.parametrize("name", ["lenet", "resnet18-cifar"])
def test_features_of_one_gradient_agree(name: str) -> None:
    model = build_model(name)
    captured = capture(model, photographs.centre("coffee", 32), torch.tensor([4]), device="cpu")
    labelled = recover_label(captured.bundle, device="cpu").bundle
    cpu, cuda = (recover_feature(labelled, device=device) for device in DEVICES)
    assert cpu.verdict == cuda.verdict
    for one, other in zip(cpu.layers, cuda.layers, strict=True):
        assert one.name == other.name
        assert close(one.features, other.features.cpu(), 1e-5)


@pytest.mark.parametrize("withheld", [True, False])
def test_labels_and_features_of_a_batch_agree(withheld: bool) -> None:
    model = build_model("resnet18-cifar", classes=100)
    names = ("chelsea", "coffee", "rocket", "astronaut")
    images = torch.cat([photographs.centre(name, 32) for name in names])
    pairs = ([(3, 1.0)], [(3, 0.7), (8, 0.3)], [(5, 1.0)], [(9, 0.6), (5, 0.4)])
    labels = torch.stack([soft_label(p, 100, 0.1 * (n > 1)) for n, p in enumerate(pairs)])
    bundle = capture(model, images, labels, withhold_bias=withheld, device="cpu").bundle
    found = [recover_label(bundle, device=device) for device in DEVICES]
    cpu, cuda = (outcome.result for outcome in found)
    assert (cpu.verdict, cuda.verdict, found[1].device) == ("unique", "unique", "cuda")
    assert [s.classes for s in cpu.samples] == [s.classes for s in cuda.samples]
    assert cpu.labels is not None
    assert cuda.labels is not None
    assert float((cpu.labels - cuda.labels).abs().max()) <= 1e-5
    layers = [
        recover_feature(outcome.bundle, device=device).layers
        for outcome, device in zip(found, DEVICES, strict=True)
    ]
    assert layers[1][0].features.device.type == "cuda"
    assert close(layers[0][0].features, layers[1][0].features.cpu(), 1e-5)


def test_gradient_matching_comes_as_close() -> None:
    model = build_model("lenet")
    captured = capture(model, photographs.centre("chelsea", 32), torch.tensor([3]), device="cpu")
    labelled = recover_label(captured.bundle, device="cpu").bundle
    settings = MatchSettings(steps=300, time_limit=None)
    for device in DEVICES:
        found = reconstruct(labelled, model=model, settings=settings, device=device)
        assert found.match is not None
        assert torch.device(found.device).type == device
        error = (found.images.cpu() - captured.truth.images).square().mean()
        assert -10 * float(error.log10()) > 25


def test_the_model_stays_where_and_as_it_was() -> None:
    model = build_model("resnet18-cifar").train()
    model.bn1.eval()  # type: ignore[union-attr,operator]
    modes = [module.training for module in model.modules()]
    captured = capture(model, photographs.centre("chelsea", 32), torch.tensor([1]), device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert [module.training for module in model.modules()] == modes
    assert captured.bundle.tensor("grad/fc.weight").device.type == "cpu"


def test_a_training_step_on_the_gpu() -> None:
    model = build_model("lenet").cuda()
    image = photographs.centre("chelsea", 32).cuda()
    torch.nn.functional.cross_entropy(model(image), torch.tensor([3]).cuda()).backward()
    found = recover_label(Bundle.from_gradients(model, example=image)).result
    assert found.verdict == "unique"
    assert found.samples[0].classes[0] == 3


def test_devices_by_number(tmp_path: Path) -> None:
    command = ("capture", "--model", "lenet", "--image", CAT, "-o", tmp_path / "b", "-q")
    count = torch.cuda.device_count()
    assert run_cli(*command, "--device", f"cuda:{count - 1}").code == 0
    missing = run_cli(*command, "--device", f"cuda:{count}")
    assert missing.code == 2
    assert f"device 'cuda:{count}' is not there ({count} CUDA devices found)" in missing.line
