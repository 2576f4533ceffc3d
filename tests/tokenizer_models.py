"""Small tokenizers of every kind, trained on text that is hard to cut, and what llama.cpp makes of them."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from converter.containers.gguf.header import Field, compose, string
from converter.containers.gguf.tokenizer import Described, describe_tokenizer
from converter.containers.gguf.vocabulary.difference import byte_level, splitter
from converter.containers.gguf.vocabulary.hard_text import HARD_TEXT
from vocab_peer import Vocabularies

ENGLISH = (
    (Path(__file__).parents[1] / "converter" / "texts" / "calibration.txt").read_text("utf-8")[:60_000].splitlines()
)
SCRIPTS = (0x400, 0x370, 0x900, 0xE00, 0x600, 0x5D0, 0x3040, 0x4E00, 0xAC00, 0x1E00, 0x300, 0x100, 0x2100, 0x2460)
PHRASES = ("'s", "'LL", "'Re", "don't", "Word", "UPPER", "lower", "CamelCase", "...", "==", "<|", "//", "12345")
SPACES = (" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\n  ")


def mixed_texts(count: int, letters: int = 60, seed: int = 0) -> list[str]:
    """Texts of scripts, digits, spaces and phrases in no order."""
    # The seed is the test's, so a failure can be had again. Separators of lines and paragraphs are left out: whether
    # they are spaces, regular expressions do not agree.
    draw = random.Random(seed)
    assigned = [chr(code) for code in range(0x21, 0x30000) if unicodedata.category(chr(code))[0] in "LMNPS"]
    found = []
    for _ in range(count):
        text = ""
        while len(text) < letters:
            base = draw.choice(SCRIPTS)
            text += draw.choice(
                (
                    draw.choice(assigned),
                    "".join(chr(draw.randrange(33, 127)) for _ in range(draw.randrange(1, 5))),
                    draw.choice(SPACES),
                    "".join(chr(base + draw.randrange(0x50)) for _ in range(draw.randrange(1, 6))),
                    draw.choice("0123456789") * draw.randrange(1, 8),
                    draw.choice(PHRASES),
                )
            )
        found.append(text)
    return found


def crossing(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE whose merges heed no boundary, so that any difference in splitting shows in its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.train_from_iterator(texts, byte_trainer(size))
    return tokenizer


def split_by(steps: Sequence[str], size: int = 700, **options: Any) -> Tokenizer:
    """A byte-level BPE trained on what `steps` leave together, as a model's own is."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = splitter(steps)
    tokenizer.train_from_iterator(HARD_TEXT, byte_trainer(size))
    return tokenizer


def byte_trainer(size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )


def sentencepiece_model(kind: str, size: int = 900, **options: Any) -> bytes:
    """A tokenizer.model trained on the hard text: kind "bpe" or "unigram"."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*HARD_TEXT, *ENGLISH]),
        model_writer=written,
        model_type=kind,
        vocab_size=size,
        character_coverage=0.98,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def save(folder: Path, tokenizer: Tokenizer | Mapping[str, Any], **settings: Any) -> Path:
    """Save a tokenizer, or the content of its tokenizer.json, with its settings."""
    content = tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else json.dumps(tokenizer)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(content, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def describe(folder: Path, rows: int, accepted: str | None = None, **config: Any) -> Described:
    return describe_tokenizer(folder, config, rows, "the test's model", accepted)


def values(described: Described) -> dict[str, Any]:
    return {
        key.removeprefix("tokenizer.").removeprefix("ggml."): field.value for key, field in described.fields.items()
    }


def load(reader: Vocabularies, fields: Mapping[str, Field], path: Path) -> None:
    """Make llama.cpp read `fields` as the vocabulary of a file without tensors."""
    path.write_bytes(compose({"general.architecture": string("llama"), **fields}, ()))
    reader.load(path)


def differing(reader: Vocabularies, tokenizer: Tokenizer, texts: Sequence[str] = HARD_TEXT) -> list[str]:
    """The texts that llama.cpp cuts otherwise than `tokenizer`, special tokens and all."""
    return [text for text in texts if reader.tokenize(text) != tokenizer.encode(text).ids]
