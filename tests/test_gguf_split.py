"""GGUF models in several files: cut and named as llama.cpp does, read by everybody, merged into the file they were."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gguf_models as tiny
from converter.containers.gguf import GGUF, header, shards
from converter.containers.gguf.merge import merge
from converter.containers.gguf.verify import broken, check_tensor
from converter.errors import NumericsError, SourceError, UnsupportedError
from llama_peer import Llama
from quantkernels import ggml
from quantkernels.ggml import TYPES
from test_run import hubmill

ENTRIES = [("a", (4, 256), "Q4_K"), ("b", (8,), "F32"), ("c", (2, 64), "Q8_0"), ("d", (3, 32), "F16")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_model(folder, "llama")  # with rope factors, which have no source in the checkpoint
    tiny.save_tokenizer(tiny.byte_level(), folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    tiny.write(model, tiny.target("Q8_0"), out)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def split(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, at most 6 tensors in a file."""
    out = tmp_path_factory.mktemp("split")
    tiny.write(model, tiny.target("Q8_0", split_tensors=6), out)
    return out


def first_of(folder: Path) -> Path:
    return min(folder.glob("*.gguf"))


# --- cuts ----------------------------------------------------------------------------------------------------------


def test_a_cut_comes_before_the_tensor_that_would_exceed_either_limit() -> None:
    sizes = [header.padded(header.size_of(shape, type)) for _, shape, type in ENTRIES]
    assert sizes == [576, 32, 160, 192]

    def cuts(**limits: Any) -> list[str]:
        wanted = {"most_tensors": None, "most_bytes": None} | limits
        return ["".join(name for name, _, _ in part) for part in shards.divide(ENTRIES, **wanted)]

    assert cuts() == ["abcd"]
    assert cuts(most_tensors=3) == ["abc", "d"]
    assert cuts(most_bytes=608) == ["ab", "cd"]
    assert cuts(most_bytes=607) == ["a", "bcd"]
    assert cuts(most_bytes=100) == ["a", "b", "c", "d"]
    assert cuts(most_tensors=2, most_bytes=200) == ["a", "bc", "d"]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    most_tensors=st.none() | st.integers(1, 31),
    most_bytes=st.none() | st.integers(1, 5000),
)
def test_no_file_exceeds_a_limit_and_no_tensor_is_lost(
    sizes: list[int], most_tensors: int | None, most_bytes: int | None
) -> None:
    entries = [(f"t{number}", (size, 32), "Q8_0") for number, size in enumerate(sizes)]
    files = shards.divide(entries, most_tensors, most_bytes)
    assert [entry for part in files for entry in part] == entries
    for part in files:
        taken = sum(header.padded(header.size_of(shape, type)) for _, shape, type in part)
        assert most_tensors is None or len(part) <= most_tensors
        assert most_bytes is None or taken <= most_bytes or len(part) == 1


