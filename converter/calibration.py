"""From text to token rows: the same text, tokenizer and seed give the same rows everywhere.

Documents are joined and cut into windows, one from each of as many equal stretches of the text, so that all of it is
touched however few rows are asked for; no padding, since padded positions would have to be masked out of every
statistic. Each row begins with what the model expects in front of a sequence (Gemma without its begin token computes
nonsense). The alternative, one document per row, keeps sentences whole but wastes what does not fill a row.
"""

# N sequences, T tokens of a sequence
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from converter.errors import HubmillError, SourceError

MARKER = "\n%%\n"  # between the documents of a built-in text

Chat = Callable[[list[dict[str, Any]]], str]


def documents(text: str, folder: Path, split: Literal["calibration", "evaluation"], chat: Chat) -> list[str]:
    """The documents that a manifest's `text` names: builtin | file:path. For hub: see converter/dataset.py.

    folder: what relative paths start from. split: which half of the built-in text. chat: messages -> text, for JSON
    lines with "messages". A file is one document, unless it ends in .jsonl: then each line is one.
    Raises SourceError when a file cannot be read or holds no text.
    """
    assert not text.startswith("hub:"), "a data set on a hub is read by converter.dataset"
    if text == "builtin":
        written = (resources.files("converter") / "texts" / f"{split}.txt").read_text("utf-8")
        return [document.strip("\n") for document in written.split(MARKER)]
    path = folder / text.removeprefix("file:")
    try:
        written = path.read_text("utf-8")
    except OSError as error:
        raise SourceError(str(path), f"the text cannot be read: {error.strerror}", "Mend the path") from error
    except UnicodeDecodeError as error:
        raise SourceError(str(path), f"the text is not UTF-8 at byte {error.start}", "Convert it to UTF-8") from error
    found = _json_lines(path, written, chat) if path.suffix == ".jsonl" else [written]
    if not any(document.strip() for document in found):
        raise SourceError(str(path), "there is no text in it", "Name a file with text")
    return found


def token_rows(
    texts: list[str],
    encode: Callable[[str], list[int]],
    sequences: int,
    length: int,
    seed: int,
    where: str,
    prefix: tuple[int, ...] = (),
    suffix: tuple[int, ...] = (),
) -> Tensor:
    """Token rows [N = sequences, T = length] i64 that cover the texts evenly and do not overlap.

    prefix begins every row, suffix ends it, and both count towards its length. The seed shifts each window within its
    stretch of the text. Raises SourceError when the texts have too few tokens; `where` names them.
    """
    assert length > len(prefix) + len(suffix), "a row must hold more than what is put around it"
    tokens = torch.tensor([token for text in texts for token in encode(f"{text}\n\n")], dtype=torch.int64)
    window = length - len(prefix) - len(suffix)
    if len(tokens) < sequences * window:
        most = len(tokens) // window
        fit = f"at most {most} sequences of length {length}" if most else f"a length below {len(tokens)}"
        raise SourceError(
            where,
            f"the text has {len(tokens)} tokens; {sequences} sequences of length {length} take {sequences * window}",
            f"Ask for {fit}, or give more text with file:...",
        )
    edges = [n * len(tokens) // sequences for n in range(sequences + 1)]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(sequences, length, dtype=torch.int64)
    for n in range(sequences):
        slack = edges[n + 1] - edges[n] - window
        start = edges[n] + int(torch.randint(slack + 1, (), generator=generator))
        around = [torch.tensor(added, dtype=torch.int64) for added in (prefix, suffix)]
        rows[n] = torch.cat([around[0], tokens[start : start + window], around[1]])
    return rows


def conversation(chat: Chat, messages: list[Any], where: str) -> str:
    """The text of a conversation by the tokenizer's template; raises SourceError when the template refuses it."""
    try:
        return chat(messages)
    except HubmillError:
        raise
    except Exception as error:  # a template is code from a model's folder, and raises what it likes
        what = f"the chat template refuses these messages: {error}"
        raise SourceError(where, what, "Give messages with the roles that this model knows, or plain text") from error


def digest(rows: Tensor) -> str:
    """The sha256 of token rows, 64 hex digits, over their shape and their values as little-endian 64-bit integers."""
    shape = "x".join(map(str, rows.shape))
    return hashlib.sha256(shape.encode() + b"\0" + rows.numpy().astype("<i8").tobytes()).hexdigest()


def _json_lines(path: Path, written: str, chat: Chat) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(written.split("\n"), start=1):  # splitlines would cut at U+2028 inside a string
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry: Any = json.loads(line)
        except ValueError as error:
            raise SourceError(where, f"not JSON: {error}", "Write one JSON object per line") from error
        match entry:
            case {"text": str(text)}:
                found.append(text)
            case {"messages": [*messages]}:
                found.append(conversation(chat, messages, where))
            case _:
                what = 'neither "text" with a string nor "messages" with a list'
                raise SourceError(where, what, 'Write {"text": ...} or {"messages": [...]} on each line')
    return found
