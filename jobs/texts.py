"""The token rows that a model is calibrated and measured on, from whatever text the manifest names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from converter import calibration, dataset
from converter.manifest import Calibration, Evaluation
from converter.tokenizer import tokenizer


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
