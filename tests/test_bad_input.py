"""Bad input through the command line: the right exit code, where and what and what to do, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from starlette.responses import Response

from bad_models import EMBEDDING, NORM, REFUSED, UP, config, weights
from command import Command, hubmill
from hub_server import HubServer, hub_server
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model

__all__ = ["hub_server", "hubmill"]  # fixtures

TEXTS = "calibration: {sequences: 2, length: 32}\nevaluation: {sequences: 2, length: 32}\n"
MANIFEST = "name: small\nmodels:\n  - source: folder:model\ntargets:\n  int8: {format: parquet, scheme: INT8}\n"
HERE = ("--executor", "inprocess", "--json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A folder with a model that may be damaged, and a manifest for it."""
    shutil.copytree(sound, tmp_path / "model")
    write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    return tmp_path


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
        r"small\.yaml:5:\d+: target 'x': parquet cannot store type 'Q4_K_M'; it",
    ),
    "format: gguf, type: Q9": (2, r"small\.yaml:5:\d+: target 'x': gguf cannot store type 'Q9'; it stores F32"),
    "format: compressed-tensors, scheme: INT3": (
        2,
        r"small\.yaml:5:\d+: .*cannot store scheme 'INT3'; it stores",
    ),
    "format: gguf, type: Q8_0, rules: {down: Q9}": (2, r"small\.yaml:5:\d+: .*cannot store rule type 'Q9'.*Choose"),
    "format: compressed-tensors, scheme: W8A8_STATIC, granularity: group, group_size: 32": (
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
    "calibration: {text: file:short.txt}": (
        3,
        r"small\.yaml:6: calibration text of model 'model': the text has \d+ tokens.*Ask for",
    ),
    "evaluation: {text: file:short.txt}": (
        3,
        r"small\.yaml:6: evaluation text of model 'model': the text has \d+ tokens.*Ask for",
    ),
    "evaluation: {text: file:empty.txt}": (3, r"empty\.txt: there is no text in it.*Name a file"),
    "calibration: {text: file:binary.txt}": (3, r"binary\.txt: the text is not UTF-8 at byte 0.*Convert"),
    "calibration: {text: file:broken.jsonl}": (3, r"broken\.jsonl:2: not JSON.*Write one JSON object per line"),
    "calibration: {text: file:none.txt}": (2, r"small\.yaml:6:\d+: calibration: there is no file.*Write a path"),
    "calibration: {sequences: 100000, length: 4096}": (3, r"sequences of length 4096 take.*Ask for at most"),
    "calibration: {sequences: 0}": (2, r"small\.yaml:6:\d+: calibration: sequences '0'"),
}


def test_a_rule_that_changes_nothing_is_told_in_the_plan(place: Path, hubmill: Command) -> None:
    write_manifest(place, {"q8": "{format: gguf, type: Q8_0, rules: {layernorm: F16, v_proj: F16}}"})
    notes = json.loads(hubmill("plan", place / "small.yaml", "--json").output)["jobs"][0]
    assert "the rule 'layernorm' changes nothing" in json.dumps(notes) and "'v_proj'" not in json.dumps(notes)


def test_a_file_in_place_of_its_folder_is_told(place: Path, hubmill: Command) -> None:
    write_manifest(place, {"q8": "{format: gguf, type: Q8_0}"}, sources=("model/config.json",))
    answer = hubmill("plan", place / "small.yaml")
    assert answer.code == 2 and "is a file. Name the folder that it lies in" in answer.errors + answer.output


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


def test_a_model_that_was_moved_is_fetched_from_its_new_place(place: Path, hubmill: Command) -> None:
    arguments = ("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert hubmill(*arguments).code == 0
    (place / "elsewhere").mkdir()
    shutil.move(place / "model", place / "elsewhere" / "model")
    text = (place / "small.yaml").read_text()
    (place / "small.yaml").write_text(text.replace("folder:model", "folder:elsewhere/model").replace("INT8", "INT4"))
    (place / "out" / "small" / "manifest.lock.yaml").unlink()
    again = hubmill(*arguments)
    assert again.code == 0, again.output


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
    template = f"{hub_server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("converter.hub_calls.WAITS", (0.01,))
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
    *waits, refused = answer.errors.splitlines()
    assert [wait.endswith(": goes on in 0 s") for wait in waits] == [True] * (name in ("429", "503", "cut"))
    assert refused.startswith("model 'small': owner/small: ")
    assert re.search(expected, refused), refused
    assert not [path for path in (place / "out").rglob("*") if path.is_file() and ".work" not in path.parts]


@pytest.mark.parametrize("page", [b"", b"<h1>caf\xe9 closed</h1>"])
def test_a_hub_that_fails_after_the_plan_fails_its_jobs_until_it_is_back(
    page: bytes, on_hub: HubServer, place: Path, hubmill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = on_hub.route

    async def busy(request: Any) -> Any:
        """Whole weights are refused; the first bytes of a file, which a plan asks for, are given."""
        whole = request.url.path.endswith(".safetensors") and "range" not in request.headers
        return Response(page, 503, media_type="text/html; charset=latin-1") if whole else await sound(request)

    with monkeypatch.context() as patch:
        patch.setattr(on_hub, "route", busy)
        answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 1, answer.errors
    (row,) = json.loads((place / "out" / "small" / "comparison.json").read_text())["artifacts"]
    assert row["status"] == "failed" and re.search(r"owner/small: .*error.*Run it again", row["error"])
    assert not (place / "out" / "small" / "small").exists()
    assert hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE).code == 0


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json"])
def test_a_hub_that_lists_names_outside_is_refused(name: str, on_hub: HubServer, place: Path, hubmill: Command) -> None:
    on_hub.add("owner/small", on_hub.files("owner/small") | {name: b"{}"})
    answer = hubmill("convert", place / "small.yaml", "--out", place / "out", *HERE)
    assert answer.code == 3 and "could lead out of the model's folder" in answer.errors
    assert not list(place.rglob("evil.json"))


@pytest.mark.slow
def test_a_refusal_shows_no_traceback_in_a_process_of_its_own(place: Path) -> None:
    config(hidden_act="bogus")(place / "model")
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml"), "--out", str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("model 'model': transformers cannot build a model")
