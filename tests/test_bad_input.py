"""Bad input through the command line: the right exit code, where and what and what to do, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import cli
from converter.manifest import load
from hub_server import HubServer, hub_server
from jobs.convert import Run, convert
from small_run import ROOT, TARGETS, write_manifest, write_model

__all__ = ["hub_server"]  # a fixture

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TEXTS = "calibration: {sequences: 2, length: 32}\nevaluation: {sequences: 2, length: 32}\n"
MANIFEST = "name: small\nmodels:\n  - source: folder:model\ntargets:\n  int8: {format: parquet, scheme: INT8}\n"
HERE = ("--executor", "inprocess", "--json")

Damage = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the command line ended."""

    code: int
    output: str
    errors: str


Command = Callable[..., Answer]


@pytest.fixture
def hubmill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command line, run in this process; an error that it does not expect fails the test with its traceback."""
    before = signal.getsignal(signal.SIGINT)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hubmill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return Answer(code=int(ended.value.code or 0), output=written.out, errors=written.err)

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A folder with a model that may be damaged, and a manifest for it."""
    shutil.copytree(sound, tmp_path / "model")
    write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    return tmp_path


def finals(out: Path) -> list[str]:
    """Everything in an output folder that a reader would take for a result."""
    return [str(path.relative_to(out)) for path in out.rglob("*") if ".work" not in path.parts]


def config(**changes: object) -> Damage:
    """Change config.json; ... takes a key away."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {"layer_types": None} | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def sharded(change: Callable[[dict[str, str], Path], object]) -> Damage:
    """Split the weights into two shards with an index, which `change` gets with the model's folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
        for shard in SHARDS:
            save_file({name: tensors[name] for name in tensors if index[name] == shard}, folder / shard)
        change(index, folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return damage


def lie(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b"[4096,64]", b"[4097,64]", 1))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def add_tokens(folder: Path) -> None:
    """Make the tokenizer give tokens that the embedding, which stays as it is, has no rows for."""
    config(vocab_size=100)(folder)
    weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:100].clone()}))(folder)


