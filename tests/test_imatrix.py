"""imatrix files: both forms read as llama.cpp reads them, damage refused, gaps mended and told, coverage planned."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf_models as tiny
from converter.architecture import Tap
from converter.containers.gguf import GGUF, coverage, header
from converter.containers.gguf.imatrix import Imatrix, Sums, mended, open_imatrix, write_imatrix
from converter.errors import SourceError, UnsupportedError
from converter.manifest import Rule
from converter.methods import Block
from converter.methods.rtn import DARK, importance_of
from converter.stats import TapStats

Q = "blk.0.attn_q.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"


def write_theirs(path: Path, entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
    """A file as llama-imatrix lays it out, by gguf-py."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # llama-imatrix names no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 10)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums).astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.reshape(-1, 1).astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


def legacy(entries: Mapping[str, tuple[int, NDArray[np.float32]]], chunks: int = 10, text: str = "wiki.txt") -> bytes:
    """A file in the older form: means times the number of calls."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)) + values.tobytes()
    return data + struct.pack("<ii", chunks, len(text)) + text.encode()


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# --- reading -------------------------------------------------------------------------------------------------------


def test_sums_become_means_over_the_rows_of_each_matrix_and_one_where_no_row_came(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    experts = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    write_theirs(path, {Q: (f32(1, 2, 3, 10), f32(4)), EXPERTS: (experts, f32(2, 0, 3))})
    opened = open_imatrix(path)
    assert (opened.datasets, opened.chunks, opened.chunk_size, opened.legacy) == (
        ("wiki.txt", "more.txt"),
        10,
        512,
        False,
    )
    means, said = opened.importance(Q, (8, 4))
    assert torch.equal(means, torch.tensor([[1, 2, 3, 10.0]]) / 4) and said == ""
    means, _ = opened.importance(EXPERTS, (3, 8, 4))
    divided = experts / f32(2, 1, 3)[:, None]
    divided[1] = 1
    assert torch.equal(means, torch.from_numpy(divided))


def test_the_older_form_is_divided_by_its_calls_for_all_experts_alike(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({Q: (4, f32(1, 2, 3, 10)), EXPERTS: (2, f32(*range(1, 13)))}))
    opened = open_imatrix(path)
    assert (opened.datasets, opened.chunks, opened.chunk_size, opened.legacy) == (("wiki.txt",), 10, 0, True)
    assert torch.equal(opened.importance(Q, (8, 4))[0], torch.tensor([[1, 2, 3, 10.0]]) / 4)
    assert torch.equal(opened.importance(EXPERTS, (3, 8, 4))[0], torch.arange(1.0, 13).reshape(3, 4) / 2)


def test_the_older_form_without_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({Q: (1, f32(1, 2))})[: -8 - len("wiki.txt")])
    opened = open_imatrix(path)
    assert (opened.datasets, opened.chunks) == ((), 0) and set(opened.entries) == {Q}


def test_what_we_write_is_read_back_and_by_gguf_py(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    experts = torch.rand(3, 4, dtype=torch.float64)
    sums = {
        Q: Sums(sum_squares=torch.rand(1, 4), counts=torch.tensor([7])),
        EXPERTS: Sums(sum_squares=experts, counts=torch.tensor([5, 0, 2])),
    }
    write_imatrix(path, sums, ["builtin"], 4, 128)
    opened = open_imatrix(path)
    for name, entry in sums.items():
        read = opened.read(name)
        assert (
            torch.equal(read.sum_squares, entry.sum_squares.float()) and read.counts.tolist() == entry.counts.tolist()
        )
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert theirs[f"{EXPERTS}.in_sum2"].shape == (3, 4) and theirs[f"{EXPERTS}.counts"].shape == (3, 1)


def test_columns_never_lit_keep_a_millionth_and_what_is_no_number_the_mean() -> None:
    means = torch.tensor([[2.0, 0.0, 4.0, float("nan"), -1.0, float("inf")], [1.0, 1, 1, 1, 1, 1]])
    found, said = mended(means)
    assert found[0].tolist() == [2.0, pytest.approx(3 * DARK), 4.0, 3.0, 3.0, 3.0]
    assert torch.equal(found[1], means[1])
    assert "1 of 12 columns were never lit" in said and "3 of 12 values are negative or no numbers" in said


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e-38, -1.0])
def test_a_matrix_without_a_usable_value_weighs_all_columns_alike(value: float) -> None:
    found, said = mended(torch.tensor([[value, 0.0, value]]))
    assert found.tolist() == [[1, 1, 1]] and said


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40))
def test_whatever_a_file_holds_becomes_importance_that_kernels_take(values: list[float]) -> None:
    means = torch.tensor([values], dtype=torch.float32)
    found, said = mended(means)
    assert bool(torch.isfinite(found).all()) and bool((found > 0).all())
    usable = torch.isfinite(means) & (means > 0)
    assert bool((said == "") == usable.all())
    assert said or torch.equal(found, means)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends where the number of entries"),
        (b"this is a text file, not an imatrix\n" * 9, "claims .* bytes"),
        (struct.pack("<i", 0), "it has 0 entries"),
        (struct.pack("<ii", 1, -5), "claims -5 bytes"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<ii", 1, 1), "not UTF-8"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 30), "a claims 1073741824 values"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0), "a claims 0 values"),
        (legacy({Q: (1, f32(1))})[:-3], "the name of the data set claims"),
        (struct.pack("<i", 1 << 30) + legacy({Q: (1, f32(1))})[4:30], "ends where the count of"),
    ],
)
def test_a_damaged_older_file_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(SourceError, match=words):
        open_imatrix(tmp_path / "i.dat")


def test_a_gguf_file_that_is_no_imatrix_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    imatrix = {"general.type": header.string("imatrix")}

    def refused(words: str, tensors: Mapping[str, tuple[tuple[int, ...], bytes]], type: str = "F32") -> None:
        placed = header.place([(name, shape, type) for name, (shape, _) in tensors.items()])
        data = b"".join(content.ljust(header.padded(len(content)), b"\0") for _, content in tensors.values())
        path.write_bytes(header.compose(imatrix, placed) + data)
        with pytest.raises(SourceError, match=words):
            open_imatrix(path)

    one = f32(1).tobytes()
    refused("has no entry", {})
    refused("x does not have sums and counts", {"x.in_sum2": ((1, 1), one)})
    refused("x does not have sums and counts", {"x.counts": ((1, 1), one)})
    refused("x has 3 sums for 2 counts", {"x.in_sum2": ((1, 3), 3 * one), "x.counts": ((2, 1), 2 * one)})
    for wrong in (-1, np.nan, np.inf):
        refused("a count that is none", {"x.in_sum2": ((1, 1), one), "x.counts": ((1, 1), f32(wrong).tobytes())})
    imatrix = {"general.type": header.string("model")}
    refused("of the type 'model', not an imatrix", {"x.in_sum2": ((1, 1), one), "x.counts": ((1, 1), one)})
    with pytest.raises(SourceError, match="cannot be read"):
        open_imatrix(tmp_path / "absent")


@given(at=st.integers(0, 400), value=st.integers(0, 255), older=st.booleans())
def test_a_flipped_byte_is_refused_or_read_but_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, older: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    if older:
        data = bytearray(legacy({Q: (4, f32(*range(40))), EXPERTS: (2, f32(*range(12)))}))
    else:
        write_imatrix(path, {Q: Sums(sum_squares=torch.rand(2, 8), counts=torch.tensor([1, 2]))}, ["d"], 1, 2)
        data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(SourceError):
        opened = open_imatrix(path)
        for name, entry in opened.entries.items():
            assert opened.read(name).sum_squares.numel() == entry.values


# --- coverage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_model(folder, "qwen3")
    tiny.save_tokenizer(tiny.byte_level(), folder)
    return folder


def cover(model: Path, path: Path, without: str = "", longer: str = "") -> Path:
    """An imatrix file for the linears of the blocks, random; `without` one, or with one too long."""
    plan = GGUF.plan(*tiny.load(model), tiny.target("F16"))
    random = torch.Generator().manual_seed(0)
    sums = {
        tensor.name: Sums(
            sum_squares=torch.rand(1, tensor.shape[-1] + (tensor.name == longer), generator=random) * 512,
            counts=torch.tensor([512]),
        )
        for tensor in plan.tensors
        if tensor.block is not None and len(tensor.shape) > 1 and tensor.name != without
    }
    write_imatrix(path, sums, ["/data/wiki.txt"], 12, 512)
    return path


def test_a_file_that_covers_the_blocks_is_enough_for_every_type(model: Path, tmp_path: Path) -> None:
    path = cover(model, tmp_path / "i.gguf")
    plan = GGUF.plan(*tiny.load(model), tiny.target("IQ2_XS", imatrix=str(path)))
    assert len(plan.imatrix_sha256) == 64
    assert any("does not cover output.weight, token_embd.weight" in note for note in plan.notes)


def test_a_missing_entry_is_refused_where_the_type_needs_it_and_noted_otherwise(model: Path, tmp_path: Path) -> None:
    path = cover(model, tmp_path / "i.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_up\.weight is to be stored as IQ2_XXS.*has no entry"):
        GGUF.plan(*tiny.load(model), tiny.target("IQ2_XXS", imatrix=str(path)))
    plan = GGUF.plan(*tiny.load(model), tiny.target("Q4_K_M", imatrix=str(path)))
    assert any("i.gguf does not cover blk.1.ffn_up.weight" in note for note in plan.notes)
    rules = (Rule(pattern="blk.1.ffn_up", type="Q8_0"),)
    GGUF.plan(*tiny.load(model), tiny.target("IQ2_XXS", imatrix=str(path), rules=rules))


def test_an_imatrix_of_another_model_is_refused_whatever_the_type(model: Path, tmp_path: Path) -> None:
    path = cover(model, tmp_path / "i.gguf", longer="blk.0.attn_k.weight")
    with pytest.raises(SourceError, match=r"blk\.0\.attn_k\.weight: the imatrix has 257 values .* it has 256 columns"):
        GGUF.plan(*tiny.load(model), tiny.target("Q4_K_M", imatrix=str(path)))
    write_imatrix(path, {"blk.9.x.weight": Sums(sum_squares=torch.ones(1, 2), counts=torch.ones(1))}, [], 1, 1)
    with pytest.raises(SourceError, match="of another model"):
        GGUF.plan(*tiny.load(model), tiny.target("Q4_K_M", imatrix=str(path)))


def test_types_that_need_importance_are_refused_without_any_and_for_the_head(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XS, which needs importance, and the target has no imatrix"):
        GGUF.plan(*tiny.load(model), tiny.target("IQ2_XS"))
    GGUF.plan(*tiny.load(model), tiny.target("IQ2_XS", imatrix=True))
    rules = (Rule(pattern="lm_head", type="IQ2_XS"),)
    with pytest.raises(UnsupportedError, match=r"output\.weight is to be .* calibration sees the linears"):
        GGUF.plan(*tiny.load(model), tiny.target("Q4_K_M", imatrix=True, rules=rules))


def test_the_file_says_where_its_importance_is_from_as_llama_quantize_does(model: Path, tmp_path: Path) -> None:
    path = cover(model, tmp_path / "my.imatrix")
    tiny.write(model, tiny.target("Q4_K_M", imatrix=str(path)), tmp_path / "out")
    head = header.read_head(next((tmp_path / "out").iterdir()))
    found = {key.removeprefix("quantize.imatrix."): head.value(key) for key in head.fields if "imatrix" in key}
    assert found == {"file": "my.imatrix", "dataset": "/data/wiki.txt", "entries_count": 14, "chunks_count": 12}


def test_long_texts_are_cut_as_llama_quantize_cuts_them(tmp_path: Path) -> None:
    imatrix = Imatrix(path=Path("ü" * 100), entries={}, datasets=("x" * 200,), chunks=0)
    fields = coverage.weighing_fields(coverage.Weighing(imatrix=imatrix, sha256=""))
    assert fields["quantize.imatrix.file"].value == "ü" * 63 and fields["quantize.imatrix.dataset"].value == "x" * 127
    assert "quantize.imatrix.chunks_count" not in fields


def test_each_expert_of_a_checkpoint_is_weighed_by_its_own_row(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    tiny.save_model(folder, "qwen3_moe")
    tiny.save_tokenizer(tiny.byte_level(), folder)
    plan = GGUF.plan(*tiny.load(folder), tiny.target("Q4_K_M"))
    stacks = {tensor.stack for tensor in plan.tensors if tensor.stack}
    assert len(stacks) == 6
    sums = {stack: Sums(sum_squares=torch.rand(5, 256) + 0.1, counts=torch.tensor([1, 1, 0, 1, 1])) for stack in stacks}
    sums |= {
        tensor.name: Sums(sum_squares=torch.rand(1, tensor.shape[-1]), counts=torch.ones(1))
        for tensor in plan.tensors
        if tensor.block is not None and len(tensor.shape) > 1 and not tensor.stack
    }
    write_imatrix(tmp_path / "i.gguf", sums, [], 1, 1)
    wanted = tiny.target("Q4_K_M", imatrix=str(tmp_path / "i.gguf"))
    plan = GGUF.plan(*tiny.load(folder), wanted)
    weighing = coverage.weighing_of(wanted)
    assert weighing is not None
    block = [tensor for tensor in plan.tensors if tensor.block == 1]
    found = coverage.importance_of(weighing, block, lambda name, what: None)
    stack = "blk.1.ffn_up_exps.weight"
    for expert in range(5):
        expected = torch.ones(256) if expert == 2 else sums[stack].sum_squares[expert]
        assert torch.equal(found[f"{stack}[{expert}]"], expected)
    assert found["blk.1.attn_q.weight"].shape == (256,)


def statistics(mean_square: float = 1.0, columns: int = 4) -> TapStats:
    """What calibration saw of inputs that are alike in every column, in one row."""
    squares = torch.full((columns,), mean_square, dtype=torch.float64)
    largest = squares.sqrt().float()
    return TapStats(
        rows=1,
        sum_squares=squares,
        abs_sum=squares.sqrt(),
        abs_max=largest,
        minimum=torch.zeros(columns),
        maximum=largest,
    )


def test_experts_that_no_row_reached_weigh_all_columns_alike_in_calibration_as_in_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    tiny.save_model(folder, "qwen3_moe")
    tiny.save_tokenizer(tiny.byte_level(), folder)
    snapshot, architecture = tiny.load(folder)
    plan = GGUF.plan(snapshot, architecture, tiny.target("IQ2_XS", imatrix=True))
    block = [tensor for tensor in plan.tensors if tensor.block == 1]
    seen = {tap.name: statistics(columns=256) for tap in architecture.taps if not tap.name.endswith((".2", ".3"))}
    seen |= {"expert_input.3": statistics(0.0, 256), "expert_middle.3": statistics(0.0, 256)}  # reached, by zeros only
    state = Block(where="", tensors={}, stats=seen, taps=architecture.taps)
    notes: dict[str, str] = {}
    found = coverage.unreached(block, state, architecture.prefix(1), notes.__setitem__)
    stacks = [f"blk.1.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    assert sorted(found) == sorted(f"{stack}[{e}]" for stack in stacks for e in (2, 3))
    assert all(torch.equal(importance, torch.ones(256)) for importance in found.values())
    assert len(notes) == 6 and "model.layers.1.mlp.experts.2.up_proj.weight" in notes


def test_a_file_goes_before_what_calibration_saw() -> None:
    """A rounder that needs the calibration pass for its Hessian takes importance from the file all the same."""
    seen = statistics()
    taps = (Tap(name="x", linears=("a", "b")),)
    told = torch.arange(1.0, 5)
    block = Block(where="", tensors={}, stats={"x": seen}, taps=taps, importance={"a.weight": told})
    assert torch.equal(importance_of(block, "a.weight"), told)
    assert torch.equal(importance_of(block, "b.weight"), torch.ones(4))
