"""The bundle: what is written is read, nothing is lost on the way, and no file is half-written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import metadata_of, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak import Bundle, InputError
from gradleak.bundle import FORMAT, StageRecord
from gradleak.errors import IncompleteError
from gradleak.files import atomic_path

DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip
Save = Callable[..., Path]


def raw_tensors(path: Path) -> dict[str, bytes]:
    """Return every tensor's dtype, shape and data, each as it lies in the file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: f"{x['dtype']}{x['shape']}".encode()
        + raw[start + x["data_offsets"][0] : start + x["data_offsets"][1]]
        for name, x in header.items()
    }


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    metadata=st.dictionaries(st.text(min_size=1).filter(lambda k: k != "model"), st.text()),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(
    shapes: list[list[int]], dtypes: list[torch.dtype], metadata: dict[str, str]
) -> None:
    metadata = {k: v for k, v in metadata.items() if k not in ("format", "schema")}
    tensors = {
        f"other/{n}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    tensors["grad/w"] = torch.ones(2, 2)
    stream = io.BytesIO()
    Bundle(tensors, metadata).write(stream)
    stream.seek(0)
    again = Bundle.read(stream)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        found = again.tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert again.metadata == metadata | {"format": FORMAT, "schema": "1"}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"grad/fc.weight": torch.ones(3, 5), "grad/fc.bias": torch.ones(3).double()}
    Bundle(tensors).save(tmp_path / "b")
    found = load_file(tmp_path / "b")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "b", "pt") as file:
        assert file.metadata() == {"format": FORMAT, "schema": "1"}


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    odd = {f"other/{n}": torch.ones(3, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    Bundle({**odd, "grad/w": torch.ones(1, 1)}).save(tmp_path / "b")
    raw = (tmp_path / "b").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    for name, entry in header.items():
        size = odd[name].element_size() if name in odd else 4
        assert (start + entry["data_offsets"][0]) % size == 0


def test_unknown_tensors_and_metadata_pass_through_every_stage(fcn: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    foreign = {
        "notes/votes": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
        "notes/nan": torch.tensor([float("nan"), float("inf")]),
        "notes/empty": torch.zeros(0, 7),
        "buffer/extra": torch.tensor(5),
    }
    known = metadata_of(fcn)
    strange = {"colour": "blue ✓\n\x00", "defenses": '["noise"]', "model2": "{not json"}
    known["model"] = json.dumps({**json.loads(known["model"]), "trained_by": ["us", 3]})
    save_file({**load_file(fcn), **foreign}, path, {**known, **strange})
    before = raw_tensors(path)
    for command in ("recover-label", "recover-feature", "reconstruct"):
        assert run_cli(command, path, "-o", path, "-q").code == 0
    after = raw_tensors(path)
    assert {name: after[name] for name in before} == before
    assert {"label/soft", "feature/fc1", "image/reconstructed"} <= set(after) - set(before)
    metadata = metadata_of(path)
    assert {key: metadata[key] for key in strange} == strange
    assert json.loads(metadata["model"])["trained_by"] == ["us", 3]
    names = [stage["stage"] for stage in json.loads(metadata["stages"])]
    assert names == ["capture", "recover-label", "recover-feature", "reconstruct"]


def test_a_bundle_may_be_saved_onto_the_file_that_it_is_read_from(
    lenet: Path, tmp_path: Path
) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(lenet.read_bytes())
    before = raw_tensors(path)
    bundle = Bundle.open(path)
    for n in range(3):  # each time every offset in the file moves
        bundle = bundle.extended({f"note/{n}": torch.full((n + 5,), n, dtype=torch.float64)})
        bundle.save(path)
    assert {name: raw_tensors(path)[name] for name in before} == before
    assert torch.equal(Bundle.open(path).tensor("grad/fc.bias"), bundle.tensor("grad/fc.bias"))


def test_a_bundle_outlives_its_file(lenet: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(lenet.read_bytes())
    bundle = Bundle.open(path)
    path.unlink()
    assert torch.equal(bundle.tensor("grad/fc.weight"), load_file(lenet)["grad/fc.weight"])


def test_two_outputs_of_which_one_is_the_input(featured: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(featured.read_bytes())
    assert run_cli("reconstruct", one, "-o", one, "-o", other, "-q").code == 0
    assert one.read_bytes() == other.read_bytes()
    assert set(raw_tensors(featured).items()) < set(raw_tensors(one).items())


def test_a_named_pipe_is_an_input_and_an_output(lenet: Path, tmp_path: Path) -> None:
    # Not /dev/null: a test that fails as root must not replace that.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    writer = threading.Thread(target=lambda: pipe.write_bytes(lenet.read_bytes()), daemon=True)
    writer.start()
    bundle = Bundle.open(pipe)
    writer.join(10)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    bundle.save(pipe)
    reader.join(10)
    assert pipe.is_fifo()
    (tmp_path / "file").write_bytes(received[0])
    assert raw_tensors(tmp_path / "file") == raw_tensors(lenet)


# --- Files are whole or not there ---------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


HALF = """
import sys, time
from gradleak.bundle import Bundle
class Slow(Bundle):
    def write(self, out):
        out.write(b"half"); out.flush(); print("half", flush=True); time.sleep(60)
bundle = Slow.open(sys.argv[1])
bundle.save(sys.argv[1])
"""


def test_a_killed_write_leaves_the_old_file_intact(lenet: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(lenet.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        assert any(x.read_bytes() == b"half" for x in tmp_path.iterdir())
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert path.read_bytes() == lenet.read_bytes()
    assert run_cli("recover-label", path, "-q").code == 0


def test_a_replaced_file_keeps_its_permissions_and_links(tmp_path: Path) -> None:
    secret, link = tmp_path / "secret", tmp_path / "link"
    secret.write_bytes(b"old")
    secret.chmod(0o600)
    link.symlink_to(secret)
    Bundle({"grad/w": torch.ones(1, 1)}).save(link)
    assert link.is_symlink()
    assert secret.stat().st_mode & 0o777 == 0o600
    assert "grad/w" in Bundle.open(secret)


def test_a_new_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    Bundle({"grad/w": torch.ones(1, 1)}).save(tmp_path / "b")
    (tmp_path / "plain").touch()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("b" * 255)
    Bundle({"grad/w": torch.ones(1, 1)}).save(path)
    assert path.is_file()


# --- What a bundle refuses ----------------------------------------------------------------------


def bundle_with(layers: list[dict[str, object]], **tensors: Tensor) -> Bundle:
    model = json.dumps({"layers": layers})
    return Bundle({f"grad/{n}": t for n, t in tensors.items()}, {"model": model})


def test_layers_of_the_metadata_must_fit_the_tensors() -> None:
    a, b = {"name": "a", "activation": "relu"}, {"name": "b"}
    fits = {"a.weight": torch.ones(4, 9), "b.weight": torch.ones(3, 4), "a.bias": torch.ones(4)}
    bundle_with([a, b], **fits)
    bundle_with([a, {"name": "unknown"}, b], **{**fits, "b.weight": torch.ones(3, 7)})
    with pytest.raises(InputError, match=r"b\.weight has shape \[3, 5\].*\(…, 4\)"):
        bundle_with([a, b], **{**fits, "b.weight": torch.ones(3, 5)})
    with pytest.raises(InputError, match=r"a\.weight has shape \[4, 9\].*\(…, 3\)"):
        bundle_with([b, a], **fits)
    with pytest.raises(InputError, match=r"a\.weight has shape \[4, 9, 1\].*\(out, in\)"):
        bundle_with([a, b], **{**fits, "a.weight": torch.ones(4, 9, 1)})
    with pytest.raises(InputError, match=r"a\.bias has shape \[3\] for a layer of 4 outputs"):
        bundle_with([a, b], **{**fits, "a.bias": torch.ones(3)})
    with pytest.raises(InputError, match="from_image, and no layers"):
        Bundle({"grad/w": torch.ones(2, 2)}, {"model": '{"from_image": true}'})


@pytest.mark.parametrize(
    ("name", "shape"), [("label/soft", (5,)), ("feature/fc", (5,)), ("image/reconstructed", (8, 8))]
)
def test_recovered_tensors_have_their_dimensions(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"{name} has shape"):
        Bundle({"grad/w": torch.ones(2, 2), name: torch.ones(shape)})


def test_what_is_missing_or_not_finite_is_named() -> None:
    bundle = Bundle({"grad/a": torch.tensor([1.0, float("nan")]), "grad/b": torch.ones(2) / 0})
    with pytest.raises(IncompleteError, match="holds no param/a"):
        bundle.tensor("param/a")
    with pytest.raises(InputError, match="grad/a holds NaN"):
        bundle.tensor("grad/a")
    with pytest.raises(InputError, match="grad/b holds infinity"):
        bundle.tensors("grad/b")


def test_extending_a_bundle_leaves_it_as_it_was() -> None:
    bundle = Bundle({"grad/w": torch.ones(2, 2)}, {"stages": '[{"stage": "mine", "new": 1}]'})
    longer = bundle.extended({"label/soft": torch.ones(1, 2)}, record=StageRecord("next", seed=3))
    assert list(bundle) == ["grad/w"]
    assert bundle.stages == [{"stage": "mine", "new": 1}]
    assert longer.stages[0] == {"stage": "mine", "new": 1}
    assert longer.stages[1]["seed"] == 3
    assert longer.stages[1]["stage"] == "next"
