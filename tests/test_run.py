"""Whole runs on a small model: the same bytes wherever they run, nothing done twice, nothing lost."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from gguf import GGUFReader

from converter import manifest as manifests
from converter.errors import UnsupportedError
from converter.progress import Event
from jobs.convert import Refused, Run, convert, only_run, plan
from jobs.lease import holder_of
from jobs.show import plan_json
from jobs.status import status
from jobs.store import Store
from jobs.verify import verify
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model


class Quiet:
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def show(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "model")
    write_manifest(folder, extra="publish: {hub: folder:hub}")
    return folder


def a_run(place: Path, out: str, **options: object) -> Run:
    settings = {"executor": "inprocess"} | options
    return Run(manifest=manifests.load(place / "small.yaml"), out=place / out, **settings)  # type: ignore[arg-type]


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a run's artifacts."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    ours = [path for path in paths if path.parts[0] != ".work" and len(path.parts) > 2]
    return {str(path): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in ours}


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    result = convert(a_run(place, "out"), Quiet())
    assert result.failures == ()
    assert result.exit_code == 0
    return place / "out" / "small"


def hubmill(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "converter.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_SECONDS, check=False)


def test_every_artifact_is_done_and_measured(finished: Path) -> None:
    rows = json.loads((finished / "comparison.json").read_text())["artifacts"]
    assert [row["target"] for row in rows] == list(TARGETS)
    for row in rows:
        assert row["status"] == "done"
        assert 0 < row["output"]["perplexity"] < 1e6
        assert row["output"]["kl_mean"] >= 0
        assert row["peak_rss_bytes"] > 0
    by_target = {row["target"]: row for row in rows}
    assert by_target["q8-0"]["weight"]["relative_mse"] < by_target["int2"]["weight"]["relative_mse"]
    assert by_target["int8"]["weight"]["cosine"] > 0.9999


def test_the_imatrix_lies_beside_the_models_artifacts(finished: Path) -> None:
    reader = GGUFReader(finished / "model" / "imatrix.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7, "a sum and a count for each of 7 linears in 2 blocks"
    assert tensors["blk.1.ffn_down.weight.counts"].item() == 4 * 64
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape == (1, 128)
    assert (tensors["blk.0.attn_q.weight.in_sum2"] == tensors["blk.0.attn_k.weight.in_sum2"]).all()
    assert (tensors["blk.0.attn_q.weight.in_sum2"] > 0).all()


def test_planned_sizes_are_the_written_ones_to_the_byte(place: Path, finished: Path) -> None:
    for job in plan(a_run(place, "out")).prepared.plan.jobs:
        for name, size in job.artifact.files.items():
            written = (finished / job.model.name / job.target.name / name).stat().st_size
            assert written == size if job.artifact.exact else written <= size


def test_a_second_run_has_nothing_to_do(place: Path, finished: Path) -> None:
    before = sums(finished)
    assert convert(a_run(place, "out"), Quiet()).tasks_run == 0
    assert sums(finished) == before


def test_a_damaged_artifact_is_made_again_with_the_same_bytes(place: Path, finished: Path) -> None:
    before = sums(finished)
    victim = next((finished / "model" / "q8-0").glob("*.gguf"))
    os.truncate(victim, 100)
    assert convert(a_run(place, "out"), Quiet()).tasks_run > 0
    assert sums(finished) == before


@pytest.mark.parametrize("removed", [False, True])
def test_a_flipped_byte_is_found_and_mended(place: Path, finished: Path, removed: bool) -> None:
    """The final file and the assembled one share their bytes, so removing the first alone must not bless the damage."""
    before = sums(finished)
    victim = finished / "model" / "int8" / "model.parquet"
    with victim.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    assert verify(str(finished), place).problems == [
        f"{victim}: is not what was written. Remove it and run hubmill convert again."
    ]
    if removed:
        victim.unlink()
    assert convert(a_run(place, "out"), Quiet()).exit_code == 0
    assert sums(finished) == before
    assert verify(str(finished), place).problems == []


def test_status_tells_a_run_that_was_cut_from_one_that_works(place: Path, finished: Path) -> None:
    found = status(Store(run=finished))
    assert found["running"] == 0
    assert {event["state"] for event in found["tasks"]} == {"done"}
    with only_run(Store(run=finished), Quiet().show):
        assert holder_of(Store(run=finished).lease)
    assert not holder_of(Store(run=finished).lease)


def test_outputs_of_earlier_settings_do_not_pile_up(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    for target in ("{format: parquet, scheme: INT8}", "{format: parquet, scheme: INT4}"):
        write_manifest(tmp_path, {"x": target})
        assert convert(a_run(tmp_path, "out"), Quiet()).exit_code == 0
    kept = sorted(key.partition("-")[0] for key in Store(run=tmp_path / "out" / "small").done())
    assert kept == ["assemble", "evaluate", "fetch", "finish"]


def test_every_step_declares_what_it_reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what it reads would not be made again when it is damaged, and a Ray task could start before it is there."""
    read: dict[str, set[str]] = {}
    now: list[str] = []
    record, attempt = Store.record, Store.attempt

    def recording(store: Store, key: str) -> dict[str, object]:
        read.setdefault(now[-1] if now else "", set()).add(key)
        return record(store, key)

    @contextmanager
    def attempting(store: Store, key: str, durable: bool = True) -> Iterator[tuple[Path, dict[str, object]]]:
        now.append(key)
        with attempt(store, key, durable) as found:
            yield found
        now.pop()

    monkeypatch.setattr(Store, "record", recording)
    monkeypatch.setattr(Store, "attempt", attempting)
    run = a_run(place, "reading")
    assert convert(run, Quiet()).exit_code == 0
    tasks = plan(run).prepared.plan.graph.tasks
    seen = {key: keys for key, keys in read.items() if key}
    assert len({key.partition("-")[0] for key in seen}) > 5
    for key, keys in seen.items():
        assert keys <= set(tasks[key].reads), f"{tasks[key].title} reads {keys - set(tasks[key].reads)}"


