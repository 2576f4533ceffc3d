"""A tokenizer becomes GGUF metadata: its way of splitting is recognised or refused, nothing of it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gguf_models as tiny
from converter.containers.gguf.tokenizer import describe_tokenizer
from converter.errors import UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tiny.byte_level(), tmp_path, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return tmp_path


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def fields_of(folder: Path, rows: int = 1024) -> dict[str, Any]:
    described = describe_tokenizer(folder, {"eos_token_id": [2, 1]}, rows, "t")
    return {key: field.value for key, field in described.fields.items()}


def test_ids_without_a_token_are_padded_and_marked_unused(folder: Path) -> None:
    fields = fields_of(folder)
    used = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 1024
    assert fields["tokenizer.ggml.tokens"][used:] == tuple(f"[PAD{i}]" for i in range(used, 1024))
    assert set(fields["tokenizer.ggml.token_type"][used:]) == {5}
    assert fields["tokenizer.ggml.token_type"][:4] == (3, 3, 3, 1)


def notes_of(folder: Path, rows: int = 1024) -> tuple[str, ...]:
    return describe_tokenizer(folder, {}, rows, "t").notes


def test_text_that_readers_take_otherwise_is_told(folder: Path, tmp_path: Path) -> None:
    assert notes_of(folder) == ()
    tiny.edit_json(folder / "tokenizer.json", normalizer={"type": "NFC"})
    (said,) = notes_of(folder)
    assert "do not normalise text (NFC)" in said


def test_added_tokens_without_a_row_are_left_out_and_told_of(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    picture = content["added_tokens"][0] | {"id": 1024, "content": "<picture>"}
    tiny.edit_json(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], picture])
    assert len(fields_of(folder)["tokenizer.ggml.tokens"]) == 1024
    (said,) = notes_of(folder)
    assert "<picture>" in said
    assert fields_of(folder, 1025)["tokenizer.ggml.tokens"][1024] == "<picture>" and notes_of(folder, 1025) == ()


def test_special_tokens_come_from_config_when_the_tokenizer_does_not_say(folder: Path) -> None:
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=None, bos_token=None)
    fields = fields_of(folder)
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and "tokenizer.ggml.bos_token_id" not in fields


def test_a_template_that_puts_a_token_first_makes_readers_add_it(folder: Path) -> None:
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    tiny.edit_json(folder / "tokenizer.json", post_processor={"type": "Sequence", "processors": [BYTES, template]})
    assert fields_of(folder)["tokenizer.ggml.add_bos_token"] is True
    tiny.edit_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert fields_of(folder)["tokenizer.ggml.add_bos_token"] is False


def test_chat_templates_travel_by_name(folder: Path) -> None:
    assert "tokenizer.chat_template" not in fields_of(folder)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tiny.edit_json(folder / "tokenizer_config.json", chat_template=named)
    fields = fields_of(folder)
    assert fields["tokenizer.chat_template"] == "D" and fields["tokenizer.chat_template.tool_use"] == "T"
    (folder / "chat_template.jinja").write_text("{{ J }}")
    assert fields_of(folder)["tokenizer.chat_template"] == "{{ J }}"


def test_sentencepiece_scores_follow_the_merges(tmp_path: Path) -> None:
    tiny.save_tokenizer(tiny.sentencepiece(), tmp_path, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fields = fields_of(tmp_path)
    kinds, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert kinds[:3] == (2, 3, 3) and set(kinds[3:259]) == {6}
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    ids = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = [scores[ids["".join(pair)]] for pair in merges]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": None}, "keeps spaces"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": True}}, "splits at every space"),
    ],
)
def test_a_way_to_prepare_text_that_sentencepiece_has_not_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    tokenizer = tiny.sentencepiece()
    vocabulary = tokenizer.get_vocab()
    tiny.save_tokenizer(tokenizer, tmp_path, unk_token="<unk>")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["a▁b"] = max(vocabulary.values()) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    with pytest.raises(UnsupportedError, match=words):
        fields_of(tmp_path)


def test_user_defined_tokens_have_no_part_in_scores(tmp_path: Path) -> None:
    tiny.save_tokenizer(tiny.like_gemma(), tmp_path, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    before = fields_of(tmp_path)
    kinds = dict(zip(before["tokenizer.ggml.tokens"], before["tokenizer.ggml.token_type"], strict=True))
    assert kinds["  "] == kinds["\n\n"] == 4 and before["tokenizer.ggml.add_space_prefix"] is False
    # transformers sorts the merges of tokens of one score by length, those of user-defined tokens among each other.
    tiny.edit_json(tmp_path / "tokenizer.json", model=model | {"merges": [*model["merges"][5:], *model["merges"][:5]]})
    assert fields_of(tmp_path)["tokenizer.ggml.scores"] == before["tokenizer.ggml.scores"]


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    tiny.save_tokenizer(tiny.sentencepiece(), tmp_path, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    double = next(
        i for i in range(1, len(model["merges"])) if "".join(model["merges"][i]) == "".join(model["merges"][i - 1])
    )
    incomplete = model["merges"][:double] + model["merges"][double + 1 :]
    tiny.edit_json(tmp_path / "tokenizer.json", model=model | {"merges": incomplete})
    with pytest.raises(UnsupportedError, match="never merged"):
        fields_of(tmp_path)
    scattered = [*incomplete, model["merges"][double]]
    tiny.edit_json(tmp_path / "tokenizer.json", model=model | {"merges": scattered})
    with pytest.raises(UnsupportedError, match="do not stand together"):
        fields_of(tmp_path)