EMBEDDING, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What is done to the model, and what the refusal has to say: what is wrong, and further on what to do.
REFUSED: Mapping[str, tuple[Damage, str]] = {
    "missing shard": (
        sharded(lambda index, folder: (folder / SHARDS[1]).unlink()),
        r"shard model-00002-of-00002\.safetensors with 12 of 24 tensors is missing.*Fetch",
    ),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        r"truncated: \d+ of \d+ bytes are missing.*Fetch",
    ),
    "weights cut in the header": (
        lambda folder: os.truncate(folder / "model.safetensors", 500),
        r"header claims \d+ bytes in a file of 500.*fetch",
    ),
    "weights of no bytes": (content("model.safetensors", b""), r"only 0 bytes long.*Fetch"),
    "header that lies": (lie, r"'model\.embed_tokens\.weight' .* needs 524416 bytes.*fetch it again"),
    "no tokenizer": (remove(*TOKENIZER), r"no tokenizer: none of tokenizer\.json.*Put the tokenizer"),
    "broken tokenizer": (content("tokenizer.json", b"{"), r"tokenizer cannot be read.*Fetch the tokenizer"),
    "tokenizer of another kind": (content("tokenizer.json", b"{}"), r"tokenizer cannot be read: KeyError.*Fetch"),
    "tokenizer larger than the embedding": (add_tokens, r"gives token \d+, and the embedding has 100 rows.*fetch both"),
    "index that leads out": (
        sharded(lambda index, folder: index.update({NORM: "../../evil.safetensors"})),
        r"'\.\./\.\./evil\.safetensors' could lead out.*Do not use",
    ),
    "index to a file of the system": (
        sharded(lambda index, folder: index.update({NORM: "/etc/passwd"})),
        r"'/etc/passwd' could lead out.*Do not use",
    ),
    "link to a file outside": (
        lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"),
        r"'notes\.txt' is a link to a place outside.*Replace",
    ),
    "link to a folder outside": (lambda folder: (folder / "sub").symlink_to("/etc"), r"'sub' is a link to a place out"),
    "link to nothing": (lambda folder: (folder / "notes.txt").symlink_to("gone"), r"'notes\.txt' is a link to nothing"),
    "broken config": (content("config.json", b"{broken"), r"config\.json: broken JSON.*Mend the file"),
    "config that is a list": (content("config.json", b"[]"), r"config\.json: the JSON is not an object.*Mend"),
    "config in another encoding": (content("config.json", b"\xff\xfe\x00"), r"config\.json: broken JSON"),
    "architectures as text": (config(architectures="Qwen3ForCausalLM"), r"not a list of names.*Mend config\.json"),
    "architectures of numbers": (config(architectures=[3]), r"gives \[3\] for architectures.*Mend config\.json"),
    "too many blocks": (config(num_hidden_layers=3), r"gives 3 for num_hidden_layers, and the weights hold 2.*fetch"),
    "too few blocks": (config(num_hidden_layers=1), r"gives 1 for num_hidden_layers, and the weights hold 2.*fetch"),
    "blocks without end": (config(num_hidden_layers=10**9), r"gives 1000000000 for num_hidden_layers.*fetch"),
    "no blocks": (config(num_hidden_layers=0), r"gives 0 for num_hidden_layers, not a number of blocks"),
    "less than no blocks": (config(num_hidden_layers=-2), r"gives -2 for num_hidden_layers, not a number of blocks"),
    "blocks in words": (config(num_hidden_layers="two"), r"gives 'two' for num_hidden_layers, not a number of blocks"),
    "blocks not counted": (config(num_hidden_layers=...), r"gives None for num_hidden_layers, not a number of blocks"),
    "vocabulary too small": (config(vocab_size=100), r"shape \[4096, 64\], and config\.json makes it \[100, 64\]"),
    "vocabulary too large": (config(vocab_size=5000), r"shape \[4096, 64\], and config\.json makes it \[5000, 64\]"),
    "another width": (config(hidden_size=128), r"shape \[4096, 64\], and config\.json makes it \[4096, 128\]"),
    "width left out": (config(hidden_size=...), r"shape \[4096, 64\], and config\.json makes it \[4096, 4096\]"),
    "another middle": (
        config(intermediate_size=99),
        r"block 0: .*mlp\.down_proj\.weight is \(64, 128\), not \(64, 99\)",
    ),
    "another number of heads": (config(num_attention_heads=3), r"block 0: .*self_attn\.o_proj\.weight is \(64, 64\)"),
    "no heads": (config(num_attention_heads=0), r"cannot build a model from config\.json: .*zero\. Mend"),
    "text for a number": (config(rms_norm_eps="small"), r"cannot use config\.json: .*rms_norm_eps.*Mend config\.json"),
    "unknown activation": (config(hidden_act="bogus"), r"cannot build a model from config\.json: KeyError 'bogus'"),
    "unknown rope": (config(rope_parameters={"rope_type": "bogus"}), r"cannot build a model .*KeyError 'bogus'"),
    "text_config of nonsense": (config(text_config=5), r"transformers cannot .* config\.json"),
    "no model type": (config(model_type=...), r"cannot use config\.json: .*model_type.*Mend config\.json"),
    "another family": (
        config(model_type="llama"),
        r"block 0: .*unexpected self_attn\.k_norm\.weight.*belongs to these",
    ),
    "code of its own": (config(auto_map={"AutoModel": "x.Y"}), r"asks for code .*never run.*Use a version"),
    "tensor left out": (weights(lambda tensors: tensors.pop(UP)), r"block 1: .*missing mlp\.up_proj\.weight"),
    "last norm left out": (weights(lambda tensors: tensors.pop(NORM)), r"the weights hold no model\.norm\.weight"),
    "head left out": (config(tie_word_embeddings=False), r"the weights hold no lm_head\.weight.*fetch both"),
    "pickled weights": (
        pickle_weights,
        r"the weights are pickled \(pytorch_model\.bin\).*Convert it once, in a sandbox",
    ),
    "GGUF weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        r"GGUF only.*Take the original model",
    ),
    "empty folder": (empty, r"there is no \.safetensors file.*Check that this is a model"),
    "weights without a tensor": (lambda folder: save_file({}, folder / "model.safetensors"), r"hold no tensor.*Check"),
    "quantized before": (
        config(quantization_config={"quant_method": "gptq"}),
        r"already quantized by 'gptq'.*Take the model it was made from",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_model_is_refused_before_any_work(name: str, place: Path, hubmill: Command) -> None:
    damage, expected = REFUSED[name]
    damage(place / "model")
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3, answer.errors
    assert re.search(expected, answer.errors), answer.errors
    assert answer.errors.startswith("model 'model'") and answer.errors.endswith(".\n")
    assert not (place / "out").exists()


def test_the_plan_refuses_with_the_same_words(place: Path, hubmill: Command) -> None:
    config(num_hidden_layers=3)(place / "model")
    planned = hubmill("plan", place / "small.yaml", "--out", place / "out")
    assert planned.code == 3
    assert planned.errors == hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE).errors


