"""BPE over characters with byte fallback, as SentencePiece and the tokenizers of Llama 2, Mistral and Gemma have it.

GGUF's "llama" model has a score for each token in place of merges: the pair whose token scores highest is joined.
Scores come from tokenizer.model where it is there, and otherwise from the merges, where scores can say them at all.
Where they cannot, and no space is put first, llama.cpp has another way: its "gpt2" model under the name "sarvam-moe"
splits at newlines only and follows merges of characters.

Source: SentencePiece's byte-pair rules; llama.cpp's vocabulary loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from converter.containers.gguf.header import Field, boolean, f32s, string, strings
from converter.containers.gguf.vocabulary.difference import compare, encode, small
from converter.containers.gguf.vocabulary.sentencepiece import Pieces
from converter.containers.gguf.vocabulary.tokens import (
    ELSEWHERE,
    SPACE,
    Kind,
    Reading,
    Vocabulary,
    normalizers_of,
    pairs,
    pre_tokenizers_of,
    shorten,
)
from converter.errors import UnsupportedError

BY_SCORES, BY_MERGES = "default", "sarvam-moe"
REPLACES, PREFIXES, IDLE = "replaces", "prefixes", "idle"
SPACES_PUT = "readers of GGUF put a space before a text that begins with one, too{}, and transformers does not"
BEHIND = {"first": ", and before what follows a special token"}  # by Metaspace's prepend_scheme


def read_characters(tokenizer: Mapping[str, Any], vocabulary: Vocabulary, pieces: Pieces | None, where: str) -> Reading:
    """See Reading. Raises UnsupportedError when bytes have no tokens, without which readers end themselves."""
    check_bytes(vocabulary, where)
    prefix, notes, objections = preparation(tokenizer, pieces)
    tokens = [
        token.replace(SPACE, " ") if kind == Kind.USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]
    fields: dict[str, Field] = {"tokenizer.ggml.tokens": strings(tokens)}
    if pieces is not None:
        told, problem = [pieces.score_of.get(token, 0.0) for token in vocabulary.tokens], ""
    else:
        told, problem = scores(tokenizer["model"], vocabulary)
    if problem and not prefix and merges_within_lines(tokenizer["model"]):
        merges = [f"{left} {right}" for left, right in pairs(tokenizer["model"]["merges"])]
        fields |= {
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string(BY_MERGES),
            "tokenizer.ggml.merges": strings(merges),
        }
        return Reading(name=BY_MERGES, fields=fields, notes=notes, objections=objections)
    fields |= {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string(BY_SCORES),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.scores": f32s(told),
    }
    objections += (problem,) if problem else ()
    return Reading(name=BY_SCORES, fields=fields, notes=notes, objections=objections)


def check_bytes(vocabulary: Vocabulary, where: str) -> None:
    known = set(vocabulary.tokens)
    lacking = [byte for byte in range(256) if f"<0x{byte:02X}>" not in known and chr(byte) not in known]
    if lacking:
        what = f"the tokenizer has byte fallback but no token for the byte <0x{lacking[0]:02X}>"
        raise UnsupportedError(where, f"{what}, for which readers of GGUF end themselves", ELSEWHERE)


def preparation(tokenizer: Mapping[str, Any], pieces: Pieces | None) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether a space is put before the text; notes and objections for steps that SentencePiece's readers do not do.

    Spaces become U+2581, by a normalizer (Replace, after which a Split at spaces finds none) or by Metaspace.
    """
    steps = [*normalizers_of(tokenizer), *pre_tokenizers_of(tokenizer)]
    roles = {id(step): role_of(step) for step in steps}
    found = {role for given in roles.values() for role in given}
    objections: tuple[str, ...] = ()
    notes = tuple(
        map(SPACES_PUT.format, [BEHIND.get(str(step.get("prepend_scheme")), "") for step in steps if yields(step)])
    )
    if REPLACES not in found:
        objections += ("the tokenizer has byte fallback but keeps spaces as they are, which readers of GGUF do not",)
    splits = any(step.get("type") == "Metaspace" and step.get("split", True) for step in steps)
    inner = next((token for token in tokenizer["model"]["vocab"] if SPACE in token.lstrip(SPACE)), None)
    if splits and inner is not None:
        objections += (
            f"the tokenizer splits at every space but has the token '{inner}', which readers of GGUF would use",
        )
    if strange := [step for step in steps if not roles[id(step)]]:
        names = "; ".join(shorten(step, 120) for step in strange)
        said = f"the tokenizer prepares text by steps that readers of GGUF do not know ({names})"
        if pieces is not None and not tokenizer["model"].get("merges"):
            return PREFIXES in found, notes, (*objections, said)
        difference = compare(encode(small(tokenizer)), encode(small(tokenizer, without(tokenizer, strange))))
        if difference.share:
            objections += (f"{said}; without them {difference} are cut otherwise",)
        else:
            notes += (f"{said}, which change nothing in a hard text",)
    return PREFIXES in found, notes, objections


