"""The small files beside the weights that define a tokenizer, read and put in the words of tokenizer.json.

Models from before tokenizer.json have vocab.json and merges.txt, vocab.txt, or SentencePiece's own file, with the rest
in their Python class; for the classes below that rest is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.containers.gguf.vocabulary.sentencepiece import (
    FAIRSEQ,
    FAIRSEQ_ROLES,
    Pieces,
    as_tokenizer,
    check_agreement,
    read_pieces,
)
from converter.containers.gguf.vocabulary.splittings import QWEN2, QWEN35
from converter.containers.gguf.vocabulary.tokens import entries
from converter.errors import SourceError
from converter.untrusted import load_json, read_small

SAVE_AGAIN = "Save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
MEND = "Mend the file, or fetch it again"
# Splitting by transformers' class, or model type where no class is named; None is GPT-2's.
PATTERNS: dict[str, str | None] = {"qwen2": QWEN2, "qwen3": QWEN2, "qwen3_5": QWEN35}
PATTERNS |= dict.fromkeys(
    (
        "gpt2",
        "gptj",
        "gpt_neo",
        "gptneox",
        "gpt_neox",
        "codegen",
        "phi",
        "opt",
        "starcoder2",
        "roberta",
        "bart",
        "longformer",
    )
)
COMPOSES = ("qwen2", "qwen3", "qwen3_5", "gptneox", "gpt_neox")  # their text is put into NFC first
ROBERTA = ("roberta", "bart", "longformer")


@dataclass(frozen=True, kw_only=True)
class Files:
    """A tokenizer's files, parsed; `templates` are chat templates by name ("default" first).

    tokenizer: tokenizer.json, or what it would be. pieces: SentencePiece's file, where it agrees. bare: there was no
    tokenizer.json, and `pieces` are all that is known. notes: where the files contradict each other.
    """

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    templates: Mapping[str, str]
    pieces: Pieces | None
    bare: bool
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return str(self.config.get("model_type", ""))


def read_files(folder: Path, config: Mapping[str, Any], where: str) -> Files:
    """The tokenizer's files.

    Raises SourceError when there are none, or when they are broken or contradict each other.
    """
    settings = read_json(folder / "special_tokens_map.json", where) | read_json(folder / "tokenizer_config.json", where)
    tokenizer = read_json(folder / "tokenizer.json", where)
    pieces = read_pieces(folder, where, needed=not tokenizer and not (folder / "vocab.json").is_file())
    bare = not tokenizer
    notes: tuple[str, ...] = ()
    if tokenizer:
        check_layout(tokenizer, where)
        tokenizer, notes = completed(tokenizer, listed_elsewhere(folder, settings, where))
        if pieces is not None:
            check_agreement(tokenizer, pieces, where)
    elif pieces is not None:
        family = str(config.get("model_type", ""))
        settings = {**FAIRSEQ_ROLES, **settings} if family in FAIRSEQ else settings
        tokenizer = with_added(as_tokenizer(pieces, family), folder, settings, where)
    elif (folder / "vocab.json").is_file():
        tokenizer = with_added(from_merges(folder, settings, config, where), folder, settings, where)
    elif (folder / "vocab.txt").is_file():
        tokenizer = with_added(from_words(folder, settings, where), folder, settings, where)
    else:
        what = "the model has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)"
        raise SourceError(where, f"{what}, without which a GGUF file is of no use", SAVE_AGAIN)
    return Files(
        tokenizer=tokenizer,
        settings=settings,
        config=config,
        generation=read_json(folder / "generation_config.json", where),
        templates=read_templates(folder, settings, where),
        pieces=pieces,
        bare=bare and pieces is not None,
        notes=notes,
    )


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no such file; raises SourceError when it is broken."""
    parsed = read_any_json(path, where)
    if not isinstance(parsed, dict):
        raise SourceError(where, f"{path.name} is no JSON object", MEND)
    return parsed


def read_any_json(path: Path, where: str) -> Any:
    if not path.is_file():
        return {}
    return load_json(read_small(path, where), f"{where}: {path.name}")


def read_lines(path: Path, where: str) -> list[str]:
    """The lines of a text file, without their ends; only newlines end them, for tokens may be other separators."""
    try:
        text = read_small(path, where).decode("utf-8")
        return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    except ValueError as error:
        raise SourceError(where, f"{path.name} is broken: {error}", MEND) from error


def check_layout(tokenizer: Mapping[str, Any], where: str) -> None:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise SourceError(where, "tokenizer.json holds no vocabulary", "Save the tokenizer again")


