"""tokenizer.model: SentencePiece's own file, read with its own package.

Older models have nothing else, and where tokenizer.json is there too this file has the true scores. What it says is put
in the words of tokenizer.json, so that one way leads on from there. The package is imported only when such a file is
read.

Source: google/sentencepiece, sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converter.containers.gguf.vocabulary.tokens import SPACE, Kind, entries, shorten
from converter.errors import SourceError, UnsupportedError
from converter.untrusted import read_small

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
# Fairseq put tokens of its own before the pieces, in place of the first of them, and a mask behind; transformers'
# classes for these models number them so.
XLM = ("<s>", "<pad>", "</s>", "<unk>")
FAIRSEQ: Mapping[str, tuple[tuple[str, ...], int]] = {
    "xlm-roberta": (XLM, 3),
    "xlm-roberta-xl": (XLM, 3),
    "xmod": (XLM, 3),
    "camembert": (("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), 1),
}
FAIRSEQ_ROLES: Mapping[str, str] = {
    **{f"{role}_token": "<s>" for role in ("bos", "cls")},
    **{f"{role}_token": "</s>" for role in ("eos", "sep")},
    **{f"{role}_token": f"<{role}>" for role in ("unk", "pad", "mask")},
}


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What tokenizer.model says; `kinds` and `scores` go with `pieces`, by id; `roles` are ids of "bos" and others."""

    pieces: tuple[str, ...]
    kinds: tuple[Kind, ...]
    scores: tuple[float, ...]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    puts_space: bool
    collapses_spaces: bool
    roles: Mapping[str, int]

    @cached_property
    def score_of(self) -> dict[str, float]:
        """Scores of the pieces that text is made of."""
        return {
            piece: score
            for piece, kind, score in zip(self.pieces, self.kinds, self.scores, strict=True)
            if kind in (Kind.NORMAL, Kind.UNUSED)
        }


def read_pieces(folder: Path, where: str, needed: bool) -> Pieces | None:
    """What the SentencePiece file in `folder` says, None when there is none.

    needed: there is no other tokenizer, so a file that is none of SentencePiece's is an error; it is passed over
    otherwise, for some models keep tiktoken's ranks under the same name.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(read_small(path, where))
        broken = not model.pieces
    except DecodeError:
        broken = True
    if broken and not needed:
        return None
    remedy = "Save it as tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    if broken:
        raise SourceError(where, f"{path.name} is no model of SentencePiece's, or broken", remedy)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        what = f"{path.name} is of a kind that readers of GGUF do not know: words, letters, or spaces behind words"
        raise UnsupportedError(where, what, remedy)
    named = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    return Pieces(
        pieces=tuple(piece.piece for piece in model.pieces),
        kinds=tuple(Kind(piece.type) for piece in model.pieces),
        scores=tuple(piece.score for piece in model.pieces),
        unigram=trainer.model_type == UNIGRAM,
        byte_fallback=trainer.byte_fallback,
        charsmap=normalizer.precompiled_charsmap,
        puts_space=normalizer.add_dummy_prefix,
        collapses_spaces=normalizer.remove_extra_whitespaces,
        roles={role: number for role, number in named.items() if 0 <= number < len(model.pieces)},
    )


def as_tokenizer(pieces: Pieces, family: str) -> dict[str, Any]:
    """The pieces in the words of tokenizer.json; a BPE has no merges there, its scores say more.

    family: the model type, for those whose ids are not SentencePiece's.
    """
    entries = [[piece, score] for piece, score in zip(pieces.pieces, pieces.scores, strict=True)]
    kinds = list(pieces.kinds)
    processor = None
    if family in FAIRSEQ:
        first, replaced = FAIRSEQ[family]
        entries = [[token, 0.0] for token in first] + entries[replaced:] + [["<mask>", 0.0]]
        own = [Kind.UNKNOWN if token == "<unk>" else Kind.CONTROL for token in first]
        kinds = [*own, *kinds[replaced:], Kind.CONTROL]
        processor = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 0]}
    added = [
        {"id": number, "content": entry[0], "special": kind == Kind.CONTROL, "normalized": False}
        for number, (entry, kind) in enumerate(zip(entries, kinds, strict=True))
        if kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    unknown = next((number for number, kind in enumerate(kinds) if kind == Kind.UNKNOWN), None)
    normal: list[dict[str, Any]] = []
    if pieces.charsmap:
        charsmap = base64.b64encode(pieces.charsmap).decode()
        normal.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if pieces.collapses_spaces:
        normal.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normal.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    model: dict[str, Any] = {"type": "Unigram", "vocab": entries, "unk_id": unknown}
    if not pieces.unigram:
        vocabulary = {token: number for number, (token, _) in enumerate(entries)}
        unknown_token = None if unknown is None else entries[unknown][0]
        model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": unknown_token}
    if pieces.puts_space:  # also where there is one, as Metaspace does not
        normal.append({"type": "Prepend", "prepend": SPACE})
    return {
        "model": model | {"byte_fallback": pieces.byte_fallback},
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normal},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False},
        "post_processor": processor,
    }


def check_agreement(tokenizer: Mapping[str, Any], pieces: Pieces, where: str) -> None:
    """Raise SourceError when tokenizer.json and tokenizer.model have different vocabularies.

    Pieces may stand at other ids when all do by the same step (fairseq's models), and tokenizer.json may have added
    tokens and a few single letters beyond the pieces.
    """
    ids = {token: number for token, number, _ in entries(tokenizer["model"])}
    normal = [
        (piece, number) for number, (piece, kind) in enumerate(zip(pieces.pieces, pieces.kinds, strict=True))
        if kind == Kind.NORMAL
    ]  # fmt: skip
    lost = [piece for piece, _ in normal if piece not in ids]
    moved = {ids[piece] - number for piece, number in normal if piece in ids}
    added = {str(token["content"]) for token in tokenizer.get("added_tokens") or []}
    strange = [token for token in ids.keys() - set(pieces.pieces) - added if len(token) > 1]
    said = ""
    if lost:
        said = f"{len(lost)} pieces of tokenizer.model are not in tokenizer.json, such as '{shorten(lost[0], 40)}'"
    elif strange:
        said = f"{len(strange)} tokens of tokenizer.json are not in tokenizer.model, such as '{min(strange)}'"
    elif len(moved) > 1:
        said = "tokens have other ids in tokenizer.json than in tokenizer.model"
    if said:
        remedy = "They are of different models: fetch both again, or remove the one that the weights do not go with"
        raise SourceError(where, said, remedy)
