"""How differently two tokenizers cut text, shown on text made to be hard.

Patterns say little about each other; what they make of text says all. The tokenizer under question and the one that a
reader would be are run side by side by the tokenizers library. Only tokens that the text can need are loaded, so a
vocabulary of 250,000 costs little; merges of anything else never come into play, and neither do longer tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from converter.containers.gguf.vocabulary.hard_text import HARD_TEXT
from converter.containers.gguf.vocabulary.splittings import AFTER_BYTES
from converter.containers.gguf.vocabulary.tokens import SPACE, pairs

LONGEST_SHARED = 16  # letters; longer tokens are looked for one by one
INNER_PREFIX = "##"  # of pieces inside words, where the model names none
EXAMPLES, EXAMPLE_LETTERS = 3, 24


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much of the hard text is cut otherwise.

    share: of the tokens, how many are others. spaces: only runs of spaces and newlines are cut
    otherwise. examples: what is cut how, and how by the other one.
    """

    share: float = 0.0
    spaces: bool = False
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = f"{self.share:.1%}" if self.share >= 0.001 else "less than 0.1%"
        shown = f", such as {'; '.join(self.examples)}" if self.examples else ""
        return f"{share} of the tokens of a hard multilingual text{shown}"


def byte_level() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def splitter(steps: Sequence[str]) -> PreTokenizer:
    """The pre-tokenizer that follows patterns as the table has them; every match is a piece of its own."""
    before = [step for step in steps if not step.startswith(AFTER_BYTES)]
    behind = [step.removeprefix(AFTER_BYTES) for step in steps[len(before) :]]
    parts: list[PreTokenizer] = [pre_tokenizers.Split(Regex(step), "isolated") for step in before]
    parts.append(byte_level())
    parts += [pre_tokenizers.Split(Regex(step), "isolated") for step in behind]
    return pre_tokenizers.Sequence(parts)