def test_limits_that_nothing_exceeds_leave_one_file_with_its_plain_name(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    tiny.write(model, tiny.target("Q8_0", split_tensors=1000, split_size="100M"), tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "tiny-Q8_0.gguf" and path.read_bytes() == whole.read_bytes()


def test_a_tensor_beyond_the_size_limit_has_a_file_of_its_own_and_is_told(model: Path) -> None:
    plan = GGUF.plan(*tiny.load(model), tiny.target("F32", split_size="600K"))
    (note,) = [note for note in plan.notes if "split_size" in note]
    assert "-00002-of-00013" in note  # the embedding, 1 MB, behind the rope factors


def test_more_files_than_gguf_can_count_are_refused() -> None:
    with pytest.raises(SourceError, match="70000 files are more than"):
        shards.lay_out_files("m", {}, [(f"t{n}", (1,), "F32") for n in range(70_000)], 1, None)


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_have_the_planned_names_and_sizes_and_say_which_they_are(model: Path, split: Path) -> None:
    plan = GGUF.plan(*tiny.load(model), tiny.target("Q8_0", split_tensors=6))
    there = {path.name: path.stat().st_size for path in split.iterdir()}
    assert dict(plan.files) == there
    count = len(there)
    assert count > 3 and list(plan.files) == [f"tiny-Q8_0-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    for number, name in enumerate(plan.files):
        head = header.read_head(split / name)
        own = (head.value("split.no"), head.value("split.count"), head.value("split.tensors.count"))
        assert own == (number, count, len(plan.tensors) + 1)  # and the rope factors
        kinds = [head.fields[f"split.{key}"].kind for key in ("no", "count", "tensors.count")]
        assert kinds == [2, 2, 5]  # u16, u16, i32
        assert number == 0 or len(head.fields) == 3
        assert len(head.tensors) <= 6


def test_the_files_open_as_one_to_the_same_weights(model: Path, whole: Path, split: Path) -> None:
    _, architecture = tiny.load(model)
    together, one = GGUF.open(split, architecture), GGUF.open(whole.parent, architecture)
    assert together.names == one.names
    for name in one.names:
        assert torch.equal(together.read(name), one.read(name)) and together.stored(name) == one.stored(name)


def test_llama_cpp_computes_the_same_from_several_files_as_from_one(whole: Path, split: Path) -> None:
    prompt = list(range(300, 420))
    with Llama(whole) as reader:
        expected = reader.next_logprobs(prompt)
    with Llama(first_of(split)) as reader:
        assert reader.next_logprobs(prompt) == expected


def test_gguf_py_reads_every_file(whole: Path, split: Path) -> None:
    expected = {tensor.name: bytes(tensor.data.tobytes()) for tensor in gguf.GGUFReader(whole).tensors}
    found: dict[str, bytes] = {}
    for path in sorted(split.iterdir()):
        found |= {tensor.name: bytes(tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}
    assert found == expected


def test_what_gguf_py_splits_is_cut_where_we_cut_and_read_by_us(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "their.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 2)
    values = {f"t{number}": np.full((3, 4), number, np.float32) for number in range(5)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [shards.shard_name("their", number, 3) for number in range(3)]
    bundle = shards.open_bundle(tmp_path, shards.siblings(tmp_path / names[0]))
    ours = shards.divide([(name, (3, 4), "F32") for name in values], 2, None)
    theirs = [[name for name, piece in bundle.pieces.items() if piece.file == file] for file in names]
    assert [[name for name, _, _ in part] for part in ours] == theirs
    for name, piece in bundle.pieces.items():
        assert shards.read_rows(tmp_path, piece).numpy().view("<f4").tolist() == values[name].tolist()


# --- merge ---------------------------------------------------------------------------------------------------------


def test_merging_gives_the_bytes_of_the_file_that_was_never_split(whole: Path, split: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.gguf"
    assert merge(first_of(split), out) == out.stat().st_size
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["one.gguf"]


@pytest.mark.slow
def test_the_command_merges_and_tells_what_it_refuses(whole: Path, split: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.gguf"
    done = hubmill("merge", first_of(split), out)
    assert done.returncode == 0 and out.read_bytes() == whole.read_bytes()
    again = hubmill("merge", first_of(split), out)
    assert again.returncode == 3 and "there is a file of that name already" in again.stderr


def test_merging_never_replaces_a_file(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.gguf"
    out.write_text("mine")
    with pytest.raises(SourceError, match="there is a file of that name"):
        merge(first_of(split), out)
    assert out.read_text() == "mine"


@pytest.fixture
def copy(split: Path, tmp_path: Path) -> list[Path]:
    folder = Path(shutil.copytree(split, tmp_path / "copy"))
    return sorted(folder.iterdir())


def refused(first: Path, words: str) -> None:
    out = first.parent.parent / "one.gguf"
    with pytest.raises((SourceError, NumericsError), match=words):
        merge(first, out)
    assert not out.exists() and not list(out.parent.glob(".one*"))


def test_a_missing_file_is_named(copy: list[Path]) -> None:
    copy[2].unlink()
    refused(copy[0], f"{copy[2].name} is not there")


def test_files_of_a_model_with_a_longer_name_are_no_matter(copy: list[Path], whole: Path, tmp_path: Path) -> None:
    shutil.copy(copy[1], copy[1].with_name("tiny-Q8_0-v2-00002-of-00009.gguf"))
    merge(copy[0], tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == whole.read_bytes()


def test_a_name_that_counts_wrongly_is_refused() -> None:
    for name in ("m-00001-of-00000.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf"):
        with pytest.raises(SourceError, match="calls itself file"):
            shards.models_in([name, "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "here")


def test_another_than_the_first_file_is_refused(copy: list[Path]) -> None:
    refused(copy[1], "not the first of the files")


def test_a_file_that_is_none_of_several_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    refused(Path(shutil.copy(whole, tmp_path / "x")), "not the first of several")


def test_files_in_each_others_place_are_refused(copy: list[Path]) -> None:
    copy[1].rename(copy[1].with_suffix(".old"))
    copy[2].rename(copy[1])
    copy[1].with_suffix(".old").rename(copy[2])
    refused(copy[0], "says it is file 3 of")


def test_a_file_of_another_model_is_refused(copy: list[Path], model: Path, tmp_path: Path) -> None:
    tiny.write(model, tiny.target("Q8_0", split_tensors=7), tmp_path / "other")
    foreign = sorted((tmp_path / "other").iterdir())[1]
    shutil.copy(foreign, copy[1])
    refused(copy[0], "says it is file 2 of|both hold|together the files hold")


def test_a_truncated_file_is_refused(copy: list[Path]) -> None:
    copy[1].write_bytes(copy[1].read_bytes()[:-3000])
    refused(copy[0], "behind the end of the file|ends inside")


def test_a_scale_that_is_no_number_is_found(copy: list[Path]) -> None:
    head = header.read_head(copy[1])
    stored = next(stored for stored in head.tensors.values() if stored.type == "Q8_0")
    data = bytearray(copy[1].read_bytes())
    at = head.data_start + stored.offset + 5 * 34
    data[at : at + 2] = struct.pack("<e", float("nan"))
    copy[1].write_bytes(data)
    refused(copy[0], f"{stored.name}: block 5 of Q8_0")


def test_an_artifact_that_lacks_a_file_does_not_open(copy: list[Path], model: Path) -> None:
    copy[-1].unlink()
    with pytest.raises(SourceError, match="is not there"):
        GGUF.open(copy[0].parent, tiny.load(model)[1])


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_blocks_that_decode_to_numbers_pass_and_all_others_are_found(type: str) -> None:
    size_bytes = TYPES[type].size_bytes
    raw = np.random.default_rng(7).integers(0, 256, (4096, size_bytes), np.uint8)
    if type in ("MXFP4", "F32", "BF16"):  # whose broken values are rare among random bytes
        raw[::9, 0 if type == "MXFP4" else slice(size_bytes - 2, None)] = 0xFF
    found = broken(raw, type)
    with np.errstate(all="ignore"):
        finite = np.isfinite(ggml.dequantize(raw, type)).all(1)
    assert found.any() == (type != "NVFP4") and not found.all()
    assert finite[~found].all(), "a block that cannot be computed with passed"
    # Infinity times a code of zero is NaN too, so nothing is found without reason. An exponent of MXFP4 is one
    # only with its largest codes.
    assert type == "MXFP4" or not finite[found].any()


def test_a_damaged_block_is_found_in_the_chunk_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.containers.gguf.verify.CHUNK_BYTES", 3 * 18)
    raw = np.zeros((11, 18), np.uint8)
    raw[10, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    (tmp_path / "f").write_bytes(bytes(7) + raw.tobytes())
    (stored,) = header.place([("w", (11, 32), "Q4_0")])
    with pytest.raises(NumericsError, match="w: block 10 of Q4_0"):
        check_tensor(tmp_path, shards.Piece(file="f", start=7, stored=stored))


# --- metadata ------------------------------------------------------------------------------------------------------


def fields_with(model: Path, tmp_path: Path, **values: Any) -> header.Head:
    given = {key.replace("__", "."): value for key, value in values.items()}
    tiny.write(model, tiny.target("Q8_0", metadata=given), tmp_path)
    return header.read_head(next(tmp_path.iterdir()))


def test_a_key_that_is_there_keeps_its_kind_and_a_new_one_gets_the_narrowest_that_llama_cpp_writes(
    model: Path, tmp_path: Path
) -> None:
    wanted = {
        "general__name": "Another",
        "llama__context_length": 4096,
        "llama__rope__freq_base": 500000,
        "tokenizer__ggml__add_bos_token": True,
        "my__text": "ü",
        "my__count": 7,
        "my__negative": -7,
        "my__large": 1 << 40,
        "my__share": 0.5,
        "my__flag": False,
    }
    head = fields_with(model, tmp_path, **wanted)
    kinds = {key: gguf.GGUFValueType(head.fields[key.replace("__", ".")].kind).name for key in wanted}
    assert {key: head.value(key.replace("__", ".")) for key in wanted} == wanted
    assert kinds == {
        "general__name": "STRING",
        "llama__context_length": "UINT32",
        "llama__rope__freq_base": "FLOAT32",
        "tokenizer__ggml__add_bos_token": "BOOL",
        "my__text": "STRING",
        "my__count": "UINT32",
        "my__negative": "INT32",
        "my__large": "UINT64",
        "my__share": "FLOAT32",
        "my__flag": "BOOL",
    }
    assert gguf.GGUFReader(next(tmp_path.iterdir())).get_field("my.negative").contents() == -7


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 3, "would contradict .* and the file has 2"),
        ("llama.attention.head_count_kv", 8, "would contradict"),
        ("llama.vocab_size", 5, "would contradict"),
        ("tokenizer.ggml.tokens", "a", "would contradict .* has a list there"),
        ("hubmill.source.commit", "0", "tells where the file is from"),
        ("quantize.imatrix.file", "x", "tells where the file is from"),
        ("llama.context_length", -1, "stored as uint32, which -1 is not"),
        ("llama.context_length", 1.5, "stored as uint32"),
        ("llama.context_length", True, "stored as uint32"),
        ("llama.rope.freq_base", "big", "stored as float32"),
        ("general.name", 5, "stored as string"),
        ("tokenizer.ggml.add_bos_token", 1, "stored as bool"),
    ],
)
def test_metadata_that_would_contradict_the_file_is_refused_in_the_plan(
    model: Path, key: str, value: Any, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        GGUF.plan(*tiny.load(model), tiny.target("Q8_0", metadata={key: value}))


def test_saying_what_is_so_anyway_is_no_contradiction(model: Path) -> None:
    same = {"llama.block_count": 2, "general.type": "model"}
    plain = GGUF.plan(*tiny.load(model), tiny.target("Q8_0"))
    assert GGUF.plan(*tiny.load(model), tiny.target("Q8_0", metadata=same)).files == plain.files