@pytest.mark.parametrize("name", [EMBEDDING, NORM, UP])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_fails_the_job_and_says_where(
    name: str, value: float, place: Path, hubmill: Command
) -> None:
    weights(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))(place / "model")
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", "--executor", "inprocess")
    assert answer.code == 1, answer.errors
    run = place / "out" / "small"
    (row,) = json.loads((run / "comparison.json").read_text())["artifacts"]
    assert row["status"] == "failed"
    assert re.search(rf"{re.escape(name)}: 1 of \d+ values are not finite, the first at \[.*take another", row["error"])
    assert not (run / "model").exists()
    assert "what failed" in answer.output and f"hubmill convert {place}" in answer.output


def test_a_model_that_overflows_fails_and_says_so(place: Path, hubmill: Command) -> None:
    weights(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][0, :4].fill_(3e38))(place / "model")
    assert hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE).code == 1
    (row,) = json.loads((place / "out" / "small" / "comparison.json").read_text())["artifacts"]
    assert re.search(r"block 0: the hidden state .* not finite in 2 of 2 sequences\. Check the model's", row["error"])


def test_an_unknown_architecture_is_refused_only_where_one_is_needed(place: Path, hubmill: Command) -> None:
    config(architectures=["LlamaForCausalLn"])(place / "model")
    write_manifest(place, {name: TARGETS[name] for name in ("int8", "q8-0", "w4a16")})
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3
    assert "int8" not in answer.errors and not (place / "out").exists()
    for line, target in ((6, "q8-0"), (7, "w4a16")):
        assert re.search(rf"small\.yaml:{line}: model/{target}: .*LlamaForCausalLn.*LlamaForCausalLM", answer.errors)
    rest = hubmill(
        "convert", place / "small.yaml", "--out", place / "out", "--skip-unsupported", "--executor", "inprocess"
    )
    assert rest.code == 0, rest.errors
    rows = json.loads((place / "out" / "small" / "comparison.json").read_text())["artifacts"]
    assert [row["status"] for row in rows] == ["done", "skipped", "skipped"]
    assert rows[0]["output"] == {}
    assert "what was left out" in rest.output and "converter/architectures" in rest.output
    assert hubmill("compare", place / "small.yaml", "--out", place / "out").code == 0


