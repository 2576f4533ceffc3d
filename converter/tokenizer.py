"""A model's own tokenizer, for the texts that it is calibrated and measured on; transformers reads it."""

# T tokens of a text

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from converter.errors import SourceError, said

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
