"""The documents are true: their commands and examples run, their lists and links are complete."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import CAT, run_cli, run_command, run_shell

from gradleak import activations, bundle, errors
from gradleak.models import spec

ROOT = Path(__file__).parents[1]
README, DOCS, PACKAGE = ROOT / "README.md", ROOT / "docs", ROOT / "gradleak"
DOCUMENTS = [
    README,
    *(path for path in sorted(DOCS.glob("*.md")) if path.name != "cli.md"),
    ROOT / "examples" / "README.md",
]
PIPELINE = (
    "gradleak capture --model resnet18 --image cat.png --smooth 0.1",
    "gradleak recover-label grads.safetensors",
    "gradleak capture --model fcn4 --image cat.png --smooth 0.1 --truth truth.safetensors -o - "
    "| gradleak recover-label -o - | gradleak recover-feature -o - "
    "| gradleak reconstruct -o cat-recovered.png",
)
WIDTH = "100"
RUN = ("gradleak ", "python examples/", "cp examples/")
NEEDED = {"federated.md": ("flwr", "opacus")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Transcripts and examples -------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block; ``expected`` is the ``text`` block right behind it, ``code`` its exit code.

    ``sh`` blocks: every line that begins as one of ``RUN`` is run, and ``python`` with a file that
    the document has saved. ``python`` blocks: executed, or saved under the file name that a first
    line ``# name.py`` gives. The blocks of a document run in order, in one folder that holds
    cat.png and examples/, and share one Python namespace. Where the last command ends with an exit
    code other than 0, ``<!-- exit code N -->`` stands above it.
    """

    kind: str
    text: str
    code: int
    expected: str | None


FENCE = re.compile(
    r"(?:^<!-- exit code (?P<code>\d+) -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$"
    r"(?:\n+```text\n(?P<expected>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(document: Path) -> list[Block]:
    found = FENCE.finditer(document.read_text(encoding="utf-8"))
    return [Block(m["kind"], m["text"], int(m["code"] or 0), m["expected"]) for m in found]


def run_block(block: Block, folder: Path, names: dict[str, object]) -> str:
    """Run one block and return what it printed, errors included."""
    if block.kind == "sh":
        lines = [x for x in block.text.splitlines() if is_run(x, folder)]
        codes = [*(0 for _ in lines[1:]), block.code]
        return "".join(run_line(x, n, folder) for x, n in zip(lines, codes, strict=False))
    if block.kind == "python":
        file = re.match(r"# (\w+\.py)\n", block.text)
        if file:
            (folder / file[1]).write_text(block.text)
            return ""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block.text, "<document>", "exec"), names)
        return out.getvalue()
    return ""


def is_run(line: str, folder: Path) -> bool:
    words = line.split()
    saved = len(words) > 1 and words[0] == "python" and (folder / words[1]).exists()
    return saved or line.startswith(RUN)


def run_line(line: str, code: int, folder: Path) -> str:
    if line.startswith("python ") and "|" not in line:
        done = run_command([sys.executable, *shlex.split(line)[1:]], cwd=folder, timeout=600)
    elif "|" in line or not line.startswith("gradleak "):
        done = run_shell(line, folder, timeout=600)
    else:  # no process of its own: importing torch would take longer than most commands
        done = run_cli(*shlex.split(line, comments=True)[1:], cwd=folder)
    assert done.code == code, f"{line}\nexit code {done.code}\n{done.err}"
    return done.err + done.text