def test_a_model_that_cannot_be_read_leaves_the_others_and_the_lock_whole(
    sound: Path, place: Path, hubmill: Command
) -> None:
    shutil.copytree(sound, place / "torn")
    os.truncate(place / "torn" / "model.safetensors", 5000)
    path = write_manifest(place, {"int8": TARGETS["int8"]}, sources=("model", "torn"))
    assert hubmill("convert", path, "--out", place / "out", *HERE).code == 3
    assert not (place / "out").exists()
    assert hubmill("convert", path, "--out", place / "out", *HERE, "--skip-unsupported").code == 0
    lock = (place / "out" / "small" / "manifest.lock.yaml").read_text()
    assert "folder:model" in lock and "torn" not in lock


# Targets that no container, reader or kernel takes: 2 when the manifest alone tells, 3 when the model has to be asked.
TARGET_FAULTS = {
    "format: parquet, type: Q4_K_M": (
        2,
        r"small\.yaml:5:\d+: target 'x': parquet cannot store type 'Q4_K_M'; it stores",
    ),
    "format: gguf, type: Q9": (2, r"small\.yaml:5:\d+: target 'x': gguf cannot store type 'Q9'; it stores F32"),
    "format: compressed-tensors, scheme: INT3": (
        2,
        r"small\.yaml:5:\d+: .*cannot store scheme 'INT3'; it stores W4A16",
    ),
    "format: gguf, type: Q8_0, rules: {down: Q9}": (2, r"small\.yaml:5:\d+: .*cannot store rule type 'Q9'.*Choose"),
    "format: compressed-tensors, scheme: W8A8, granularity: group, group_size: 32": (
        3,
        r"small\.yaml:5: target 'x': no",
    ),
    "format: compressed-tensors, scheme: W4A16, rules: {q_proj: W8A8}": (3, r"small\.yaml:5: target 'x': .*let rules"),
}


@pytest.mark.parametrize("target", TARGET_FAULTS)
def test_a_target_that_cannot_be_stored_is_refused_with_its_line(target: str, place: Path, hubmill: Command) -> None:
    code, expected = TARGET_FAULTS[target]
    text = MANIFEST.replace("int8: {format: parquet, scheme: INT8}", f"x: {{{target}}}") + TEXTS
    (place / "small.yaml").write_text(text)
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert (answer.code, bool(re.search(expected, answer.errors))) == (code, True), answer.errors
    assert not (place / "out").exists()


def test_rows_that_no_block_divides_are_planned_with_a_fallback(place: Path, hubmill: Command) -> None:
    targets = {
        "q4": "{format: gguf, type: Q4_K_M}",
        "w4": "{format: compressed-tensors, scheme: W4A16, group_size: 7}",
        "int4": "{format: parquet, scheme: INT4, group_size: 48}",
    }
    write_manifest(place, targets)
    answer = hubmill("plan", place / "small.yaml", "--json")
    assert answer.code == 0, answer.errors
    jobs = {job["job"]: job for job in json.loads(answer.output)["jobs"]}
    assert any("rows of 64 weights hold no whole blocks of 256" in note for note in jobs["model/q4"]["notes"])
    assert any("groups of 7 do not divide rows of 64" in note for note in jobs["model/w4"]["notes"])
    assert hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE).code == 0


TEXT_FAULTS = {
    "calibration: {text: file:short.txt}": (3, r"calibration text of model 'model': the text has \d+ tokens.*Ask for"),
    "evaluation: {text: file:short.txt}": (3, r"evaluation text of model 'model': the text has \d+ tokens.*Ask for"),
    "evaluation: {text: file:empty.txt}": (3, r"empty\.txt: there is no text in it.*Name a file"),
    "calibration: {text: file:binary.txt}": (3, r"binary\.txt: the text is not UTF-8 at byte 0.*Convert"),
    "calibration: {text: file:broken.jsonl}": (3, r"broken\.jsonl:2: not JSON.*Write one JSON object per line"),
    "calibration: {text: file:none.txt}": (2, r"small\.yaml:6:\d+: calibration: there is no file.*Write a path"),
    "calibration: {sequences: 100000, length: 4096}": (3, r"sequences of length 4096 take.*Ask for at most"),
    "calibration: {sequences: 0}": (2, r"small\.yaml:6:\d+: calibration: sequences '0'"),
}


