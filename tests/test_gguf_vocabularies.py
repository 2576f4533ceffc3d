"""Vocabularies of every kind, read back by llama.cpp, give the ids that transformers and SentencePiece give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from converter.containers.gguf.header import compose
from converter.containers.gguf.vocabulary.hard_text import HARD_TEXT
from converter.errors import SourceError, UnsupportedError
from tokenizer_models import ENGLISH, describe, differing, load, save, sentencepiece_model, split_by, values
from vocab_peer import Vocabularies

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = PLAIN | {"byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2}
GEMMA = PLAIN | {"byte_fallback": True, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
WORDS = "the of and to in is that it for as with was on are this 's don we ll abc def return print camel case " * 3


@pytest.fixture(scope="module")
def reader() -> Iterator[Vocabularies]:
    with Vocabularies() as vocabularies:
        yield vocabularies


@pytest.fixture(scope="module")
def models_of() -> Mapping[str, bytes]:
    """Files of SentencePiece's, by what they are like."""
    return {
        "llama": sentencepiece_model("bpe", **LLAMA),
        "gemma": sentencepiece_model("bpe", user_defined_symbols=["\n\n", "▁▁", "▁▁▁"], **GEMMA),
        "t5": sentencepiece_model("unigram", **T5),
        "bytes": sentencepiece_model("unigram", **LLAMA),
    }


