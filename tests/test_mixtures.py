"""The mixtures of GGUF files: tensor by tensor the types that llama-quantize gives, from a table of its answers."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

import gguf_models as tiny
import quantize_peer
from converter.containers.gguf import GGUF
from converter.containers.gguf.choice import stored_types
from converter.containers.gguf.mixing import FALLBACKS, Facts, Weight, Wishes, choose_types, fit, may_quantize
from converter.containers.gguf.mixture import MIXTURES
from converter.errors import UnsupportedError
from converter.manifest import Target
from converter.manifest_fields import Rule
from converter.schemes import GGUF_ALIASES, GGUF_TENSOR_TYPES, GGUF_TYPES
from mixture_table import BY_NUMBER, OURS, Table, key, ours, questions, told
from quantkernels.ggml import TYPES

QUESTIONS = tuple(questions())
FACTS = Facts(layers=32, heads=32, kv_heads=8)


# --- tables --------------------------------------------------------------------------------------------------------


def test_every_type_the_manifest_offers_has_a_mixture_with_the_number_of_gguf() -> None:
    assert tuple(MIXTURES) == (*GGUF_TYPES, *GGUF_ALIASES)
    names = {**{name: f"MOSTLY_{name}" for name in GGUF_TYPES}, "F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    assert {name: MIXTURES[name].number for name in GGUF_TYPES} == {
        name: int(gguf.LlamaFileType[names[name]]) for name in GGUF_TYPES
    }
    assert all(MIXTURES[other] is MIXTURES[name] for other, name in GGUF_ALIASES.items())


def test_every_type_of_a_tensor_can_be_made() -> None:
    assert sorted(GGUF_TENSOR_TYPES) == sorted(TYPES)


def test_mixtures_and_fallbacks_name_types_that_can_be_made() -> None:
    for mixture in MIXTURES.values():
        assert {mixture.base, mixture.output, mixture.embedding, *(row.type for row in mixture.rows)} <= set(TYPES)
    assert {*FALLBACKS, *FALLBACKS.values()} <= set(TYPES)
    wide = {name for name, type in TYPES.items() if type.weights > 32}
    assert set(FALLBACKS) == wide and not set(FALLBACKS.values()) & wide


# --- llama-quantize ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Table:
    return Table.read()


def test_the_table_answers_every_question_and_no_other(table: Table) -> None:
    assert list(table.answers) == [key(question) for question in QUESTIONS]
    assert len(QUESTIONS) > 1500 and set(BY_NUMBER.values()) == set(GGUF_TYPES) - set(OURS)


@pytest.mark.parametrize("model", quantize_peer.MODELS)
def test_every_tensor_gets_the_type_that_llama_quantize_gives(table: Table, model: str) -> None:
    wrong = [key(q) for q in QUESTIONS if q.model == model and not table.holds(q, ours(q))]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:3]}"


@pytest.mark.slow
def test_the_table_is_what_llama_quantize_answers_today(table: Table) -> None:
    folder = quantize_peer.library_folder()
    if folder is None:
        pytest.skip("no libllama here: make peers")
    with quantize_peer.Quantizer(folder) as peer:
        wrong = [key(question) for question in QUESTIONS if not table.holds(question, told(peer.ask(question)))]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:3]}"


# --- what the table cannot hold ------------------------------------------------------------------------------------


def dense(layers: int = 32) -> list[Weight]:
    kinds = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    blocks = [Weight(name=f"blk.{i}.{kind}.weight", columns=256) for i in range(layers) for kind in kinds]
    return [Weight(name=f"{name}.weight", columns=256) for name in ("token_embd", "output")] + blocks


def types(name: str, wishes: Wishes | None = None) -> dict[str, str]:
    return choose_types(MIXTURES[name], dense(), FACTS, wishes or Wishes())


def test_q4_k_m_gives_six_bits_to_the_first_and_last_eighth_and_every_third_layer() -> None:
    # 32 layers: the first 4 (32/8), the last 4 (from 7*32/8 = 28), and (i - 4) % 3 == 2 between.
    six = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    chosen = types("Q4_K_M")
    for name in ("attn_v", "ffn_down"):
        assert {i for i in range(32) if chosen[f"blk.{i}.{name}.weight"] == "Q6_K"} == six
    assert chosen["output.weight"] == "Q6_K" and chosen["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize("name", OURS)
def test_four_bit_floats_leave_embedding_and_head_at_eight_bits(name: str) -> None:
    chosen = types(name)
    assert chosen.pop("output.weight") == chosen.pop("token_embd.weight") == "Q8_0"
    assert set(chosen.values()) == {name}


def test_rules_hold_in_files_of_floating_point_where_llama_quantize_ignores_them() -> None:
    chosen = types("F16", Wishes(types={"output.weight": "Q8_0"}))
    assert chosen["output.weight"] == "Q8_0" and set(chosen.values()) == {"F16", "Q8_0"}


def test_a_tensor_with_a_type_of_its_own_is_not_counted() -> None:
    plain, ruled = types("Q3_K_M"), types("Q3_K_M", Wishes(types={"blk.0.attn_v.weight": "F16"}))
    assert [plain[f"blk.{i}.attn_v.weight"] for i in range(4)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert [ruled[f"blk.{i}.attn_v.weight"] for i in range(4)] == ["F16", "Q5_K", "Q5_K", "Q4_K"]


@pytest.mark.parametrize(
    ("type", "columns", "stored"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 896, "Q5_0"),
        ("Q6_K", 896, "Q8_0"),
        ("Q5_K", 32, "Q5_1"),
        ("IQ2_XXS", 96, "IQ4_NL"),
        ("TQ1_0", 96, "Q4_0"),
        ("NVFP4", 96, "IQ4_NL"),
        ("NVFP4", 40, "F16"),
        ("Q4_K", 40, "F16"),
        ("Q8_0", 40, "F16"),
        ("F32", 7, "F32"),
    ],
)
def test_rows_that_hold_no_whole_blocks_get_a_type_that_does_and_a_reason(type: str, columns: int, stored: str) -> None:
    found, why = fit(type, columns)
    assert found == stored
    assert (found == type) == (why == "")
    if why:
        assert str(columns) in why and type in why and stored in why


def test_routers_norms_and_vectors_are_not_quantized() -> None:
    assert may_quantize("blk.0.ffn_down_exps.weight")
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q.bias", "position_embd.weight"):
        assert not may_quantize(name)


# --- one file ------------------------------------------------------------------------------------------------------


def stored(weights: list[Weight], sources: dict[str, list[str]] | None = None, **fields: object) -> dict[str, str]:
    target = Target(name="t", format="gguf", **({"type": "Q4_K_M"} | fields))
    by_name = {weight.name: weight for weight in weights}
    own = {name: [name] for name in by_name} | (sources or {})
    return {name: chosen.type for name, chosen in stored_types(target, by_name, own, FACTS, "here").items()}


def test_a_rule_may_name_the_tensor_as_the_file_does_or_as_the_checkpoint_does() -> None:
    weights, sources = dense(1), {"blk.0.ffn_down.weight": ["model.layers.0.mlp.down_proj.weight"]}
    for pattern in ("down_proj", r"^blk\.0\.ffn_down"):
        chosen = stored(weights, sources, rules=(Rule(pattern=pattern, type="IQ4_XS"),))
        assert chosen["blk.0.ffn_down.weight"] == "IQ4_XS" and list(chosen.values()).count("IQ4_XS") == 1


def test_a_fallback_can_be_refused_and_the_refusal_names_the_tensors() -> None:
    weights = [*dense(1), Weight(name="blk.1.ffn_down.weight", columns=896)]
    assert stored(weights)["blk.1.ffn_down.weight"] in ("Q5_0", "Q8_0")
    with pytest.raises(UnsupportedError, match=r"1 of 10 matrices do not fit: blk\.1\.ffn_down\.weight \(rows of 896"):
        stored(weights, fallback="refuse")
    assert stored(dense(1), fallback="refuse") == stored(dense(1))


def test_wished_types_fall_back_where_llama_quantize_would_end() -> None:
    weights = [Weight(name="token_embd.weight", columns=96), Weight(name="output.weight", columns=96)]
    chosen = stored(weights, output_type="Q6_K", embedding_type="Q4_K")
    assert chosen == {"output.weight": "Q8_0", "token_embd.weight": "Q5_0"}


def test_rules_that_divide_the_experts_of_a_tensor_are_refused() -> None:
    stack = Weight(name="blk.0.ffn_up_exps.weight", columns=256, matrices=2)
    sources = {stack.name: ["layers.0.experts.0.up.weight", "layers.0.experts.1.up.weight"]}
    assert stored([stack], sources, rules=(Rule(pattern="experts", type="Q8_0"),)) == {stack.name: "Q8_0"}
    with pytest.raises(UnsupportedError, match=r"several types within blk\.0\.ffn_up_exps\.weight"):
        stored([stack], sources, rules=(Rule(pattern=r"experts\.1", type="Q8_0"),))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen2_moe", "gemma2"])
def test_quantizing_our_f32_file_with_llama_quantize_gives_the_types_that_we_plan(family: str, tmp_path: Path) -> None:
    folder = quantize_peer.library_folder()
    if folder is None:
        pytest.skip("no libllama here: make peers")
    model, out = tmp_path / "model", tmp_path / "out"
    tiny.save_model(model, family)
    tiny.save_tokenizer(tiny.byte_level(), model)
    out.mkdir()
    tiny.write(model, tiny.target("F32"), out)
    (path,) = out.iterdir()
    with quantize_peer.Quantizer(folder) as peer:
        for type in ("Q4_K_M", "Q3_K_L", "Q2_K", "IQ4_XS", "Q5_0", "MXFP4_MOE"):
            planned = {t.stack or t.name: t.grid.name for t in GGUF.plan(*tiny.load(model), tiny.target(type)).tensors}
            answer = peer.ask(quantize_peer.Question(model=str(path), number=MIXTURES[type].number))
            assert isinstance(answer, dict) and len(answer) >= len(planned)
            assert {name: answer[name] for name in planned} == planned, type
