"""What a step works with: its task, where its files go, and the model where its weights were fetched to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.store import Report, Store
from jobs.task import Task
from jobs.work import Model, Work


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a step works with: its task, the run's store, a folder for its files, a record for what it found out."""

    task: Task
    work: Work
    store: Store
    folder: Path
    record: dict[str, Any]
    threads: int
    report: Report


def here(attempt: Attempt) -> Model:
    """The model with its weights where the fetch task put them."""
    model = attempt.work.model
    folder = Path(attempt.store.record(attempt.work.fetched)["folder"])
    return replace(model, snapshot=replace(model.snapshot, folder=folder))


def read(model: Model, name: str) -> Tensor:
    return model.snapshot.read(name).to(torch.float32)