@pytest.mark.parametrize("section", TEXT_FAULTS)
def test_a_text_that_does_not_do_is_refused(section: str, place: Path, hubmill: Command) -> None:
    code, expected = TEXT_FAULTS[section]
    (place / "short.txt").write_text("one two three four five six seven eight nine ten")
    (place / "empty.txt").write_text(" \n")
    (place / "binary.txt").write_bytes(b"\xff\xfe\x80")
    (place / "broken.jsonl").write_text('{"text": "a"}\n{\n')
    (place / "small.yaml").write_text(f"{MANIFEST}{section}\n")
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert (answer.code, bool(re.search(expected, answer.errors))) == (code, True), answer.errors
    assert not (place / "out").exists()


def test_a_manifest_without_text_sections_fits_the_built_in_text(place: Path, hubmill: Command) -> None:
    (place / "small.yaml").write_text(MANIFEST)
    assert hubmill("plan", place / "small.yaml").code == 0


def test_results_that_have_nowhere_to_go_are_refused(place: Path, hubmill: Command) -> None:
    file = place / "file"
    file.write_text("not ours")
    for out in (file, file / "below", "/dev/null"):
        for command in ("plan", "convert"):
            answer = hubmill(command, place / "small.yaml", "--out", out, *(HERE if command == "convert" else ()))
            assert answer.code == 3
            assert re.search(r"is a file, and results go to a folder\. Choose another --out", answer.errors)
    (place / "out" / "small").mkdir(parents=True)
    (place / "out" / "small" / ".work").write_text("not ours")
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3 and "no results can be written" in answer.errors
    assert file.read_text() == (place / "out" / "small" / ".work").read_text() == "not ours"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_folders_without_permission_are_told(place: Path, hubmill: Command) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o500)
    answer = hubmill("convert", place / "small.yaml", "--out", closed, *HERE)
    assert answer.code == 3 and "cannot be written to. Choose another --out" in answer.errors
    (place / "model" / "model.safetensors").chmod(0)
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3 and re.search(r"cannot be read: .*permissions", answer.errors)


def test_a_cluster_that_is_not_there_is_told_at_once(place: Path, hubmill: Command) -> None:
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", "--address", "127.0.0.1:9", "--json")
    assert answer.code == 3
    assert re.search(r"--address 127\.0\.0\.1:9: nothing answers there.*ray start --head", answer.errors)
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["status", "compare", "publish"])
def test_asking_for_results_that_are_not_there_is_told(command: str, place: Path, hubmill: Command) -> None:
    with (place / "small.yaml").open("a") as file:
        file.write("publish: {hub: folder:hub}\n")
    answer = hubmill(command, place / "small.yaml", "--out", place / "out")
    assert answer.code == 3
    assert "hubmill convert" in answer.errors


