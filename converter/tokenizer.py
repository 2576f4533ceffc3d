"""A model's own tokenizer, for the texts that it is calibrated and measured on; transformers reads it."""

# T tokens of a text

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from converter.errors import SourceError, said
from converter.marks import quoted
from converter.untrusted import check_small, parse_json, read_small

SETTINGS = "tokenizer_config.json"
# A tokenizer is in one of these, at least.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What calibration needs of a tokenizer.

    encode: text -> token numbers, without special tokens added. prefix and suffix: what the model expects in front of
    every sequence (the begin token of Llama and Gemma, [CLS] of BERT, nothing for Qwen), and behind it ([SEP]). chat:
    messages -> text by the chat template.
    """

    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    chat: Callable[[list[dict[str, str]]], str]


def tokenizer(folder: Path, where: str) -> Tokenizer:
    """The tokenizer in a model's folder. Raises SourceError when there is none or it cannot be read."""
    if not any((folder / name).is_file() for name in FILES):
        raise SourceError(
            where,
            "no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt is there",
            "Put the tokenizer of the original model beside the weights",
        )
    check_files(folder, where)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise types of their own
        what = f"the tokenizer cannot be read: {said(error)}"
        raise SourceError(where, what, "Fetch the tokenizer files again") from error

    def encode(text: str) -> list[int]:
        numbers: list[int] = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        return numbers

    def chat(messages: list[dict[str, str]]) -> str:
        if loaded.chat_template is None:
            remedy = 'Give the text under "text" instead of "messages"'
            raise SourceError(where, "the tokenizer has no chat template", remedy)
        return str(loaded.apply_chat_template(messages, tokenize=False))

    plain, full = encode("a"), loaded("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    around = tuple(full[:start]), tuple(full[start + len(plain) :])
    return Tokenizer(encode=encode, prefix=around[0], suffix=around[1], chat=chat)


def check_files(folder: Path, where: str) -> None:
    """Raise SourceError for files larger than any tokenizer's, and for settings that name files elsewhere.

    transformers (5.23) takes a text under vocab or merges for the path of a file, and reads it wherever it is.
    """
    for name in (*FILES, SETTINGS):
        if (folder / name).is_file():
            check_small(name, (folder / name).stat().st_size, where)
    if not (folder / SETTINGS).is_file():
        return
    settings = parse_json(read_small(folder / SETTINGS, where), f"{where}: {SETTINGS}")
    listed = settings.get("fast_tokenizer_files")
    named = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    given = [settings[key] for key in ("vocab", "merges") if isinstance(settings.get(key), str)]
    if elsewhere := given + [name for name in named if "/" in name or "\\" in name]:
        what = f"{SETTINGS} wants the file {quoted(elsewhere[0])} to be read, which may be any on this machine"
        raise SourceError(where, what, "Do not use this model before its owner explains that")