def save_model(folder: Path, model: bytes, name: str = "tokenizer.model", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def wordpiece(lower: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*HARD_TEXT, WORDS], trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


@pytest.mark.parametrize("lower", [False, True], ids=["cased", "uncased"])
def test_wordpiece_tokenizes_as_transformers_does(lower: bool, reader: Vocabularies, tmp_path: Path) -> None:
    tokenizer = wordpiece(lower)
    described = describe(save(tmp_path, tokenizer, **BERT), tokenizer.get_vocab_size())
    load(reader, described.fields, tmp_path / "v.gguf")
    # Beyond Latin, Greek and Cyrillic, taking accents off is another thing to readers, which the note tells.
    texts = [text for text in HARD_TEXT if not lower or max(text) < "\u0530" or max(text) > "\uffff"]
    different = differing(reader, tokenizer, [text for text in texts if "\x85" not in text])
    assert not [text for text in different if not lower or text.isascii()]
    assert len(different) <= (3 if lower else 0)
    words = ["Korean"] * lower + ["more than 100 letters"]
    assert [word in note for word, note in zip(words, described.notes, strict=True)] == [True] * len(words)
    assert reader.tokenize("a" * 101) != tokenizer.encode("a" * 101).ids


def test_wordpiece_is_stored_with_phantom_spaces_and_its_special_tokens(reader: Vocabularies, tmp_path: Path) -> None:
    tokenizer = wordpiece(lower=True)
    described = describe(save(tmp_path, tokenizer, **BERT), tokenizer.get_vocab_size() + 2)
    fields, ids = values(described), tokenizer.get_vocab()
    assert fields["model"] == "bert" and fields["normalizer.lowercase"] is fields["normalizer.strip_accents"] is True
    assert fields["tokens"][:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") and fields["token_type"][:5] == (
        3,
        2,
        3,
        3,
        3,
    )
    assert fields["tokens"][ids["the"]] == "▁the" and fields["tokens"][ids["##s"]] == "s"
    assert fields["token_type"][-2:] == (5, 5) and fields["tokens"][-1] == f"[PAD{len(ids) + 1}]"
    load(reader, described.fields, tmp_path / "v.gguf")
    facts = reader.facts()
    assert (facts["bos"], facts["eos"], facts["sep"], facts["pad"], facts["mask"]) == (2, 3, 3, 0, 4)


def test_vocab_txt_alone_says_the_same_as_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = wordpiece(lower=True)
    both = save(tmp_path / "json", tokenizer, **BERT)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    slow = tmp_path / "txt"
    slow.mkdir()
    (slow / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (slow / "tokenizer_config.json").write_text(json.dumps(BERT | {"do_lower_case": True}), "utf-8")
    rows = len(words)
    assert describe(slow, rows) == describe(both, rows)


def test_wordpiece_that_prepares_text_otherwise_is_refused_until_accepted(tmp_path: Path) -> None:
    tokenizer = wordpiece(lower=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    folder, rows = save(tmp_path, tokenizer, **BERT), tokenizer.get_vocab_size()
    with pytest.raises(UnsupportedError, match=r"NFKC.* and would be .*tokenizer.ggml.pre: default"):
        describe(folder, rows)
    assert "accepted by the manifest" in describe(folder, rows, accepted="default").notes[-1]


@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
def test_tokenizer_model_alone_tokenizes_as_sentencepiece_does(
    name: str, models_of: Mapping[str, bytes], reader: Vocabularies, tmp_path: Path
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=models_of[name])
    described = describe(save_model(tmp_path, models_of[name]), processor.vocab_size())
    load(reader, described.fields, tmp_path / "v.gguf")
    before, after = {"llama": ([1], []), "gemma": ([2], []), "t5": ([], [1])}[name]
    for text in HARD_TEXT:
        assert reader.tokenize(text) == before + processor.encode(text) + after, text
    assert not described.notes


@pytest.mark.parametrize("family", ["xlm-roberta", "camembert"])
def test_a_model_of_fairseqs_numbers_its_pieces_as_transformers_does(
    family: str, reader: Vocabularies, tmp_path: Path
) -> None:
    model = sentencepiece_model("unigram", unk_id=0, bos_id=1, eos_id=2)
    folder = save_model(tmp_path, model, "sentencepiece.bpe.model")
    slow = {"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"}[family]
    tokenizer = getattr(transformers, slow).from_pretrained(folder)
    described = describe(folder, len(tokenizer) + 3, model_type=family)
    assert values(described)["tokens"][: len(tokenizer)] == tuple(
        tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    )
    load(reader, described.fields, tmp_path / "v.gguf")
    for text in ("It's what they said. \u00b0 unknown", *ENGLISH[:20]):
        assert reader.tokenize(text) == tokenizer.encode(text), text
    facts = reader.facts()
    roles = ("bos", "eos", "sep", "pad", "mask")
    assert {role: facts[role] for role in roles} == {role: getattr(tokenizer, f"{role}_token_id") for role in roles}


def test_unigram_with_byte_fallback_differs_only_where_no_token_is(
    models_of: Mapping[str, bytes], reader: Vocabularies, tmp_path: Path
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=models_of["bytes"])
    described = describe(save_model(tmp_path, models_of["bytes"], add_eos_token=False), processor.vocab_size())
    load(reader, described.fields, tmp_path / "v.gguf")
    assert ["no byte fallback" in note for note in described.notes] == [True]
    newlines = "one\ntwo\n\n\tthree"
    assert reader.tokenize(newlines, special=False) == processor.encode(newlines)
    assert reader.detokenize(processor.encode(newlines)).strip() == newlines
    for text in HARD_TEXT:
        # A text of nothing but spaces is where llama.cpp puts none before it.
        if not text.isspace() and not any(processor.is_byte(number) for number in processor.encode(text)):
            assert reader.tokenize(text, special=False) == processor.encode(text), text


def test_both_files_give_the_scores_of_the_one_and_the_rest_of_the_other(
    models_of: Mapping[str, bytes], reader: Vocabularies, tmp_path: Path
) -> None:
    alone = values(describe(save_model(tmp_path / "alone", models_of["llama"]), 1000))
    content = json_of(models_of["llama"])
    both = save_model(save(tmp_path / "both", content), models_of["llama"])
    found = values(describe(both, 1000))
    assert found["scores"] == alone["scores"] and found["tokens"] == alone["tokens"]
    lacking = content | {"model": content["model"] | {"merges": content["model"]["merges"][5:]}}
    assert values(describe(save_model(save(tmp_path / "less", lacking), models_of["llama"]), 1000)) == found


def json_of(model: bytes) -> dict[str, Any]:
    """What transformers makes of a BPE of SentencePiece's: every pair that makes a token is a merge, by its score."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    normal = [
        number for number in range(len(pieces)) if not processor.is_control(number) and not processor.is_byte(number)
    ]
    merges = [
        [pieces[number][:cut], pieces[number][cut:]]
        for number in sorted(normal, key=processor.get_score, reverse=True)
        for cut in range(1, len(pieces[number]))
        if pieces[number][:cut] in vocabulary and pieces[number][cut:] in vocabulary
    ]
    special = [
        {
            "id": number,
            "content": piece,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for number, piece in enumerate(pieces[:3])
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>", "byte_fallback": True},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda vocabulary: {("▁zzz" if token == max(vocabulary) else token): n for token, n in vocabulary.items()},
            "such as",
        ),
        (lambda vocabulary: vocabulary | {"▁extra": 999}, "tokens of tokenizer.json are not in tokenizer.model"),
        (lambda vocabulary: dict(zip(vocabulary, reversed(vocabulary.values()), strict=True)), "other ids"),
    ],
    ids=["another token", "one more token", "another order"],
)
def test_files_that_contradict_each_other_are_refused(
    change: Any, words: str, models_of: Mapping[str, bytes], tmp_path: Path
) -> None:
    content = json_of(models_of["llama"])
    content["model"]["vocab"] = change(content["model"]["vocab"])
    save_model(save(tmp_path, content), models_of["llama"])
    with pytest.raises(SourceError, match=words):
        describe(tmp_path, 1000)


def test_a_file_of_ranks_beside_tokenizer_json_is_passed_over(tmp_path: Path) -> None:
    tokenizer = split_by((r"\p{L}+",))
    folder = save(tmp_path, tokenizer)
    plain = describe(folder, 1000, accepted="gpt-2")
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n", "utf-8")
    assert describe(folder, 1000, accepted="gpt-2") == plain
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer.model is no model of SentencePiece's"):
        describe(folder, 1000)


def test_merges_that_scores_cannot_say_travel_as_merges(reader: Vocabularies, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [part for text in HARD_TEXT for part in text.split("\n")]
    trainer = trainers.BpeTrainer(vocab_size=1500, limit_alphabet=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]  # bytes are tokens like others
    described = describe(save(tmp_path, content, unk_token="<unk>"), tokenizer.get_vocab_size())
    assert values(described)["pre"] == "sarvam-moe" and not described.notes
    load(reader, described.fields, tmp_path / "v.gguf")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not differing(reader, plain)
    assert reader.detokenize(plain.encode("a  b\nc 😀").ids) == "a  b\nc 😀"


SLOW = {"gpt2": "gpt-2", "qwen2": "qwen2", "roberta": "roberta-bpe"}


@pytest.mark.parametrize("family", SLOW)
def test_vocab_json_and_merges_are_read_by_the_models_class(family: str, reader: Vocabularies, tmp_path: Path) -> None:
    from converter.containers.gguf.vocabulary.splittings import GPT2, QWEN2

    tokenizer = split_by((QWEN2 if family == "qwen2" else GPT2,))
    tokenizer.model.save(str(tmp_path))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({token: tokenizer.token_to_id(token) for token in ("<s>", "</s>")})
    )
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "cls_token": "<s>", "sep_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    described = describe(tmp_path, tokenizer.get_vocab_size(), model_type=family)
    found = values(described)
    assert found["pre"] == SLOW[family] and found["add_bos_token"] is (family == "roberta")
    load(reader, described.fields, tmp_path / "v.gguf")
    assert not [text for text in HARD_TEXT if reader.tokenize(text, special=False) != tokenizer.encode(text).ids]


def test_a_class_that_only_python_knows_is_refused(tmp_path: Path) -> None:
    split_by((r"\p{L}+",)).model.save(str(tmp_path))
    with pytest.raises(SourceError, match="written in Python only"):
        describe(tmp_path, 1000, model_type="ctrl")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(SourceError, match=r"no merges.txt"):
        describe(tmp_path, 1000, model_type="gpt2")


def test_added_tokens_are_told_apart_and_found_in_text(reader: Vocabularies, tmp_path: Path) -> None:
    from converter.containers.gguf.vocabulary.splittings import LLAMA3

    tokenizer = split_by((LLAMA3,), ignore_merges=True)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    )
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    described = describe(save(tmp_path, tokenizer, **settings), tokenizer.get_vocab_size())
    assert values(described)["token_type"][-4:] == (3, 3, 4, 3)
    assert ["<mask>" in note for note in described.notes] == [True]
    load(reader, described.fields, tmp_path / "v.gguf")
    text = "<|begin_of_text|>It's<tool>12345</tool> x<|eot_id|>\n<tool>"
    assert reader.tokenize(text) == tokenizer.encode(text).ids
    assert reader.facts()["eot"] == tokenizer.token_to_id("<|eot_id|>")


@pytest.mark.parametrize("older", [False, True], ids=["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_only_another_file_lists_are_tokens(older: bool, reader: Vocabularies, tmp_path: Path) -> None:
    tokenizer = split_by((r"\p{L}+",))
    count = tokenizer.get_vocab_size()
    new = {"content": "<new>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    folder = save(tmp_path, tokenizer, **({} if older else {"added_tokens_decoder": {str(count): new}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>" if older else "<unread>": count}))
    described = describe(folder, count + 2, accepted="gpt-2")
    assert values(described)["tokens"][count:] == ("<new>", f"[PAD{count + 1}]")
    assert values(described)["token_type"][count:] == (4 if older else 3, 5)
    load(reader, described.fields, tmp_path / "v.gguf")
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    assert reader.tokenize("a<new>b") == fast.encode("a<new>b")


def test_files_that_give_one_number_to_two_tokens_are_told(tmp_path: Path) -> None:
    tokenizer = split_by((r"\p{L}+",))
    other = {"content": "<five>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    described = describe(save(tmp_path, tokenizer, added_tokens_decoder={"5": other}), 1000, accepted="gpt-2")
    own = tokenizer.id_to_token(5)
    assert values(described)["tokens"][5] == own
    assert next(f"such as 5, '{own}' and '<five>'" in note for note in described.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "BPE", "vocab": {}}}, "holds no vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "not laid out"),
        ({"added_tokens": [{"content": "x"}]}, "not laid out"),
        ({"added_tokens": [{"id": 0, "content": "b", "special": True}, {"id": 1, "content": "b"}]}, "two ids"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "WordLevel"),
    ],
)
def test_broken_tokenizers_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = json.loads(split_by((r"\p{L}+",), size=300).to_str())
    with pytest.raises((SourceError, UnsupportedError), match=words):
        describe(save(tmp_path, content | change), 1000, accepted="gpt-2")


@pytest.mark.parametrize(
    ("content", "words"),
    [("\ud83d", r"half a character"), ("a\0b", r"gives two ids to the token 'a'")],
    ids=["surrogate", "up to a NUL"],
)
def test_tokens_that_readers_cannot_read_are_refused(content: str, words: str, tmp_path: Path) -> None:
    tokenizer = json.loads(split_by((r"\p{L}+",), size=300).to_str())
    added = {"id": 300, "content": content, "special": True, "normalized": False}
    folder = save(tmp_path, tokenizer | {"added_tokens": [added]})
    with pytest.raises(SourceError, match=words):
        compose(describe(folder, 1000, accepted="gpt-2").fields, ())


def test_missing_broken_and_too_large_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tokenizer"):
        describe(tmp_path, 1000)
    save(tmp_path, split_by((r"\p{L}+",), size=300))
    with pytest.raises(SourceError, match="300 tokens, and the embedding 299 rows"):
        describe(tmp_path, 299)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(SourceError, match=r"tokenizer\.json: broken"):
        describe(tmp_path, 1000)