def test_damaged_state_is_told_or_passed_over(place: Path, hubmill: Command) -> None:
    arguments = (place / "small.yaml", "--out", place / "out")
    assert hubmill("publish", *arguments).code == 2  # no publish: section
    assert hubmill("convert", *arguments, *HERE).code == 0
    run = place / "out" / "small"
    with (run / ".work" / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ta')  # what a run that was killed while it wrote leaves
    assert hubmill("status", *arguments).code == 0
    for broken in ("{", "[]", "{}"):
        (run / "comparison.json").write_text(broken)
        for answer in (hubmill("compare", *arguments), hubmill("verify", run)):
            assert answer.code == 3 and re.search(r"comparison\.json: it .*Run hubmill convert again", answer.errors)
    assert hubmill("convert", *arguments, *HERE).code == 0
    assert hubmill("verify", run).code == 0


def test_a_model_that_was_moved_is_fetched_from_its_new_place(place: Path) -> None:
    write_manifest(place, {"int8": TARGETS["int8"]})
    assert convert(Run(manifest=load(place / "small.yaml"), out=place / "out", executor="inprocess"), Quiet()).rows
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.move(place / "model", elsewhere / "model")
    text = (place / "small.yaml").read_text()
    (place / "small.yaml").write_text(text.replace("folder:model", "folder:elsewhere/model").replace("INT8", "INT4"))
    (place / "out" / "small" / "manifest.lock.yaml").unlink()
    run = Run(manifest=load(place / "small.yaml"), out=place / "out", executor="inprocess")
    assert convert(run, Quiet()).failures == ()


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


HUB_FAULTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "401": ({"status": 401}, r"does not accept the token \(401\).*Set HF_TOKEN"),
    "403": ({"status": 403}, r"\(403\).*Ask the owner"),
    "404": ({"status": 404}, r"\(404\).*Check the name"),
    "429": ({"status": 429}, r"slow down \(429\).*Run it again"),
    "503": ({"status": 503}, r"\(503\).*Run it again later"),
    "cut": ({"cut_after": 5}, r"was cut \(RemoteProtocolError\).*Check the network"),
}


@pytest.fixture
def on_hub(hub_server: HubServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub that has the model, which the manifest names; its faults are not waited out."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr("converter.hub.WAITS", (0.01,))
    hub_server.add("owner/small", {path.name: path.read_bytes() for path in (place / "model").iterdir()})
    (place / "small.yaml").write_text(MANIFEST.replace("folder:model", "hub:owner/small") + TEXTS)
    return hub_server


@pytest.mark.parametrize("name", HUB_FAULTS)
@pytest.mark.parametrize("path", ["/api/models/", r"/config\.json$", r"\.safetensors$"])
def test_a_hub_that_does_not_answer_refuses_the_plan(
    name: str, path: str, on_hub: HubServer, place: Path, hubmill: Command
) -> None:
    fault, expected = HUB_FAULTS[name]
    on_hub.fail("GET", path, **fault, times=99)
    answer = hubmill("plan", place / "small.yaml", "--out", place / "out")
    assert answer.code == 3
    assert answer.errors.startswith("model 'small': owner/small: ")
    assert re.search(expected, answer.errors), answer.errors
    assert not [name for name in finals(place / "out") if not name.startswith(".work") and name != "small"]


def test_a_hub_that_fails_after_the_plan_fails_its_jobs_and_keeps_what_came(
    on_hub: HubServer, place: Path, hubmill: Command
) -> None:
    assert hubmill("plan", place / "small.yaml", "--out", place / "out").code == 0
    on_hub.fail("GET", r"\.safetensors$", status=503, times=99)
    on_hub.faults[-1].times = 0  # the plan reads headers again: only what comes after may fail
    on_hub.faults.clear()
    monkeys = on_hub.route

    async def later(request: Any) -> Any:
        response = await monkeys(request)
        whole = request.method == "GET" and request.url.path.endswith(".safetensors") and "range" not in request.headers
        if whole:
            response.status_code = 503
        return response

    on_hub.route = later  # type: ignore[method-assign]
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 1, answer.errors
    (row,) = json.loads((place / "out" / "small" / "comparison.json").read_text())["artifacts"]
    assert row["status"] == "failed" and re.search(r"owner/small: .*\(503\)", row["error"])
    on_hub.route = monkeys  # type: ignore[method-assign]
    assert hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE).code == 0


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json"])
def test_a_hub_that_lists_names_outside_is_refused(name: str, on_hub: HubServer, place: Path, hubmill: Command) -> None:
    on_hub.add("owner/small", on_hub.files("owner/small") | {name: b"{}"})
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3 and "could lead out of the model's folder" in answer.errors
    assert not list(place.rglob("evil.json"))


def test_a_refusal_shows_no_traceback_in_a_process_of_its_own(place: Path) -> None:
    config(hidden_act="bogus")(place / "model")
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml"), "--out", str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("model 'model': transformers cannot build a model")
