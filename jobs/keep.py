"""Statistics that outlive a run: a folder that several manifests share, looked up by what decides them.

    <folder>/<16 hex digits>/about.json               what decides the statistics below, for people
    <folder>/<16 hex digits>/block-0007.safetensors   those of one block, as calibration leaves them

The digits are a sha256 over the model's commit, the token rows, the settings, the taps, the device and the versions of
what computes: two manifests with the same of these would calibrate to the same bytes, so the second takes what the
first kept and runs no forward. A file that holds more than is asked serves too; one that lacks something is completed,
both being of the same rows. It is written whole under a temporary name, and carries a sha256 of its content: what is
damaged is made anew.

The alternative, keeping the whole of a run's `.work`, would keep hidden states as well, which are most of it, and would
serve one manifest only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter import tensor_file
from converter.caches import KEYS, VALUES
from converter.errors import SourceError
from converter.stats import Counted, histogram_of_tap
from jobs.needs import statistics_disk
from jobs.store import sync_folder, write_json
from jobs.task import RECIPES, Task
from jobs.work import Work

CONTENT = "content_sha256"
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is wanted of a block's statistics beyond the sums, as in `calibrate_block`; gram: names of taps."""

    gram: frozenset[str] = frozenset()
    counted: Mapping[str, Counted] = field(default_factory=dict)
    cache: bool = False

    def covers(self, other: Asked) -> bool:
        """Whether statistics of this hold all that the other wants."""
        counted = all(self.counted.get(tap) in (how, "column") for tap, how in other.counted.items())
        return self.gram >= other.gram and counted and (self.cache or not other.cache)

    def __or__(self, other: Asked) -> Asked:
        counted = {**self.counted, **other.counted}
        counted |= {tap: "column" for asked in (self, other) for tap, how in asked.counted.items() if how == "column"}
        return Asked(gram=self.gram | other.gram, counted=counted, cache=self.cache or other.cache)

    def to_json(self) -> str:
        """These wishes as text that says the same for equal ones."""
        return json.dumps(
            {"gram": sorted(self.gram), "counted": dict(self.counted), "cache": self.cache}, sort_keys=True
        )


def asked_of(work: Work) -> Asked:
    """What this calibrate task's readers want."""
    return Asked(gram=frozenset(work.gram_taps), counted=work.counted, cache=work.watch_cache)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A block's statistics as `stats.pack` gives them, and how many rows were left out because they overflowed."""

    tensors: Mapping[str, Tensor]
    skipped: int


def identity(work: Work) -> dict[str, Any]:
    """What decides the statistics of a model's blocks, JSON values."""
    assert work.model.architecture is not None
    return {
        "repo": work.model.snapshot.repo,
        "commit": work.model.snapshot.commit,
        "rows_sha256": work.texts.calibration_sha256,
        "settings": work.texts.calibration.model_dump(mode="json", exclude={"text", "keep"}),
        "taps": {tap.name: list(tap.linears) for tap in work.model.architecture.taps},
        "device": work.device,
        "recipe": RECIPES["calibrate"],
        "versions": {name: version(name) for name in LIBRARIES},
    }


def folder_of(work: Work) -> Path:
    """Where the statistics of the work's model are kept; the manifest names a folder for them."""
    assert work.keep
    decisive = {name: value for name, value in identity(work).items() if name != "repo"}  # a copy has the same commit
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return Path(work.keep) / digest[:16]


def block_file(folder: Path, block: int) -> Path:
    """Where the statistics of a block lie."""
    return folder / f"block-{block:04d}.safetensors"


def holds(path: Path, asked: Asked) -> bool:
    """Whether the file says that it has what is asked; its content is not looked at."""
    try:
        return path.is_file() and _asked_in(tensor_file.load(path)).covers(asked)
    except (SourceError, ValueError, KeyError, TypeError):
        return False


def take(path: Path, asked: Asked) -> Kept | None:
    """Exactly what is asked, as calibration would leave it; None when the file is not there or lacks something.

    Raises SourceError when it is damaged.
    """
    if not path.is_file():
        return None
    tensors, found, skipped = _read(path)
    if not found.covers(asked):
        return None
    return Kept(tensors=_only(tensors, asked), skipped=skipped)


def put(work: Work, block: int, kept: Kept, asked: Asked) -> None:
    """Keep a block's statistics, together with what is there already of the same rows."""
    folder = folder_of(work)
    path = block_file(folder, block)
    tensors = dict(kept.tensors)
    try:
        there = _read(path) if path.is_file() else None
    except SourceError:
        there = None
    if there and there[1].covers(asked):
        return
    if there:
        larger = {name: one for name, one in there[0].items() if name in tensors and len(one) > len(tensors[name])}
        tensors, asked = {**there[0], **tensors, **larger}, there[1] | asked
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "about.json").is_file():
        write_json(folder / "about.json", identity(work))
    metadata = {"asked": asked.to_json(), "skipped": str(kept.skipped), CONTENT: _digest(tensors)}
    tensor_file.save(path, tensors, metadata)
    for one in (path, folder):
        sync_folder(one)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where a model's statistics are kept: of so many blocks `there` are there, and the others take `size_bytes`."""

    model: str
    folder: Path
    blocks: int
    there: int
    size_bytes: int


def shelves(tasks: Iterable[Task]) -> list[Shelf]:
    """A shelf for each model that has calibrate tasks among these whose statistics are kept."""
    works: dict[str, list[tuple[int, Work]]] = {}
    for task in tasks:
        if task.kind == "calibrate" and isinstance(task.work, Work) and task.work.keep and task.block is not None:
            works.setdefault(task.subject, []).append((task.block, task.work))
    found = []
    for model, blocks in works.items():
        folder = folder_of(blocks[0][1])
        missing = [(b, work) for b, work in blocks if not holds(block_file(folder, b), asked_of(work))]
        size = sum(statistics_disk(work.model, b, bool(work.gram_taps), work.counted) for b, work in missing)
        there = len(blocks) - len(missing)
        found.append(Shelf(model=model, folder=folder, blocks=len(blocks), there=there, size_bytes=size))
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], Asked, int]:
    """Everything in a file. Raises SourceError when it is not what was written."""
    file = tensor_file.load(path)
    tensors = dict(file)
    if file.metadata.get(CONTENT) != _digest(tensors):
        raise SourceError(str(path), "the content is not what was written", "Remove it: it is made anew")
    return tensors, _asked_in(file), int(file.metadata["skipped"])


def _asked_in(file: tensor_file.TensorFile) -> Asked:
    said = json.loads(file.metadata["asked"])
    return Asked(gram=frozenset(said["gram"]), counted=said["counted"], cache=said["cache"])


def _only(tensors: Mapping[str, Tensor], asked: Asked) -> dict[str, Tensor]:
    """What calibration leaves when nothing but this is asked."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tap, _, part = name.rpartition("/")
        if tap in (KEYS, VALUES) and not asked.cache:
            continue
        if part == "gram_upper" and tap not in asked.gram:
            continue
        if part == "histogram":
            if tap not in asked.counted:
                continue
            tensor = histogram_of_tap(tensor) if asked.counted[tap] == "tap" else tensor
        found[name] = tensor
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
