"""GGUF as a source: other types, the rest as it was, the bytes of llama-quantize, and nothing rounded twice unasked."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gguf_models as tiny
import quantize_peer
from converter import manifest as manifests
from converter.containers import ArtifactPlan
from converter.containers.gguf import GGUF, coverage, header, shards
from converter.containers.gguf.imatrix import Sums, write_imatrix
from converter.containers.gguf.mixture import MIXTURES
from converter.errors import NumericsError, SourceError, UnsupportedError
from converter.hub import fetch, resolve
from converter.manifest import Target
from converter.source import Snapshot, open_folder
from converter.tensor_file import load
from hub_server import HubServer, hub_server
from jobs import stream
from jobs.convert import Refused, Run, convert
from llama_peer import Llama
from requantize_peer import requantize
from test_run import Quiet

__all__ = ["hub_server"]  # a fixture
PROMPT = list(range(300, 420))


def convert_file(folder: Path, wanted: Target, out: Path) -> ArtifactPlan:
    """Convert the GGUF model in `folder` to `wanted` inside `out`, as a run does it."""
    snapshot = open_folder(folder, "the test's model")
    plan = GGUF.plan(snapshot, None, wanted)
    weighing = coverage.weighing_of(wanted)
    importance = coverage.importance_of(weighing, plan.tensors, lambda name, what: None) if weighing else {}
    parts = {
        tensor.name: out.parent / f"{out.name}.parts" / f"{n}.safetensors" for n, tensor in enumerate(plan.tensors)
    }
    next(iter(parts.values())).parent.mkdir(parents=True)
    stream.round_tensors(snapshot, plan.tensors, importance, parts, "test", lambda share: None)
    out.mkdir()
    GGUF.write(plan, snapshot, None, wanted, lambda name: load(parts[name]), out)
    return plan


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, by gguf-py."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny.save_model(folder, "llama")
    tiny.save_tokenizer(tiny.byte_level(), folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return folder


@pytest.fixture(scope="module")
def source(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as one F32 file."""
    out = tmp_path_factory.mktemp("source") / "tiny"
    tiny.write(model, tiny.target("F32"), out)
    return out


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def imatrix(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(1)
    sums = {
        name: Sums(sum_squares=torch.rand(1, stored.shape[-1], generator=random) * 512, counts=torch.tensor([512]))
        for name, stored in header.read_head(only(source)).tensors.items()
        if name.startswith("blk.") and len(stored.shape) > 1
    }
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    write_imatrix(path, sums, ["wiki.txt"], 3, 512)
    return path


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M", "F16"])
def test_a_gguf_file_becomes_what_its_checkpoint_becomes(model: Path, source: Path, type: str, tmp_path: Path) -> None:
    convert_file(source, tiny.target(type), tmp_path / "out")
    tiny.write(model, tiny.target(type), tmp_path / "direct")
    ours, direct = only(tmp_path / "out"), only(tmp_path / "direct")
    assert ours.name == direct.name == f"tiny-{type}.gguf"
    assert contents(ours) == contents(direct)
    ignored = {"hubmill.source.repo", "hubmill.source.commit", "general.name"}
    fields, expected = header.read_head(ours).fields, header.read_head(direct).fields
    assert {k: v for k, v in fields.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("type", ["Q4_K_M", "Q5_K_S", "Q4_0", "Q2_K", "Q8_0", "BF16"])
def test_the_tensors_are_those_of_llama_quantize_byte_for_byte(
    source: Path, imatrix: Path, type: str, weighed: bool, tmp_path: Path
) -> None:
    if quantize_peer.library_folder() is None:
        pytest.skip("no libllama here: make peers")
    opened = coverage.weighing_of(tiny.target(type, imatrix=str(imatrix)))
    assert opened is not None
    shapes = {name: stored.shape for name, stored in header.read_head(only(source)).tensors.items()}
    means = {name: opened.imatrix.importance(name, shapes[name])[0].numpy() for name in opened.imatrix.entries}
    said = requantize(only(source), tmp_path / "theirs.gguf", MIXTURES[type].number, means if weighed else None)
    assert said == ""
    convert_file(source, tiny.target(type, imatrix=str(imatrix) if weighed else False), tmp_path / "out")
    assert contents(only(tmp_path / "out")) == contents(tmp_path / "theirs.gguf")


def test_llama_cpp_runs_the_result(source: Path, tmp_path: Path) -> None:
    convert_file(source, tiny.target("F16"), tmp_path / "out")
    with Llama(only(source)) as reader:
        expected = reader.next_logprobs(PROMPT)
    with Llama(only(tmp_path / "out")) as reader:
        found = reader.next_logprobs(PROMPT)
    assert set(found) == set(expected)
    # Weights in f16 err by 2^-12 of their size; a logit sums 256 of them in each of 15 products.
    assert max(abs(found[token] - expected[token]) for token in expected) < 0.02


def test_tokenizer_and_hyper_parameters_are_the_sources_own(source: Path, tmp_path: Path) -> None:
    changed = {"general.file_type", "general.quantization_version", "general.name"}
    convert_file(source, tiny.target("Q8_0", metadata={"general.name": "Mine"}), tmp_path / "out")
    before, after = header.read_head(only(source)).fields, header.read_head(only(tmp_path / "out")).fields
    same = {key for key in before if not key.startswith("hubmill.")} - changed
    assert len(same) > 20 and {key: after[key] for key in same} == {key: before[key] for key in same}
    assert after["general.file_type"].value == 7 and after["general.name"].value == "Mine"


def write_unknown(path: Path, experts: int = 3, **more: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """A file of a family that nobody knows, with experts, small matrices, whole numbers and another alignment."""
    random = np.random.default_rng(3)
    tensors: dict[str, NDArray[Any]] = {
        "token_embd.weight": random.standard_normal((64, 256), np.float32),
        "blk.0.ffn_up_exps.weight": random.standard_normal((experts, 16, 256), np.float32),
        "blk.0.ffn_gate_inp.weight": random.standard_normal((experts, 256), np.float32),
        "blk.0.attn_norm.weight": random.standard_normal(256, np.float32),
        "blk.0.table.weight": np.arange(512, dtype=np.int32).reshape(2, 256),
        "blk.1.beyond_norm.weight": random.standard_normal(256, np.float32),  # block_count is 1
        **more,
    }
    writer = gguf.GGUFWriter(path, "frobnicate")
    writer.add_custom_alignment(64)
    writer.add_uint32("frobnicate.block_count", 1)
    writer.add_uint32("frobnicate.expert_count", experts)
    writer.add_array("frobnicate.attention.head_count", [4, 4])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return tensors


def test_a_family_that_nobody_knows_is_converted_with_its_experts_each_weighed_by_itself(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = write_unknown(tmp_path / "in" / "model.gguf")
    name = "blk.0.ffn_up_exps.weight"
    squares = torch.rand(3, 256, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {name: Sums(sum_squares=squares * 9, counts=torch.tensor([9, 9, 0]))}, [], 1, 9)
    convert_file(tmp_path / "in", tiny.target("Q4_K_M", imatrix=str(path)), tmp_path / "out")
    out = only(tmp_path / "out")
    found = contents(out)
    types = {key: type for key, (type, _) in found.items()}
    assert types == {
        "token_embd.weight": "Q6_K",  # it serves as the head
        name: "Q4_K",
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.table.weight": "I32",
        "blk.1.beyond_norm.weight": "F32",
    }
    for key in ("blk.0.ffn_gate_inp.weight", "blk.0.table.weight"):
        assert found[key][1] == tensors[key].tobytes()
    from quantkernels import ggml

    means = squares.numpy() * np.float32(9) / np.float32(9)
    means[2] = 1
    blocks = b"".join(ggml.quantize(tensors[name][e], "Q4_K", means[e]).tobytes() for e in range(3))
    assert found[name][1] == blocks
    head = header.read_head(out)
    assert head.get("general.alignment") is None and head.value("frobnicate.attention.head_count") == (4, 4)
    opened = GGUF.open(tmp_path / "out", None)
    assert torch.equal(opened.read("blk.0.table.weight"), torch.from_numpy(tensors["blk.0.table.weight"]).float())


def test_slabs_change_no_byte(source: Path, imatrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_unknown(tmp_path / "in.gguf")
    for number, folder in enumerate((source, tmp_path)):
        wanted = tiny.target("Q4_K_M", imatrix=str(imatrix) if folder == source else False)
        monkeypatch.setattr("jobs.stream.SLAB_WEIGHTS", 1 << 22)
        convert_file(folder, wanted, tmp_path / f"whole{number}")
        monkeypatch.setattr("jobs.stream.SLAB_WEIGHTS", 7 * 256)
        convert_file(folder, wanted, tmp_path / f"slabs{number}")
        assert contents(only(tmp_path / f"slabs{number}")) == contents(only(tmp_path / f"whole{number}"))


# --- twice ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "tiny"
    tiny.write(model, tiny.target("Q4_K_M"), out)
    return out


def plan(folder: Path, type: str, **more: Any) -> ArtifactPlan:
    return GGUF.plan(open_folder(folder, "test"), None, tiny.target(type, **more))


@pytest.mark.parametrize("type", ["Q8_0", "Q2_K", "F16"])
def test_quantized_weights_are_not_rounded_again_unasked(quantized: Path, type: str) -> None:
    with pytest.raises(UnsupportedError, match=r"are quantized already \(.* x Q4_K, .* x Q6_K\).*requantize: true"):
        plan(quantized, type)
    (note,) = plan(quantized, type, requantize=True).notes
    assert "quantized already" in note and not note.endswith(".")


def test_what_has_its_type_already_is_copied_byte_by_byte(quantized: Path, tmp_path: Path) -> None:
    convert_file(quantized, tiny.target("Q4_K_M", split_tensors=9), tmp_path / "out")
    bundle = shards.open_bundle(tmp_path / "out", shards.siblings(min((tmp_path / "out").iterdir())))
    for name, (type, data) in contents(only(quantized)).items():
        piece = bundle.pieces[name]
        assert piece.stored.type == type and shards.read_rows(tmp_path / "out", piece).numpy().tobytes() == data


def test_rounding_again_gives_what_llama_quantize_gives(quantized: Path, tmp_path: Path) -> None:
    if quantize_peer.library_folder() is None:
        pytest.skip("no libllama here: make peers")
    theirs = tmp_path / "theirs.gguf"
    assert requantize(only(quantized), theirs, MIXTURES["Q5_K_M"].number) != ""
    assert requantize(only(quantized), theirs, MIXTURES["Q5_K_M"].number, allow=True) == ""
    convert_file(quantized, tiny.target("Q5_K_M", requantize=True), tmp_path / "out")
    assert contents(only(tmp_path / "out")) == contents(theirs)


# --- which files ---------------------------------------------------------------------------------------------------


def test_a_source_in_several_files_is_one_source(model: Path, source: Path, tmp_path: Path) -> None:
    tiny.write(model, tiny.target("F32", split_tensors=5), tmp_path / "tiny")
    assert len(open_folder(tmp_path / "tiny", "test").gguf) > 3
    convert_file(tmp_path / "tiny", tiny.target("Q8_0"), tmp_path / "several")
    convert_file(source, tiny.target("Q8_0"), tmp_path / "one")
    assert contents(only(tmp_path / "several")) == contents(only(tmp_path / "one"))
    max((tmp_path / "tiny").iterdir()).unlink()
    with pytest.raises(SourceError, match="is not there"):
        open_folder(tmp_path / "tiny", "test")


def test_what_is_no_model_is_passed_over_and_the_unquantized_one_taken(
    source: Path, quantized: Path, imatrix: Path, tmp_path: Path
) -> None:
    for path in (only(source), only(quantized), imatrix):
        shutil.copy(path, tmp_path)
    assert open_folder(tmp_path, "test").gguf == (only(source).name,)
    shutil.copy(only(source), tmp_path / "another.gguf")
    with pytest.raises(SourceError, match=r"are of 2 models: another\.gguf, tiny-F32\.gguf"):
        open_folder(tmp_path, "test")
    for path in tmp_path.glob("*F32*"):
        path.unlink()
    (tmp_path / "another.gguf").unlink()
    assert open_folder(tmp_path, "test").gguf == (only(quantized).name,)
    (tmp_path / only(quantized).name).unlink()
    with pytest.raises(SourceError, match=r"no \.gguf file is a model: imatrix\.gguf"):
        open_folder(tmp_path, "test")


@pytest.mark.parametrize("kept", [0, 10, 2000, -3000])
def test_a_source_that_was_cut_short_is_refused(source: Path, kept: int, tmp_path: Path) -> None:
    data = only(source).read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:kept] if kept >= 0 else data[: len(data) + kept])
    with pytest.raises(SourceError, match=r"m\.gguf"):
        open_folder(tmp_path, "test")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": ("gptq",)}, "not run, and gptq needs to see it run"),
        ({"imatrix": True}, "no imatrix can be collected"),
    ],
)
def test_what_needs_a_run_of_the_model_is_refused(source: Path, more: Mapping[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        plan(source, "Q4_K_M", **more)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M"])
def test_weights_or_scales_that_are_no_numbers_are_refused_by_name(
    source: Path, quantized: Path, type: str, tmp_path: Path
) -> None:
    """A weight of the F32 source, and a scale of the quantized one, which would be copied."""
    origin = source if type == "Q8_0" else quantized
    folder = Path(shutil.copytree(origin, tmp_path / "in"))
    head = header.read_head(only(folder))
    stored = head.tensors["blk.1.ffn_up.weight"]
    data = bytearray(only(folder).read_bytes())
    at = head.data_start + stored.offset
    data[at : at + 4] = struct.pack("<f" if type == "Q8_0" else "<ee", *([float("nan")] * (1 if type == "Q8_0" else 2)))
    only(folder).write_bytes(data)
    with pytest.raises(NumericsError, match=r"blk\.1\.ffn_up\.weight"):
        convert_file(folder, tiny.target(type), tmp_path / "out")


# --- runs ----------------------------------------------------------------------------------------------------------


def manifest(folder: Path, source: Path, targets: Mapping[str, str], out: str = "out") -> Run:
    lines = ["name: again", "models:", f"  - source: folder:{source}", "targets:"]
    lines += [f"  {name}: {text}" for name, text in targets.items()]
    path = folder / "again.yaml"
    path.write_text("\n".join(lines) + "\n")
    return Run(manifest=manifests.load(path), out=folder / out, executor="inprocess")


def test_a_run_converts_measures_and_resumes(source: Path, imatrix: Path, tmp_path: Path) -> None:
    shutil.copy(imatrix, tmp_path / "i.gguf")
    targets = {
        "q8": "{format: gguf, type: Q8_0}",
        "q4": "{format: gguf, type: Q4_K_M, imatrix: i.gguf, split_size: 500K}",
    }
    run = manifest(tmp_path, source, targets)
    result = convert(run, Quiet())
    assert result.failures == () and result.exit_code == 0
    rows = {row["target"]: row for row in result.rows}
    for row in rows.values():
        assert row["status"] == "done" and row["output"] == {} and 0.99 < row["weight"]["cosine"] < 1
        assert row["source"]["parameters"] > 1e6
    assert rows["q8"]["weight"]["relative_mse"] < 1e-4 < rows["q4"]["weight"]["relative_mse"]
    files = [item["path"] for item in rows["q4"]["files"] if item["path"].endswith(".gguf")]
    notes = rows["q4"]["notes"]
    assert notes["output.weight"] == "no entry in the imatrix: rounded without importance"
    assert set(notes) == {"output.weight", "token_embd.weight"}
    assert len(files) > 2 and files[0].endswith(f"-00001-of-{len(files):05d}.gguf")
    assert not list(run.store.run.glob("*/imatrix.gguf"))
    assert convert(run, Quiet()).tasks_run == 0
    first = files[0]
    before = (run.store.run / "tiny" / "q4" / first).read_bytes()
    squares = torch.rand(1, 256, generator=torch.Generator().manual_seed(9))
    opened = coverage.weighing_of(run.manifest.jobs()[1].target)
    assert opened is not None
    sums = {name: opened.imatrix.read(name) for name in opened.imatrix.entries}
    sums["blk.0.attn_q.weight"] = Sums(sum_squares=squares, counts=torch.ones(1))
    write_imatrix(tmp_path / "i.gguf", sums, ["wiki.txt"], 3, 512)
    again = convert(run, Quiet())
    assert again.failures == () and 0 < again.tasks_run < result.tasks_run
    assert (run.store.run / "tiny" / "q4" / first).read_bytes() != before


def test_a_run_covers_blocks_that_the_metadata_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    write_unknown(tmp_path / "odd" / "model.gguf")
    run = manifest(tmp_path, tmp_path / "odd", {"q8": "{format: gguf, type: Q8_0}"})
    assert convert(run, Quiet()).failures == ()


def test_other_formats_are_refused_with_a_sentence(source: Path, tmp_path: Path) -> None:
    run = manifest(tmp_path, source, {"int8": "{format: parquet, scheme: INT8}"})
    with pytest.raises(
        Refused, match="the source is GGUF, which becomes GGUF of other types, and this target is parquet"
    ):
        convert(run, Quiet())
    assert not run.store.run.exists() or not any(run.store.run.glob("*/*"))


def test_an_imatrix_that_changes_under_a_run_is_noticed(source: Path, imatrix: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(imatrix, tmp_path / "i.gguf"))
    wanted = tiny.target("Q4_K_M", imatrix=str(path))
    planned = GGUF.plan(open_folder(source, "test"), None, wanted)
    path.write_bytes(path.read_bytes()[:-4] + b"\1\0\0\0")
    weighing = coverage.weighing_of(wanted)
    assert weighing is not None
    with pytest.raises(SourceError, match="changed since planning"):
        coverage.check_unchanged(weighing, planned.imatrix_sha256)


def test_a_snapshot_of_gguf_crosses_processes_small(source: Path) -> None:
    """Tasks carry it; the vocabulary stays in the file."""
    import pickle

    snapshot = open_folder(source, "test")
    assert isinstance(snapshot, Snapshot) and len(pickle.dumps(snapshot)) < 20_000
    assert json.loads(json.dumps(snapshot.config)) == {"architectures": [], "num_hidden_layers": 2}


# --- hubs ----------------------------------------------------------------------------------------------------------


def test_a_source_on_a_hub_is_planned_from_its_first_bytes(
    source: Path, hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.hub.GGUF_FIRST_READ_BYTES", 1000)  # so that it has to ask several times
    data = only(source).read_bytes()
    write_imatrix(tmp_path / "i.gguf", {"x": Sums(sum_squares=torch.ones(1, 1), counts=torch.ones(1))}, [], 1, 1)
    hub_server.add("owner/tiny", {"tiny-F32.gguf": data, "imatrix.gguf": (tmp_path / "i.gguf").read_bytes()})
    wanted = tiny.target("Q8_0")
    snapshot = resolve("hub:owner/tiny", tmp_path / "cache", "test", endpoint=hub_server.url)
    planned = GGUF.plan(snapshot, None, wanted)
    assert sum(request.sent for request in hub_server.requests("GET", r"tiny-F32\.gguf$")) < len(data) / 4
    assert not list(snapshot.folder.rglob("*.gguf"))
    local = GGUF.plan(open_folder(source, "test"), None, wanted)
    assert planned.tensors == local.tensors
    fetched = fetch(snapshot, tmp_path / "cache", "test", endpoint=hub_server.url)
    assert torch.equal(fetched.read("output.weight"), open_folder(source, "test").read("output.weight"))
    assert not (fetched.folder / "imatrix.gguf").exists()
    assert GGUF.plan(fetched, None, wanted) == planned
