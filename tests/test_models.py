"""Networks: the same as the public ones, reproducible, described from their own graph."""

import importlib.util
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision_stub import import_torchvision

from gradleak.errors import InputError, UsageError
from gradleak.models import registry
from gradleak.models.build import build_model, describe, load_weights
from gradleak.models.spec import LinearLayer, ModelSpec


def photograph(size: int) -> Tensor:
    """Read a cat as (1, 3, size, size) in [0, 1]."""
    found = importlib.util.find_spec("skimage")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "data" / "chelsea.png"
    pixels = np.asarray(Image.open(path).convert("RGB").resize((size, size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


# The public architectures


@pytest.mark.parametrize(
    ("name", "size"), [("alexnet", 224), ("resnet18", 64), ("resnet34", 65), ("resnet50", 96)]
)
def test_networks_are_torchvisions_own_to_the_last_bit(name: str, size: int) -> None:
    ours = build_model(name, size=size, seed=5)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        theirs = getattr(import_torchvision().models, name)().eval()
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        for module in ours.modules():  # statistics that a fresh network leaves at 0 and 1
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
        theirs.load_state_dict(ours.state_dict())
        image = photograph(size)
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("name", registry.names())
def test_every_network_maps_images_of_its_size_to_its_classes(name: str) -> None:
    entry = registry.entry(name)
    model = build_model(name)
    assert not model.training
    with torch.no_grad():
        logits = model(photograph(entry.size))
    assert logits.shape == (1, entry.classes)
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("resnet18", 1), ("resnet18-cifar", 33), ("fcn4", 5), ("alexnet", 63)),
        *(("lenet", 1), ("lenet", 30), ("lenet", 65)),
    ],
)
def test_networks_take_other_sizes_and_classes(name: str, size: int) -> None:
    with torch.no_grad():
        assert build_model(name, classes=7, size=size)(photograph(size)).shape == (1, 7)


def test_the_cifar_stem_keeps_the_resolution() -> None:
    model = build_model("resnet18-cifar")
    sides = []
    model.layer1.register_forward_hook(lambda _, args, __: sides.append(args[0].shape[-1]))
    model(photograph(32))
    assert sides == [32]
    assert model.state_dict()["conv1.weight"].shape == (64, 3, 3, 3)


