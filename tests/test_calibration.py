"""Token rows: even cover, no overlap, no surprise; texts from everywhere they may come from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter import manifest as manifests
from converter.blocks import Decoder
from converter.calibration import digest, documents, token_rows
from converter.errors import SourceError
from jobs import attempt
from jobs.attempt import decoder_of
from jobs.convert import Run, convert, plan
from jobs.show import plan_json
from jobs.work import Model, Work
from small_run import write_manifest, write_model
from test_run import Quiet


def encode(text: str) -> list[int]:
    """One token per word, which is its number; the blank line between documents is -1."""
    return [int(word) for word in text.split()] + ([-1] if text.endswith("\n\n") else [])


def counting(count: int) -> list[str]:
    return [" ".join(map(str, range(count)))]


def chat(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{one['role']}>{one['content']}" for one in messages)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.integers(1, 9),
    window=st.integers(1, 20),
    spare=st.integers(0, 50),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_rows_are_windows_of_the_text_that_do_not_overlap(
    sequences: int, window: int, spare: int, prefix: int, seed: int
) -> None:
    total = sequences * window + spare
    begin = tuple(range(1000, 1000 + prefix))
    rows = token_rows(counting(total), encode, sequences, window + prefix, seed, "text", begin)
    assert rows.shape == (sequences, window + prefix)
    assert rows.dtype == torch.int64
    assert (rows[:, :prefix] == torch.tensor(begin, dtype=torch.int64)).all()
    body = rows[:, prefix:].clone()
    body[body == -1] = total  # the end of the only document
    assert (body.diff(dim=1) == 1).all()
    assert (body[1:, 0] > body[:-1, -1]).all()


def test_rows_come_from_every_stretch_of_the_text() -> None:
    rows = token_rows(counting(10_000), encode, 10, 8, 0, "text")
    assert (rows[:, 0] // 1000).tolist() == list(range(10))


def test_documents_are_joined_in_order() -> None:
    rows = token_rows(["1 2 3", "4 5"], encode, 1, 7, 0, "text")
    assert rows.tolist() == [[1, 2, 3, -1, 4, 5, -1]]


def test_the_seed_alone_moves_the_rows() -> None:
    first, again, other = (token_rows(counting(5000), encode, 8, 16, seed, "text") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_short_a_text_says_how_much_there_is_and_what_fits() -> None:
    with pytest.raises(SourceError, match=r"builtin: the text has 100 tokens; .*33 take 132.*at most 3"):
        token_rows(counting(99), encode, 4, 33, 0, "builtin")
    with pytest.raises(SourceError, match="a length below 100"):
        token_rows(counting(99), encode, 1, 200, 0, "builtin")


def test_digest_tells_rows_and_shapes_apart() -> None:
    rows = torch.arange(6).reshape(2, 3)
    assert digest(rows) == digest(rows.clone())
    assert len({digest(rows), digest(rows.reshape(3, 2)), digest(rows + 1)}) == 3


def test_builtin_texts_are_the_recorded_ones_and_share_no_document(tmp_path: Path) -> None:
    calibration = documents("builtin", tmp_path, "calibration", chat)
    evaluation = documents("builtin", tmp_path, "evaluation", chat)
    assert len(calibration) > 10
    assert len(evaluation) > 10
    assert not set(calibration) & set(evaluation)
    assert all(document.strip() for document in calibration + evaluation)
    texts = resources.files("converter") / "texts"
    for line in (texts / "SHA256SUMS").read_text("utf-8").splitlines():
        recorded, name = line.split()
        assert hashlib.sha256((texts / name.lstrip("*")).read_bytes()).hexdigest() == recorded


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n%%\ntwo", "utf-8")
    assert documents("file:a.txt", tmp_path, "calibration", chat) == ["one\n%%\ntwo"]


def test_json_lines_hold_text_or_messages(tmp_path: Path) -> None:
    lines = [{"text": "plain \u2028 text", "id": 3}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    assert documents("file:a.jsonl", tmp_path, "calibration", chat) == ["plain \u2028 text", "<user>hi"]


@pytest.mark.parametrize(
    ("line", "what"),
    [("{", "not JSON"), ('{"content": "x"}', "neither"), ("[]", "neither"), ('{"text": 1}', "neither")],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, "utf-8")
    with pytest.raises(SourceError, match=rf"a\.jsonl:2: {what}"):
        documents("file:a.jsonl", tmp_path, "calibration", chat)


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    for name, what in (("latin.txt", "not UTF-8 at byte 3"), ("empty.txt", "no text"), ("none.txt", "cannot be read")):
        with pytest.raises(SourceError, match=what):
            documents(f"file:{name}", tmp_path, "calibration", chat)


def test_messages_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user"}]}', "utf-8")
    with pytest.raises(SourceError, match=r"a\.jsonl:1: the chat template refuses these messages: 'content'"):
        documents("file:a.jsonl", tmp_path, "calibration", chat)


@pytest.mark.parametrize(
    ("able", "stored", "precision"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, "bf16"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9R14"}, torch.bfloat16, "bf16"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16, "f32"),
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16, "bf16"),
        ({"avx512_f": True}, torch.bfloat16, "f32"),
        ({"avx512_bf16": True}, torch.float16, "f32"),
    ],
)
def test_linears_multiply_in_bf16_where_the_model_is_and_the_machine_is_fast(
    able: dict[str, bool | str], stored: torch.dtype, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value.to(stored) for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_manifest(tmp_path, {"w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}"})
    path = tmp_path / "small.yaml"
    path.write_text(path.read_text("utf-8").replace("precision: f32", "precision: auto"), "utf-8")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    run = Run(manifest=manifests.load(tmp_path / "small.yaml"), out=tmp_path / "out", executor="inprocess")
    ready = plan(run)
    works = [task.work for task in ready.prepared.plan.graph.tasks.values() if task.kind == "calibrate"]
    assert [work.texts.calibration.precision for work in works if isinstance(work, Work)] == [precision] * 2
    [model] = plan_json(run, ready)["models"]
    told = "Linears multiply in bf16 where a target is calibrated" in model["notes"]
    assert told == (precision == "bf16")


def test_the_tasks_of_a_process_share_a_model_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def counted(given: attempt.Attempt, model: Model, products: torch.dtype) -> Decoder:
        made.append((model.name, model.snapshot.untied))
        return decoder_of(given, model, products)

    monkeypatch.setattr(attempt, "decoder_of", counted)
    monkeypatch.setattr(attempt, "_calibrating", {})
    for name, seed in (("model", 0), ("other", 1)):
        write_model(tmp_path / name, seed=seed)
    targets = {"gptq": "{format: parquet, scheme: INT3, method: gptq}"}
    path = write_manifest(tmp_path, targets, sources=("model", "other"))
    run = Run(manifest=manifests.load(path), out=tmp_path / "out", executor="inprocess")
    assert not convert(run, Quiet()).failures
    assert made == [("model", ""), ("other", "")]  # one for two blocks each
    targets = {"turned": "{format: parquet, scheme: INT3, method: [rotation, gptq], propagate: quantized}"}
    run = replace(run, manifest=manifests.load(write_manifest(tmp_path, targets)))
    assert not convert(run, Quiet()).failures
    assert {*made[2:]} == {("model", "lm_head.weight")}  # with a head of its own it is another model