def small(tokenizer: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in tokenizer.json with those tokens only that the hard text can need; `changes` replace parts."""
    content: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": tokenizer.get("normalizer")}
    content |= {"pre_tokenizer": tokenizer.get("pre_tokenizer"), "model": tokenizer["model"]} | dict(changes or {})
    model = dict(content["model"])
    short, text = letters(json.dumps(content["normalizer"]), '"ByteLevel"' in json.dumps(content["pre_tokenizer"]))
    prefix = model.get("continuing_subword_prefix") or INNER_PREFIX
    always = {model.get("unk_token"), *(f"<0x{byte:02X}>" for byte in range(256))}

    def needed(token: str) -> bool:
        if len(token) > LONGEST_SHARED:
            return token in text
        return token in short or token in always or token.removeprefix(prefix) in short

    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if needed(token)}
    else:
        listed, unknown = model["vocab"], model.get("unk_id")
        lowest = min(score for _, score in listed)
        kept = [
            number
            for number, (token, score) in enumerate(listed)
            if number == unknown or score == lowest or needed(token)
        ]
        model["unk_id"] = kept.index(unknown) if unknown in kept else None
        model["vocab"] = [listed[number] for number in kept]
    if "merges" in model:
        model["merges"] = [pair for pair in pairs(model["merges"]) if needed(pair[0] + pair[1])]
    return Tokenizer.from_str(json.dumps(content | {"model": model}))


@cache
def letters(normalizer: str, as_bytes: bool) -> tuple[frozenset[str], str]:
    """What a model sees of the hard text, normalised or not: all short stretches of it, and the whole.

    normalizer: its JSON. as_bytes: bytes are written as letters, as GPT-2 does.
    """
    bare = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    change = Tokenizer.from_str(json.dumps(bare | {"normalizer": json.loads(normalizer)})).normalizer
    lines = {f" {text}" for line in HARD_TEXT for text in (line, change.normalize_str(line) if change else line)}
    if as_bytes:
        lines = {byte_level().pre_tokenize_str(line)[0][0] for line in lines}
    else:
        lines = {line.replace(" ", SPACE) for line in lines} | {part for line in lines for part in line.split()}
    short = frozenset(
        line[start:end]
        for line in lines
        for start in range(len(line))
        for end in range(start + 1, min(start + LONGEST_SHARED, len(line)) + 1)
    )
    return short, "\n\n".join(lines)


def compare(mine: Sequence[Encoding], theirs: Sequence[Encoding], names: Mapping[str, str] | None = None) -> Difference:
    """What another tokenizer does otherwise, by what encode() gives; names: tokens that it writes in another way."""
    total = sum(len(encoding.tokens) for encoding in mine)
    changed, stretches = 0, []
    for line, left, right in zip(HARD_TEXT, mine, theirs, strict=True):
        found = differing(line, left, right, names or {})
        changed += sum(count for count, _ in found)
        stretches += [stretch for _, stretch in found]
    if not changed:
        return Difference()
    spaces = not any(region.strip() for region, _, _ in stretches)
    stretches.sort(key=lambda one: (not one[0], len(one[0]) > EXAMPLE_LETTERS, not one[0].isascii(), -len(one[1])))
    shown = {region: f"{region!r} is {show(left)} and would be {show(right)}" for region, left, right in stretches}
    return Difference(share=min(1.0, changed / total), spaces=spaces, examples=varied(shown))


def varied(shown: Mapping[str, str]) -> tuple[str, ...]:
    """A few of the differences, of unlike text: each begins with a letter of another sort."""
    found: dict[tuple[bool, bool, bool, bool], str] = {}
    for region, said in shown.items():
        sort = (region.isascii(), region.isspace(), any(map(str.isdigit, region)), any(map(str.isalpha, region)))
        found.setdefault(sort, said)
    return tuple([*found.values()][:EXAMPLES])


def encode(tokenizer: Tokenizer) -> list[Encoding]:
    """The hard text, line by line."""
    return [tokenizer.encode(line, add_special_tokens=False) for line in HARD_TEXT]


Stretch = tuple[str, list[str], list[str]]  # a stretch of text, its pieces, and those of the other


def differing(line: str, left: Encoding, right: Encoding, names: Mapping[str, str]) -> list[tuple[int, Stretch]]:
    """How many tokens are others, and of which stretch of text, for each run of them.

    Places in the text only serve to show it: where a space is put before a word, tokenizers disagree on them.
    """
    own, other = left.tokens, [names.get(token, token) for token in right.tokens]
    if own == other:
        return []
    found = []
    for kind, start, end, first, last in SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        if kind != "equal":
            mine, theirs = left.offsets[start:end], right.offsets[first:last]
            covered = line[min(place for place, _ in mine + theirs) : max(place for _, place in mine + theirs)]
            stretch = (covered, pieces(line, mine), pieces(line, theirs))
            found.append((max(end - start, last - first), stretch))
    return found


def pieces(line: str, places: Sequence[tuple[int, int]]) -> list[str]:
    """The text at these places; tokens of parts of a letter share its place and are one piece."""
    return [line[start:end] for start, end in dict.fromkeys(places)]


def show(pieces: Sequence[str]) -> str:
    """Pieces with bars between them; what cannot be seen is escaped, spaces where there is nothing else."""
    text = "|".join(pieces)
    hidden = "".join(pieces).isspace()
    return "".join(
        letter.encode("unicode_escape").decode() if hidden or not letter.isprintable() else letter for letter in text
    )


@cache
def normalised(normalizer: str) -> tuple[tuple[str, str], ...]:
    """Words of the hard text that a normalizer, the JSON of tokenizer.json's, changes, and what it makes of them."""
    bare = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    change = Tokenizer.from_str(json.dumps(bare | {"normalizer": json.loads(normalizer)})).normalizer
    lines = {line: change.normalize_str(line) for line in HARD_TEXT}
    words = {word: change.normalize_str(word) for line in HARD_TEXT for word in line.split()}
    found = {word: made for word, made in words.items() if made != word}
    found |= {line: made for line, made in lines.items() if made != line} if not found else {}
    return tuple(found.items())