# Initialisation and options


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = build_model("lenet", seed=3).state_dict()
    torch.manual_seed(2)
    again = build_model("lenet", seed=3).state_dict()
    other = build_model("lenet", seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_building_and_describing_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state(), random.getstate()
    model = build_model("lenet", seed=3)
    describe(model, photograph(32))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_lenets_paper_initialisation_is_uniform_between_minus_and_plus_a_half() -> None:
    model = build_model("lenet", options={"init": "paper"})
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert values.abs().max() <= 0.5
    assert values.var() == pytest.approx(1 / 12, rel=0.03)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() > 0.3, name


def test_lenet_is_the_networks_of_the_paper() -> None:
    shapes = [tuple(p.shape) for p in build_model("lenet").parameters()]
    conv = (12, 12, 5, 5), (12,)
    assert shapes == [(12, 3, 5, 5), (12,), *conv, *conv, (10, 768), (10,)]


def test_fcn4_has_no_biases_unless_asked() -> None:
    def shapes(**options: object) -> dict[str, tuple[int, ...]]:
        model = build_model("fcn4", size=8, options=options)
        return {k: tuple(p.shape) for k, p in model.named_parameters()}

    weights = {
        "fc1.weight": (4096, 192),
        "fc2.weight": (1024, 4096),
        "fc3.weight": (256, 1024),
        "fc4.weight": (17, 256),
    }
    biases = {"fc1.bias": (4096,), "fc2.bias": (1024,), "fc3.bias": (256,)}
    assert shapes() == shapes(head_bias=False) == weights
    assert shapes(bias=True) == weights | biases | {"fc4.bias": (17,)}
    assert shapes(bias=True, head_bias=False) == weights | biases


@pytest.mark.parametrize(
    ("name", "bias"),
    [("lenet", "fc.bias"), ("resnet18", "fc.bias"), ("alexnet", "classifier.6.bias")],
)
def test_the_heads_bias_can_be_left_out(name: str, bias: str) -> None:
    full = build_model(name).state_dict()
    bare = build_model(name, options={"head_bias": False}).state_dict()
    assert full.keys() - bare.keys() == {bias}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("vgg11", {}, "unknown model 'vgg11'.*fcn4, lenet, alexnet.*module:factory"),
        ("alexnet", {"size": 62}, "62x62.*at least 63"),
        ("lenet", {"size": 0}, "size of 0 pixels"),
        ("lenet", {"classes": 1}, "1 classes"),
        ("lenet", {"options": {"bias": True}}, "lenet takes no option 'bias'; it is one of fcn4"),
        ("resnet18", {"options": {"init": "paper"}}, "no option 'init'; it is one of lenet"),
        ("resnet18", {"options": {"depth": 3}}, "no option 'depth'; leave it out"),
        ("lenet", {"options": {"init": "zeros"}}, "'zeros'; use default or paper"),
        ("lenet", {"options": {"head_bias": "no"}}, "head_bias cannot be 'no'"),
        ("fcn4", {"size": 10**6}, "could not be built"),
    ],
)
def test_what_a_network_cannot_take_is_refused_in_one_line(
    name: str, arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build_model(name, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_options_at_their_default_are_accepted_everywhere() -> None:
    options = {"init": "default", "head_bias": True, "bias": False}
    for name in ("lenet", "resnet18-cifar"):
        plain, asked = build_model(name), build_model(name, options=options)
        assert plain.state_dict().keys() == asked.state_dict().keys()


def test_a_new_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register(registry.ModelEntry("small", "gradleak.models.lenet:lenet", 3, 8))
    assert registry.names()[-1] == "small"
    assert build_model("small")(photograph(8)).shape == (1, 3)


def test_names_are_looked_up_without_importing_torch() -> None:
    code = (
        "import sys, gradleak.models.registry, gradleak.models.spec;"
        "gradleak.models.registry.entry('resnet50');"
        "gradleak.models.spec.ModelSpec.from_json('{}');"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Networks of the user's own

OWN = """
import torch
from torch import nn

torch.rand(1)

def make(classes=4, width=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, classes))

def text():
    return "a network"

def broken():
    raise ValueError("no such file\\nreally")

nothing = None
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = "a_users_own_network"
    Path(f"{name}.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_factory_of_the_current_folder_is_found_and_leaves_no_path_behind(
    own_module: str,
) -> None:
    before, random_state = list(sys.path), torch.get_rng_state()
    first = build_model(f"{own_module}:make", seed=2)
    assert sys.path == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first(photograph(2)).shape == (1, 4)
    assert not first.training
    # The second time the module is imported already, and what it drew then is not drawn again.
    again = build_model(f"{own_module}:make", seed=2)
    assert torch.equal(first.state_dict()["1.weight"], again.state_dict()["1.weight"])
    wide = build_model(f"{own_module}:make", classes=9, options={"width": 6, "bias": False})
    assert wide.state_dict()["3.weight"].shape == (9, 6)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("text", "returned str"),
        ("broken", "ValueError: no such file"),
        ("nothing", "not callable"),
        ("absent", "cannot import.*absent"),
        ("", "cannot import"),
    ],
)
def test_a_factory_that_gives_no_network_is_refused(
    own_module: str, factory: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build_model(f"{own_module}:{factory}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_module:make", ":make", "sys:", ":"])
def test_a_module_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot import"):
        build_model(name)


def test_an_option_the_factory_does_not_take_is_refused(own_module: str) -> None:
    with pytest.raises(UsageError, match="head_bias"):
        build_model(f"{own_module}:make", options={"head_bias": False})


# Describing


@pytest.mark.parametrize(
    ("name", "size", "layers", "from_image"),
    [
        ("fcn4", 8, ["fc1 relu", "fc2 relu", "fc3 relu", "fc4 None"], True),
        ("lenet", 32, ["fc None"], False),
        ("alexnet", 64, ["classifier.1 relu", "classifier.4 relu", "classifier.6 None"], False),
        ("resnet18", 32, ["fc None"], False),
        ("resnet18-cifar", 16, ["fc None"], False),
    ],
)
@pytest.mark.parametrize("head_bias", [True, False])
def test_built_in_networks_describe_themselves(
    name: str, size: int, layers: list[str], from_image: bool, head_bias: bool
) -> None:
    model = build_model(name, size=size, options={"head_bias": head_bias})
    head, found, reads_image = describe(model, photograph(size))
    assert [f"{layer.name} {layer.activation}" for layer in found] == layers
    assert head == found[-1].name
    assert reads_image is from_image


class Functional(nn.Module):
    """Activations as functions, a view in the middle, and log-probabilities at the end."""

    def __init__(self) -> None:
        super().__init__()
        widths = pairwise([48, 20, 16, 12, 10, 9, 8, 5])
        self.steps = nn.ModuleList(nn.Linear(a, b, bias=b % 2 == 0) for a, b in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b, c, d, e, f, g = self.steps
        x = torch.tanh(a(x.reshape(len(x), -1)))
        x = F.leaky_relu(b(x), 0.125).view(-1, 4, 4).flatten(1)
        x = F.gelu(c(x))
        x = F.silu(d(x), inplace=True)
        x = torch.sigmoid(e(x)).contiguous()
        x = f(F.dropout(x, 0.5, self.training)).relu_()
        return {"log_probabilities": F.log_softmax(g(x), 1)}


ACTIVATIONS = ["tanh", "leaky_relu:0.125", "gelu", "silu", "sigmoid", "relu", None]


def test_functional_activations_are_read_off_the_graph() -> None:
    head, layers, from_image = describe(Functional(), photograph(4))
    assert head == "steps.6"
    assert [layer.name for layer in layers] == [f"steps.{i}" for i in range(7)]
    assert [layer.activation for layer in layers] == ACTIVATIONS
    assert from_image


def test_module_activations_and_identities_are_read_off_the_graph() -> None:
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(48, 9), nn.LeakyReLU(inplace=True)),
        *(nn.Linear(9, 8), nn.Identity(), nn.Linear(8, 7), nn.Dropout(), nn.SiLU()),
        *(nn.Linear(7, 6), nn.Softmax(1)),
    )
    _, layers, from_image = describe(model, photograph(4))
    assert [layer.activation for layer in layers] == ["leaky_relu:0.01", "identity", "silu", None]
    assert [layer.name for layer in layers] == ["1", "3", "5", "8"]
    assert from_image


def test_describing_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    model.train()
    model[2].eval()
    model[1].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        describe(model, photograph(4))
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_layers_are_described_all_the_same() -> None:
    model = build_model("fcn4", size=4).requires_grad_(False)
    with torch.no_grad():
        assert len(describe(model, photograph(4))[1]) == 4


class Wired(nn.Module):
    """Three Linear layers, put together in one of several ways."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        self.a, self.b, self.c = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 48)
        self.token = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.eye(48) / 2)

    def forward(self, x: Tensor) -> Tensor:
        image, x = x, x.flatten(1)
        if self.wiring == "skip":
            hidden = F.relu(self.a(x))
            return self.c(F.relu(self.b(hidden)) + hidden)
        if self.wiring == "second path":
            hidden = F.relu(self.b(F.relu(self.a(x))))
            return self.c(F.relu(hidden)) + hidden
        if self.wiring == "shared":
            hidden = F.relu(self.a(x))
            return self.c(self.b(hidden)) + hidden
        if self.wiring == "twice":
            return self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))
        if self.wiring == "unknown":
            return self.c(F.elu(self.b(x)))
        if self.wiring == "approximate":
            return self.c(F.gelu(self.b(x), approximate="tanh"))
        if self.wiring == "two activations":
            return self.c(torch.sigmoid(F.relu(self.b(x))))
        if self.wiring == "tokens":
            return self.c(F.relu(self.token(x.view(-1, 12, 4))).flatten(1))
        if self.wiring == "matrix":
            return self.c(F.relu(x @ self.raw))
        if self.wiring == "channels last":
            return self.c(F.relu(self.b(image.permute(0, 2, 3, 1).flatten(1))))
        if self.wiring == "own normalisation":
            return self.c(F.relu(self.b((image - 0.5).flatten(1))))
        assert self.wiring == "plain"
        return self.c(F.relu(self.b(x)))


