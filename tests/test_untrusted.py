"""What strangers send is data: no code of theirs runs, no name of theirs leads out, and each refusal says so."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from command import Command, hubmill
from converter.errors import SourceError
from converter.folder import check_path
from converter.hub import resolve
from converter.pooling import declared_pooling
from converter.source import open_folder
from converter.tokenizer import tokenizer
from hub_server import HubServer, hub_server
from jobs.survey import survey
from small_run import ROOT, TARGETS, write_manifest, write_model

__all__ = ["hub_server", "hubmill"]  # fixtures

CODE = sorted(path for part in ("converter", "jobs", "kernels") for path in (ROOT / part).rglob("*.py"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Code


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.mark, "it ran")


def calls(tree: ast.AST) -> set[str]:
    """What is called in a program, by the names that stand there."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_of_ours_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
    assert not calls(tree) & {"eval", "exec", "compile", "__import__", "torch.load", "yaml.unsafe_load"}
    assert not calls(tree) & {"os.system", "os.popen", "importlib.import_module"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all"):
            assert path.name == "architecture.py", "whose YAML is the package's own"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, ast.unparse(node)


def test_pickles_and_code_beside_the_weights_are_carried_and_never_run(
    model: Path, tmp_path: Path, hubmill: Command
) -> None:
    mark = tmp_path / "mark"
    for name in ("training_args.bin", "optimizer.pt", "extra.pkl"):
        (model / name).write_bytes(pickle.dumps(Runs(mark)))
    for name in ("modeling_x", "tokenization_x", "configuration_x"):
        (model / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').write('it ran')\nclass X: pass\n")
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    edit(model / "config.json", auto_map=auto)
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
        tokenizer_class="X",
    )
    edit(model / "config.json", custom_pipelines={"x": {"impl": "modeling_x.X"}})
    (model / ".git" / "hooks").mkdir(parents=True)
    (model / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\n")
    (model / ".env").write_text("SECRET=hunter2")
    manifest = write_manifest(tmp_path, {"int8": TARGETS["int8"], "q8-0": TARGETS["q8-0"]})
    arguments = ("convert", manifest, "--out", tmp_path / "out", "--executor", "inprocess", "--device", "cpu")
    answer = hubmill(*arguments)
    assert answer.code == 0, answer.errors
    assert (tmp_path / "out" / "small" / "model" / "int8" / "modeling_x.py").is_file(), (
        "as data, for those who trust it"
    )
    assert hubmill("verify", tmp_path / "out" / "small").code == 0
    assert not mark.exists()
    made = (tmp_path / "out" / "small" / "model").rglob("*")
    assert not [path for path in made if path.name.startswith(".")], "what is hidden stays behind"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth"])
def test_pickled_weights_alone_are_refused_unread(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(SourceError, match=r"weights are pickled .*Convert it once, in a sandbox"):
        open_folder(folder, "test")
    assert survey(f"folder:{folder}", tmp_path)["problems"]
    assert not mark.exists()


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/x", "a/../../x", "..", ".", "", "a//b", "./a", "a/", "\\x", "..\\x", "a\\..\\x", "C:x", "c:/x"),
        *("a\0b", "a\nb", "a\x1b[31mb", "\ud800", "//server/share", "a/./b"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match="could lead out"):
        check_path(name, "test")


def outside(tmp_path: Path) -> Path:
    """A tokenizer somewhere else on the machine, which holds a secret."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "vocab.json").write_text(json.dumps({"hunter2": 0, "a": 1}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "tokenizer.5.0.0.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    "settings",
    [
        lambda place: {"vocab": f"{place}/vocab.json", "merges": f"{place}/merges.txt"},
        lambda place: {"merges": f"{place}/merges.txt"},
        lambda place: {"fast_tokenizer_files": [f"{place}/tokenizer.5.0.0.json"]},
        lambda place: {"fast_tokenizer_files": ["../elsewhere/tokenizer.5.0.0.json"]},
    ],
)
def test_a_tokenizer_that_names_files_elsewhere_is_refused(
    settings: Callable[[Path], Mapping[str, object]], model: Path, tmp_path: Path
) -> None:
    place = outside(tmp_path)
    edit(model / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", **settings(place))
    with pytest.raises(SourceError, match=r"wants the file .* to be read.*Do not use this model"):
        tokenizer(model, "test")


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "name_or_path"])
def test_paths_that_transformers_passes_over_are_passed_over(key: str, model: Path, tmp_path: Path) -> None:
    place = outside(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(place / name, model / name)
    (model / "vocab.json").write_text('{"b": 0, "a": 1}')
    (model / "tokenizer.json").unlink()
    edit(model / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", **{key: f"{place}/vocab.json"})
    assert tokenizer(model, "test").encode("hunter2") != [0]


NAMES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a file with a line in its name": (lambda folder: (folder / "a\nb.txt").write_text("x"), "could lead out"),
    "a file of another system's path": (lambda folder: (folder / "a\\..\\x.txt").write_text("x"), "could lead out"),
    "a link to a file outside": (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "outside"),
    "a link to a link outside": (
        lambda folder: ((folder / "one").symlink_to("two"), (folder / "two").symlink_to("../secret")),
        "outside",
    ),
    "a link to a folder outside": (lambda folder: (folder / "sub").symlink_to(".."), "outside"),
    "a tokenizer outside": (
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").symlink_to("../secret")),
        "outside",
    ),
    "a link round about": (lambda folder: (folder / "loop").symlink_to("loop"), "link"),
}


@pytest.mark.parametrize("way", NAMES)
def test_a_folder_whose_names_lead_elsewhere_is_refused_when_it_is_opened(
    way: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("{}")
    damage, what = NAMES[way]
    damage(model)
    with pytest.raises(SourceError, match=what):
        open_folder(model, "test")


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a\\b", "a\0"])
def test_pooling_cannot_be_read_from_elsewhere(path: str, model: Path) -> None:
    (model / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": path}]))
    with pytest.raises(SourceError, match="could lead out"):
        declared_pooling(model, "test")


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("models: [{source: folder:model, name: X}]", "model"),
        ("targets: {X: {format: parquet, scheme: INT8}}", "target"),
        ("name: X", "name"),
        ("publish: {hub: folder:hub, repo: X}", "repo"),
        ("models: [{source: 'hub:X'}]", "source"),
    ],
)
@pytest.mark.parametrize("name", ["../x", "/x", "..", "a\\..\\x", ".git/hooks/x", '"a\\0b"', "a/b/c"])
def test_a_manifest_cannot_name_what_leads_elsewhere(
    part: str, path: str, name: str, tmp_path: Path, hubmill: Command
) -> None:
    quoted = name if name.startswith('"') else f"'{name}'"
    lines = {"name": "name: n", "models": "models: [{source: folder:model}]"}
    lines |= {"targets": "targets: {q: {format: parquet, scheme: INT8}}"}
    lines[part.partition(":")[0]] = part.replace("'hub:X'", f'"hub:{name.strip(chr(34))}"').replace("X", quoted)
    manifest = tmp_path / "m.yaml"
    manifest.write_text("\n".join(lines.values()) + "\n")
    answer = hubmill("plan", manifest, "--out", tmp_path / "out")
    assert answer.code == 2, answer.errors
    assert not list(tmp_path.rglob("x"))


# Hubs


@pytest.mark.parametrize("commit", ["../../../elsewhere", "/elsewhere", "main", "0" * 41, "0" * 39 + "\n"])
def test_a_hub_cannot_choose_where_its_files_lie(
    commit: str, hub_server: HubServer, model: Path, tmp_path: Path
) -> None:
    hub_server.add("owner/model", {path.name: path.read_bytes() for path in model.iterdir()})
    place = hub_server.repos["models", "owner/model"]
    place.commits[commit], place.heads["main"] = place.commits[place.head], commit
    with pytest.raises(SourceError, match="commits have 40 hex digits"):
        resolve("hub:owner/model", tmp_path / "cache", "test", endpoint=hub_server.url)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "elsewhere").exists()


# Lists that travel with artifacts


COMPARISONS: Mapping[str, object] = {
    "a model outside": {"model": "../..", "target": "x"},
    "a target outside": {"model": "m", "target": "/etc"},
    "no target": {"model": "m"},
    "a model that is a list": {"model": ["m"], "target": "x"},
    "a row that is text": "row",
    "files that are none": {"model": "m", "target": "x", "files": [{"path": 3, "sha256": "0", "bytes": 1}]},
    "sizes that are none": {"model": "m", "target": "x", "files": [{"path": "a", "sha256": "0", "bytes": "many"}]},
}


@pytest.mark.parametrize("kind", COMPARISONS)
@pytest.mark.parametrize("command", ["verify", "compare"])
def test_a_comparison_of_another_form_is_refused(kind: str, command: str, tmp_path: Path, hubmill: Command) -> None:
    row = COMPARISONS[kind]
    if isinstance(row, dict):
        row = {"format": "gguf", "status": "done", "files": []} | row
    folder = tmp_path / "out" / "small"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"format_version": 1, "artifacts": [row], "sources": []}))
    (tmp_path / "model").mkdir()
    shown = folder if command == "verify" else write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    more = () if command == "verify" else ("--out", tmp_path / "out")
    answer = hubmill(command, shown, *more)
    assert answer.code in (1, 2, 3) and answer.errors, answer
    assert "comparison.json" in answer.errors