@pytest.mark.slow
def test_work_may_be_deleted_at_any_time(place: Path, finished: Path) -> None:
    import shutil

    before = sums(finished)
    shutil.rmtree(finished / ".work")
    assert convert(a_run(place, "out"), Quiet()).exit_code == 0
    assert sums(finished) == before


@pytest.mark.ray
def test_embedded_ray_writes_the_same_bytes(place: Path, finished: Path) -> None:
    done = hubmill("convert", place / "small.yaml", "--out", place / "ray", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    assert sums(place / "ray" / "small") == sums(finished)


def test_a_killed_run_resumes_to_the_same_bytes(place: Path, finished: Path) -> None:
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml")]
    command += ["--out", str(place / "killed"), "--executor", "inprocess", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = place / "killed" / "small" / ".work" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (events.is_file() and events.read_text().count('"done"') >= 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished_before = events.read_text().count('"state": "done"')
    assert finished_before >= 5
    result = convert(a_run(place, "killed"), Quiet())
    assert result.exit_code == 0
    assert sums(place / "killed" / "small") == sums(finished)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_and_says_how_to_go_on(interrupt: signal.Signals, place: Path) -> None:
    """Also in the middle of the work, when Ray is there, which has a way of its own to end a process at SIGTERM."""
    out = place / interrupt.name
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = out / "small" / ".work" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (events.is_file() and '"state": "start"' in events.read_text()):
        time.sleep(0.05)
    process.send_signal(interrupt)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert "Run the same command again" in errors
    found = status(Store(run=out / "small"))
    assert (found["state"], found["note"]) == ("failed", "interrupted")


@pytest.mark.slow
def test_a_bad_weight_fails_its_model_alone_and_says_where(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "model")
    write_model(tmp_path / "broken", seed=1)
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    write_manifest(tmp_path, {"int8": TARGETS["int8"]}, sources=("model", "broken"))
    result = convert(a_run(tmp_path, "out"), Quiet())
    assert result.exit_code == 1
    by_model = {row["model"]: row for row in result.rows}
    assert by_model["model"]["status"] == "done"
    assert "model.layers.1.mlp.up_proj.weight" in by_model["broken"]["error"]
    again = hubmill("convert", tmp_path / "small.yaml", "--out", tmp_path / "out", "--executor", "inprocess", "--json")
    assert again.returncode == 1
    events = [json.loads(line) for line in again.stdout.splitlines()]
    states = {event["title"]: event["state"] for event in events}
    assert states["quantize broken/int8 block 1"] == "failed"
    assert states["assemble broken/int8"] == "skipped"


def test_a_plain_state_dict_converts_without_an_architecture(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    tensors = {"0.weight": torch.randn(64, 128), "0.bias": torch.randn(64), "2.weight": torch.randn(32, 64)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    targets = {"w8": "{format: compressed-tensors, scheme: W8A16}", "int8": TARGETS["int8"]}
    write_manifest(tmp_path, targets)
    result = convert(a_run(tmp_path, "out"), Quiet())
    assert result.exit_code == 0
    assert all(row["output"] == {} and row["weight"]["cosine"] > 0.9999 for row in result.rows)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    save_file({"ids": torch.arange(4)}, tmp_path / "model" / "model.safetensors")
    write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    with pytest.raises(Refused, match="no floating-point tensor"):
        convert(a_run(tmp_path, "out"), Quiet())


def test_what_needs_an_architecture_is_refused_before_starting(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen33ForCausalLM"]}))
    write_manifest(tmp_path, {"q8-0": TARGETS["q8-0"]})
    with pytest.raises(Refused, match=r"small\.yaml:5.*Qwen33ForCausalLM.*Qwen3ForCausalLM"):
        convert(a_run(tmp_path, "out"), Quiet())
    assert not (tmp_path / "out" / "small" / "comparison.json").exists()


def test_exit_codes_and_messages_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\nmodels: []\ntargets: {a: {format: ggfu}}\n")
    wrong = hubmill("plan", tmp_path / "bad.yaml")
    assert wrong.returncode == 2
    assert "bad.yaml:3:" in wrong.stderr and "gguf" in wrong.stderr
    assert hubmill("convert").returncode == 2
    assert hubmill("nonsense").returncode == 2
    assert hubmill("--help").returncode == 0
    assert hubmill("--version").stdout == f"hubmill {metadata.version('hubmill')}\n"


def test_what_readers_do_otherwise_is_told_from_the_plan_to_the_card(tmp_path: Path) -> None:
    tokenizer = write_model(tmp_path / "model", layers=1) / "tokenizer.json"
    content = json.loads(tokenizer.read_text("utf-8"))
    tokenizer.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}), "utf-8")
    write_manifest(tmp_path, {"q8-0": TARGETS["q8-0"], "int8": TARGETS["int8"]})
    run, display = a_run(tmp_path, "out"), Quiet()
    told = {job["job"]: job["notes"] for job in plan_json(run, plan(run))["jobs"]}
    (said,) = told["model/q8-0"]
    assert "do not normalise text (NFC)" in said and told["model/int8"] == []
    assert convert(run, display).exit_code == 0
    assert [event.subject for event in display.events if said in event.note] == ["model/q8-0"]
    rows = json.loads((tmp_path / "out" / "small" / "comparison.json").read_text())["artifacts"]
    assert {row["target"]: row["warnings"] for row in rows} == {"q8-0": [said], "int8": []}
    assert f"- {said}." in (tmp_path / "out" / "small" / "model" / "q8-0" / "README.md").read_text("utf-8")
    assert said in (tmp_path / "out" / "small" / "report.html").read_text("utf-8")


def test_disk_too_small_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Refused, match=r"of disk, and 1\.0 kB are free"):
        convert(a_run(place, "elsewhere"), Quiet())


def test_a_folder_of_a_manifest_elsewhere_is_refused_while_that_is_there(
    finished: Path, place: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", seed=3)
    write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    run = Run(manifest=manifests.load(tmp_path / "small.yaml"), out=place / "out", executor="inprocess")
    with pytest.raises(UnsupportedError, match="results of another manifest"):
        convert(run, Quiet())


def test_a_folder_of_another_manifest_is_refused(place: Path, finished: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other-model")
    write_manifest(tmp_path, {"int8": TARGETS["int8"]}, sources=("other-model",))
    run = Run(manifest=manifests.load(tmp_path / "small.yaml"), out=place / "out", executor="inprocess")
    with pytest.raises(Exception, match="results of another manifest"):
        convert(run, Quiet())


def test_a_finished_run_keeps_the_contract(finished: Path) -> None:
    """The same looks as any outside check takes: files listed are there, whole, and nothing else is."""
    rows = json.loads((finished / "comparison.json").read_text())["artifacts"]
    for row in rows:
        folder = finished / row["model"] / row["target"]
        listed = {item["path"]: item for item in row["files"]}
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(listed)
        assert "README.md" in listed
        for name, item in listed.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == item["sha256"]
    for name in ("comparison.parquet", "tensors.parquet", "report.html", "manifest.lock.yaml"):
        assert (finished / name).is_file()


def test_publishing_to_a_folder_hub_shows_whole_artifacts(place: Path, finished: Path) -> None:
    for name in TARGETS:
        published = place / "hub" / f"model-{name}"
        assert (published / "README.md").read_bytes() == (finished / "model" / name / "README.md").read_bytes()


def test_the_package_is_installed_for_ray_workers() -> None:
    assert importlib.util.find_spec("jobs.steps") is not None