@pytest.mark.parametrize(
    ("wiring", "layers", "from_image"),
    [
        ("plain", "bc", True),
        ("skip", "c", False),
        ("second path", "c", False),
        ("shared", "bc", False),
        ("twice", "c", False),
        ("unknown", "c", False),
        ("approximate", "c", False),
        ("two activations", "c", False),
        ("tokens", "c", False),
        ("matrix", "c", False),
        ("channels last", "bc", False),
        ("own normalisation", "bc", False),
    ],
)
def test_the_description_stops_where_peeling_would_go_wrong(
    wiring: str, layers: str, from_image: bool
) -> None:
    head, found, reads_image = describe(Wired(wiring), photograph(4))
    assert head == "c"
    assert [layer.name for layer in found] == list(layers)
    assert reads_image is from_image


def test_a_network_without_a_linear_layer_has_no_head() -> None:
    with pytest.raises(InputError, match="no Linear layer"):
        describe(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), photograph(4))


def test_an_image_the_network_refuses_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match=r"\(3, 9, 9\)") as caught:
        describe(build_model("fcn4", size=8), photograph(9))
    assert "\n" not in str(caught.value)


# Weights


def trained() -> nn.Module:
    return build_model("lenet", seed=11)


@pytest.mark.parametrize("kind", ["plain.pth", "checkpoint.pt", "parallel.pth", "x.safetensors"])
def test_weights_are_loaded_from_every_common_file(tmp_path: Path, kind: str) -> None:
    state = trained().state_dict()
    path = tmp_path / kind
    if kind == "x.safetensors":
        save_file(state, path)
    elif kind == "checkpoint.pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "parallel.pth":
        torch.save(nn.DataParallel(trained()).state_dict(), path)
    else:
        torch.save(state, path)
    model = build_model("lenet")
    load_weights(model, path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_step_counters_may_be_missing(tmp_path: Path) -> None:
    model = build_model("resnet18-cifar", seed=1)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    other = build_model("resnet18-cifar")
    load_weights(other, tmp_path / "old.pth")
    assert torch.equal(other.state_dict()["fc.weight"], old["fc.weight"])


def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = build_model("lenet", classes=5, options={"head_bias": False}).state_dict()
    state |= {f"extra.{i}": torch.ones(1) for i in range(5)}
    torch.save(state, tmp_path / "w.pth")
    model = trained()
    says = (
        r"missing: fc.bias; unexpected: extra.0, extra.1, extra.2 and 2 more; "
        r"of another shape: fc.weight is \(5, 768\) for \(10, 768\)"
    )
    with pytest.raises(InputError, match=says):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in trained().state_dict().items())


