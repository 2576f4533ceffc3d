"""What travels beside the weights: config, tokenizer, chat template, processor, licence and whatever else a model has.

A list of what stays behind instead of a list of what travels: a file that a new kind of model needs arrives without
anybody naming it here. The price is that a stray file travels too, up to a size. Python files travel as data for those
who run them; nothing here does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import SourceError
from converter.folder import check_path
from converter.source import travels
from converter.untrusted import parse_json, read_small

if TYPE_CHECKING:
    from converter.source import Snapshot

# Written anew for each artifact, or about the files of the source's own repository.
STAYS = (
    *("readme.md", "model_card.md", "sha256sums", "provenance.json"),
    # about the codes of a source that is quantized itself, which come decoded
    *("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),
)
STAYS_ENDINGS = (".index.json", ".msgpack.index", ".gitattributes")


def small_files(snapshot: Snapshot) -> tuple[str, ...]:
    """The files of the model that an artifact takes along, sorted; hidden files and weights stay behind."""
    return tuple(
        name
        for name, size in sorted(snapshot.files.items())
        if travels(name, size)
        and name.lower() not in STAYS
        and not name.lower().endswith(STAYS_ENDINGS)
        and not any(part.startswith(".") for part in name.split("/"))
    )


def original_config(snapshot: Snapshot) -> dict[str, Any]:
    """The model's config.json as it is, {} when there is none: a snapshot has what it says of the text on top.

    Only that the head is the embedding is denied where the snapshot has a head of its own.
    """
    if "config.json" not in snapshot.files:
        return {}
    config = parse_json(read_small(snapshot.folder / "config.json", snapshot.repo), f"{snapshot.repo}: config.json")
    return config | ({"tie_word_embeddings": False} if snapshot.untied else {})


def copy_small_files(snapshot: Snapshot, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Copy the small files of the model into `folder`, under their names, except those in `without`.

    Raises SourceError when a file is gone or its name leads out of the folder.
    """
    for name in small_files(snapshot):
        if name in without:
            continue
        check_path(name, snapshot.repo)
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(snapshot.folder / name, place)
        except FileNotFoundError as error:
            what = f"the file {name} was listed but is not here"
            raise SourceError(snapshot.repo, what, "Fetch the model again, or put the file back") from error