def without_numbers(line: str) -> str:
    """Return ``line`` with measured numbers as #, the device as cpu, and single spaces.

    Whole numbers stay, but for times: classes, widths and counts of differing values are facts.
    """
    line = re.sub(r"\bcuda(:\d+)?\b", "cpu", line)
    measured = r"(?<![\w.])[-+]?(\d+\.\d*(e[-+]?\d+)?|\d+e[-+]?\d+|inf|nan|—)(?![A-Za-z])"
    line = re.sub(measured, "#", line)
    line = re.sub(r"\b\d+%", "#", line)
    line = re.sub(r"(± |solved in +|residual +|PSNR |8 bit )[-+]?\d+", r"\1#", line)
    return " ".join(line.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_a_document_shows_happens(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDED.get(document.name, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as for a python that is started there
    (tmp_path / "cat.png").write_bytes(CAT.read_bytes())
    (tmp_path / "examples").symlink_to(CAT.parent)
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for block in blocks_of(document):
            printed = run_block(block, tmp_path, names)
            # The stages of a pipe report as they finish, so the order is not compared; lines may
            # break elsewhere, where a number is longer.
            for line in (block.expected or "").splitlines():
                assert without_numbers(line) in without_numbers(printed), f"{line}\n{printed}"
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


def test_readme_shows_the_pipeline_as_typed() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in PIPELINE if line not in lines] == []


def test_every_command_in_the_documents_stands_where_it_is_run() -> None:
    for document in DOCUMENTS:
        fences = re.split(r"^```\w*$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
        shown = re.findall(r"^(?:\$ )?gradleak .*$", "\n".join(fences[1::2]), re.MULTILINE)
        run = "".join(block.text for block in blocks_of(document) if block.kind == "sh")
        assert set(shown) <= set(run.splitlines()), name_of(document)


def test_readme_sets_up_what_the_makefile_sets_up() -> None:
    installs = re.compile(
        r"pip install(?: --quiet)? (-c constraints\.txt (?:torch|-e \S+))"
        r"(?: && touch .venv/ready)?$",
        re.MULTILINE,
    )
    readme, makefile = README.read_text(), (ROOT / "Makefile").read_text()
    assert len(installs.findall(readme)) == 2
    assert installs.findall(readme) == installs.findall(makefile)
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*DOCUMENTS, DOCS / "cli.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{name_of(document)} -> {target}"


# --- Generated and listed -----------------------------------------------------------------------


def test_the_command_line_page_is_up_to_date() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == generator().render(), "run make docs"


def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def table(document: Path, heading: str) -> list[list[str]]:
    """Return the rows of the first table under ``heading``, backticks removed."""
    _, _, text = f"\n{document.read_text(encoding='utf-8')}".partition(f"\n{heading}\n")
    rows = re.search(r"^\|.*\n\|[ :|-]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows is not None, f"{document} has no table under {heading}"
    lines = rows[1].replace("`", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_bundle_format_lists_what_the_reader_knows() -> None:
    page = DOCS / "bundle-format.md"
    assert {row[0] for row in table(page, "### `model`")} == set(spec.FIELDS)
    record = bundle.StageRecord("capture")
    assert {row[0] for row in table(page, "### `stages`")} == set(vars(record))
    listed = {name for row in table(page, "### Activations") for name in row[0].split(", ")}
    assert {name for name in listed if activations.activation(name) is not None} == listed
    assert {name.partition(":")[0] for name in listed} == {*activations._TABLE, "leaky_relu"}
    assert f"schema {bundle.SCHEMA}" in page.read_text(encoding="utf-8")


def test_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(row[0]) for row in table(DOCS / "cli.md", "# The command line")}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert raised <= listed


# --- The rooms of the house ---------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package under its path within it, e.g. ``labels/bias.py``."""
    return {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def listed_modules() -> Iterator[str]:
    """Read the tree in architecture.md: folders end with a slash, indentation nests."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```text\ngradleak/\n")[2].partition("```")[0]
    folder = ""
    for line in tree.splitlines():
        entry = line.split()[0]
        if entry.endswith("/"):
            folder = entry
        else:
            yield (folder if line.startswith("    ") else "") + entry


def test_the_picture_of_the_tree_is_true() -> None:
    listed = [name for name in listed_modules() if name.endswith(".py")]
    assert len(listed) == len(set(listed))
    # A package's own __init__ is named where it has something to say.
    silent = {name for name in modules() if name.endswith("/__init__.py")}
    assert set(listed) - set(modules()) == set()
    assert set(modules()) - silent - set(listed) == set()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(path: Path, *, at: str = "all") -> set[str]:
    """Return what a file imports: ``all``, at ``run`` time, or at ``start``, on its own import."""
    found: set[str] = set()
    types = at != "all"
    skipped = (ast.FunctionDef, ast.AsyncFunctionDef) if at == "start" else ()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, skipped) or (types and is_type_checking(node)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def module_of(imported: str) -> str | None:
    """Return the module's path for ``gradleak.x.y`` or ``gradleak.x.y.name``; None if foreign."""
    parts = imported.split(".")
    while parts and parts[0] == "gradleak":
        inner = "/".join(parts[1:]) or "__init__"
        for path in (f"{inner}.py", f"{inner}/__init__.py"):
            if path in modules():
                return path
        parts.pop()
    return None


def room_of(module: str) -> str:
    return module.split("/")[0] + "/" if "/" in module else module.removesuffix(".py")


def test_the_arrows_between_the_rooms_are_true() -> None:
    rows = table(DOCS / "architecture.md", "## Who may import whom")
    listed = {
        room: set(cell.split(", ")) - {"—"} for many, cell in rows for room in many.split(", ")
    }
    # The front door names what is behind the other doors, and every room may ask it the version.
    inner = {module: path for module, path in modules().items() if module != "__init__.py"}
    taken: dict[str, set[str]] = {room_of(module): set() for module in inner}
    for module, path in inner.items():
        reached = {room_of(found) for x in imports_of(path) if (found := module_of(x))}
        taken[room_of(module)] |= reached - {room_of(module), "__init__"}
    assert taken == listed


def test_attacks_cannot_reach_the_truth() -> None:
    forbidden = {"truth.py", "metrics.py", "stages/score.py", "stages/capture.py"}
    for stage in ("label", "feature", "reconstruct", "counting"):
        waiting, seen = [f"stages/{stage}.py"], set()
        while waiting:
            module = waiting.pop()
            seen.add(module)
            found = {module_of(x) for x in imports_of(modules()[module], at="run")} - {None}
            waiting += found - seen - set(waiting)
        assert len(seen) > 5
        assert not seen & forbidden, f"{stage} reaches {seen & forbidden}"


def test_nothing_prints_below_the_command_line() -> None:
    for module, path in modules().items():
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        terminal = {x.split(".")[0] for x in imports_of(path)} & {"typer", "rich", "argparse"}
        if room_of(module) != "cli/":
            assert "print" not in calls, module
            assert not terminal, module


def test_the_command_line_imports_no_numerics_when_it_starts() -> None:
    light = {"bundle", "errors", "cli/", "models/", "__init__"}
    for module, path in modules().items():
        if room_of(module) == "cli/":
            names = imports_of(path, at="start")
            assert {room_of(m) for x in names if (m := module_of(x))} <= light, module
    script = "import sys, gradleak.cli.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    heavy = {"torch", "numpy", "scipy", "PIL", "rich.progress", "torchmetrics"}
    assert loaded.returncode == 0
    assert not heavy & set(loaded.stdout.split())