def yields(step: Mapping[str, Any]) -> bool:
    """Whether a step puts a space before text only where there is none."""
    return step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"


def role_of(step: Mapping[str, Any]) -> tuple[str, ...]:
    """What a step does that readers of GGUF do too; empty for any other."""
    kind, at_spaces = step.get("type"), step.get("pattern") == {"String": " "}
    if kind == "Metaspace" and step.get("replacement", SPACE) == SPACE:
        return (REPLACES,) if step.get("prepend_scheme", "always") == "never" else (REPLACES, PREFIXES)
    if kind == "Replace" and at_spaces and step.get("content") == SPACE:
        return (REPLACES,)
    if kind == "Prepend" and step.get("prepend") == SPACE:
        return (PREFIXES,)
    return (IDLE,) if kind == "Split" and at_spaces else ()


def without(tokenizer: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tokenizer's normalizer and pre-tokenizer without some of their steps."""
    kept = [step for step in normalizers_of(tokenizer) if step not in steps]
    splits = [step for step in pre_tokenizers_of(tokenizer) if step not in steps]
    return {
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
    }


def merges_within_lines(model: Mapping[str, Any]) -> bool:
    """Whether no merge joins newlines with other text, which a reader that splits at newlines could not follow."""
    return not any("\n" in left + right and (left + right).strip("\n") for left, right in pairs(model["merges"]))


def scores(model: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[list[float], str]:
    """Scores that make SentencePiece's rule, join the pair whose token scores highest, follow the merges.

    The rule knows tokens only, so it is the same exactly when every pair that makes a token is a merge and all merges
    that make a token stand together. User-defined tokens are cut out of the text before it and take no part. A token
    that no merge makes is scored by its id, as SentencePiece does: conversions of Llama's tokenizer lost the merge of
    the one token whose score was zero, and its own reader has it.
    Gives the scores and, where scores cannot say what the merges do, why.
    """
    problem = ""
    merges = pairs(model["merges"])
    normal = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == Kind.NORMAL]
    apart = {
        token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == Kind.USER_DEFINED
    }
    made: dict[str, int] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token in apart:
            continue
        if token != last and token in made:
            problem = f"the merges that make '{token}' do not stand together, and GGUF stores one score for a token"
        made.setdefault(token, len(made))
        last = token
    ids = vocabulary.ids()
    by_id = all(ids[first] < ids[second] for first, second in pairwise(made))
    checked = (token for token in normal if not by_id or token in made)
    problem = problem or never_merged(checked, set(model["vocab"]) - apart, set(merges))
    ranks = ids if by_id else made
    return [
        float(-ranks[token]) if kind == Kind.NORMAL and token in ranks else 0.0
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ], problem


def never_merged(tokens: Iterable[str], known: set[str], merges: set[tuple[str, str]]) -> str:
    """A pair of tokens that makes one of `tokens` and is no merge, in words; empty when there is none."""
    for token in tokens:
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in known:
                right = token[cut:]
                if right in known and (left, right) not in merges:
                    return f"'{left}' and '{right}' are never merged to '{token}', but readers of GGUF would"
    return ""
