"""The token rows that a model is calibrated and measured on, from whatever text the manifest names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import Tensor

from converter import calibration, dataset
from converter.errors import SourceError
from converter.manifest import Calibration, Evaluation
from converter.tokenizer import tokenizer

REMEMBERED = 8  # sets of rows, 8 bytes a token

_at_hand: dict[str, Tensor] = {}  # token rows by digest, so that not every task of a process tokenizes the text again


def text_rows(
    settings: Calibration | Evaluation, folder: Path, name: str, cache: Path, closed: bool = False, place: str = ""
) -> Tensor:
    """The token rows [N, T] i64 of a manifest's text for the model in `folder`.

    closed: a row is a whole text, so that it ends with what the tokenizer puts behind one. cache receives the files of
    a data set on a hub. place: where in the manifest the text stands, for errors. Raises SourceError when the text
    cannot be read or is too short.
    """
    split: Literal["calibration", "evaluation"] = "calibration" if isinstance(settings, Calibration) else "evaluation"
    loaded = tokenizer(folder, f"model '{name}'")
    if settings.text.startswith("hub:"):
        wanted = settings.sequences * (settings.length - len(loaded.prefix))
        documents = dataset.documents(
            settings.text, split, cache, loaded.chat, lambda text: len(loaded.encode(f"{text}\n\n")), wanted
        )
    else:
        documents = calibration.documents(settings.text, Path(), split, loaded.chat)
    return calibration.token_rows(
        documents,
        loaded.encode,
        settings.sequences,
        settings.length,
        settings.seed if isinstance(settings, Calibration) else 0,
        f"{place}: {split} text of model '{name}'".removeprefix(": "),
        loaded.prefix,
        loaded.suffix if closed else (),
    )


def remember(rows: Tensor) -> str:
    """Keep token rows at hand for later tasks in this process; returns their digest."""
    sha256 = calibration.digest(rows)
    _at_hand.pop(sha256, None)
    while len(_at_hand) >= REMEMBERED:
        del _at_hand[next(iter(_at_hand))]
    _at_hand[sha256] = rows
    return sha256


def planned_rows(sha256: str, read: Callable[[], Tensor], where: str) -> Tensor:
    """The token rows of this digest: those at hand, or what `read` gives. Raises SourceError when that is another."""
    if sha256 not in _at_hand and (found := remember(read())) != sha256:
        what = f"its token rows are not those that the run was planned with ({found[:12]}, not {sha256[:12]})"
        raise SourceError(where, what, "Leave text and tokenizer as they are while a run lasts, and run again")
    return _at_hand[sha256]