def read_templates(folder: Path, settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Chat templates by name; those in files of their own win over those in tokenizer_config.json."""
    found: dict[str, str] = {}
    for given in (settings.get("chat_template"), read_json(folder / "chat_template.json", where).get("chat_template")):
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            listed = [entry for entry in given if isinstance(entry, dict) and {"name", "template"} <= entry.keys()]
            found |= {str(entry["name"]): str(entry["template"]) for entry in listed}
    paths = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in paths:
        if path.is_file():
            name = "default" if path.parent == folder else path.stem
            ends = read_small(path, where).endswith(b"\n")
            found[name] = "\n".join(read_lines(path, where)) + ("\n" if ends else "")
    return found


def slow_class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The tokenizer's class without its ending, in small letters, or else the model type."""
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    return named if named not in ("", "pretrained", "tokenizersbackend") else str(config.get("model_type", ""))


def from_merges(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """vocab.json and merges.txt, as the byte-level BPE that the tokenizer's class makes of them."""
    kind = slow_class(settings, config)
    if kind not in PATTERNS:
        what = f"the tokenizer is vocab.json and merges.txt, and how a '{kind}' splits text is written in Python only"
        raise SourceError(where, what, SAVE_AGAIN)
    if not (folder / "merges.txt").is_file():
        raise SourceError(where, "the tokenizer has vocab.json but no merges.txt", SAVE_AGAIN)
    lines = read_lines(folder / "merges.txt", where)
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    vocabulary = read_json(folder / "vocab.json", where)
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(settings.get("add_prefix_space", False))}
    pattern = PATTERNS[kind]
    splits: list[dict[str, Any]] = [byte_level | {"use_regex": True}]
    if pattern is not None:
        isolate = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        splits = [isolate, byte_level | {"use_regex": False}]
    processor = None
    if kind in ROBERTA:
        before, after = (
            text_of(settings.get(f"{role}_token"), text) for role, text in (("cls", "<s>"), ("sep", "</s>"))
        )
        processor = {"type": "RobertaProcessing", "cls": [before, 0], "sep": [after, 0]}
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "normalizer": {"type": "NFC"} if kind in COMPOSES else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": processor,
    }


def from_words(folder: Path, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """vocab.txt, as the WordPiece that BERT's class makes of it."""
    words = read_lines(folder / "vocab.txt", where)
    cls, sep, unknown = (text_of(settings.get(f"{role}_token"), f"[{role.upper()}]") for role in ("cls", "sep", "unk"))
    lower = bool(settings.get("do_lower_case", True))
    normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": lower}
    normalizer["handle_chinese_chars"] = bool(settings.get("tokenize_chinese_chars", True))
    normalizer["strip_accents"] = settings.get("strip_accents")
    pieces = {role: {"SpecialToken": {"id": text, "type_id": 0}} for role, text in (("cls", cls), ("sep", sep))}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "model": {
            "type": "WordPiece",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [pieces["cls"], one, pieces["sep"]],
            "pair": [pieces["cls"], one, pieces["sep"], two, pieces["sep"]],
            "special_tokens": {},
        },
    }


def text_of(given: Any, default: str) -> str:
    """The text of a token that settings name, plainly or as an object."""
    content = given.get("content") if isinstance(given, dict) else given
    return default if content is None else str(content)


def listed_elsewhere(folder: Path, settings: Mapping[str, Any], where: str) -> dict[int, dict[str, Any]]:
    """The added tokens by id that tokenizer_config.json lists, or, as in transformers, else added_tokens.json."""
    listed = settings.get("added_tokens_decoder")
    if listed:
        return {int(number): {"id": int(number), **token} for number, token in listed.items()}
    older = read_json(folder / "added_tokens.json", where)
    return {int(number): {"id": int(number), "content": text, "special": False} for text, number in older.items()}


def completed(
    tokenizer: dict[str, Any], listed: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """tokenizer.json with added tokens that only other files list, as in transformers, and what is said of it."""
    known = {number: token for token, number, _ in entries(tokenizer["model"])}
    known |= {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or []}
    texts = set(known.values())
    more = [dict(token) for number, token in listed.items() if number not in known and token["content"] not in texts]
    others = [number for number, token in listed.items() if number in known and token["content"] != known[number]]
    said = "tokenizer.json and other files have different tokens of the same number, such as {}: the former are taken"
    shown = [f"{number}, '{known[number]}' and '{listed[number]['content']}'" for number in others[:1]]
    return tokenizer | {"added_tokens": [*(tokenizer.get("added_tokens") or []), *more]}, tuple(map(said.format, shown))


def with_added(tokenizer: dict[str, Any], folder: Path, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tokenizer without tokenizer.json, with the added tokens that its other files list."""
    listed = tokenizer["model"]["vocab"]
    known = dict(listed) if isinstance(listed, Mapping) else {entry[0]: place for place, entry in enumerate(listed)}
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    for number, token in listed_elsewhere(folder, settings, where).items():
        added[number] = token
        known[token["content"]] = number
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    named = [text_of(settings.get(f"{role}_token"), "") for role in roles]
    named += [text_of(given, "") for given in settings.get("additional_special_tokens") or []]
    if tokenizer["model"]["type"] == "WordPiece":
        named += ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for text in named:
        if text in known:
            token = added.get(known[text], {"id": known[text], "content": text})
            added[known[text]] = token | {"special": True}
    return tokenizer | {"added_tokens": [added[number] for number in sorted(added)]}