class Trap:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"fc.weight": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    torch.save(trained(), tmp_path / "whole.pth")
    for name in ("w.pth", "whole.pth"):
        with pytest.raises(
            InputError, match=r"pickled code, which is not run; save .*torch.save\(model.state_dict"
        ):
            load_weights(trained(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_broken_or_missing_weights_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="there is no file"):
        load_weights(trained(), path)
    state = trained().state_dict()
    if name == "w.pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    for content in (path.read_bytes()[:1000], b"hello, this is text", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read|is cut short or damaged") as caught:
            load_weights(trained(), path)
        assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(trained(), tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"give one of \.safetensors, \.pth, \.pt"):
        load_weights(trained(), tmp_path / "weights.txt")


# The specification


def test_a_specification_survives_its_file() -> None:
    spec = ModelSpec(
        name="fcn4",
        classes=17,
        input_shape=(3, 64, 64),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        head="fc4",
        layers=(LinearLayer("fc3", "relu"), LinearLayer("fc4")),
        from_image=True,
        options={"head_bias": False},
        extra={"note": [1, None]},
    )
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["layers"][1] == {"name": "fc4", "activation": None}
    assert json.loads(spec.to_json())["note"] == [1, None]
    assert ModelSpec.from_json(ModelSpec().to_json()) == ModelSpec()


def test_a_specification_of_others_may_hold_less_and_more() -> None:
    assert ModelSpec.from_json("{}") == ModelSpec()
    spec = ModelSpec.from_json('{"mean": [0, 1, 0], "layers": [{"name": "fc"}], "origin": "lab"}')
    assert spec == ModelSpec(
        mean=(0.0, 1.0, 0.0), layers=(LinearLayer("fc"),), extra={"origin": "lab"}
    )


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "null", "3", "{", "", "[" * 100_000),
        *('{"name": 3}', '{"head": []}', '{"from_image": 1}', '{"options": []}'),
        *('{"classes": "10"}', '{"classes": true}', '{"classes": 0}', '{"classes": 1.5}'),
        *('{"input_shape": [3, 32]}', '{"input_shape": 3}', '{"std": [1, 0, 1]}'),
        *('{"mean": ["a"]}', '{"mean": [NaN]}', '{"mean": [1' + "0" * 400 + "]}"),
        *('{"layers": ["fc"]}', '{"layers": [{"activation": "relu"}]}'),
        '{"layers": [{"name": "fc", "activation": 1}]}',
    ],
)
def test_a_specification_of_the_wrong_type_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="the model's metadata") as caught:
        ModelSpec.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
