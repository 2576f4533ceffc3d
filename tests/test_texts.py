"""Token rows between a run's plan and its tasks: read once a process, and never other ones than were planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from converter import manifest
from converter.calibration import digest
from converter.errors import SourceError
from jobs import texts
from jobs.convert import Run, plan
from jobs.drive import InProcess, drive

QUICKSTART = Path(__file__).parent.parent / "manifests" / "quickstart" / "model"


def test_rows_are_read_once_and_the_oldest_are_forgotten() -> None:
    rows = [torch.full((2, 3), number) for number in range(texts.REMEMBERED + 1)]
    keys = [texts.remember(one) for one in rows]
    assert keys == [digest(one) for one in rows]

    def read() -> torch.Tensor:
        raise AssertionError("they are at hand")

    for key, one in list(zip(keys, rows, strict=True))[1:]:
        assert texts.planned_rows(key, read, "here") is one
    again = texts.planned_rows(keys[0], lambda: rows[0].clone(), "here")
    assert torch.equal(again, rows[0])


def test_a_text_that_changed_after_the_plan_is_not_taken_for_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What was planned. " * 400)
    written = {
        "name": "changed",
        "models": [{"source": f"folder:{QUICKSTART}"}],
        "targets": {"w4": {"format": "compressed-tensors", "scheme": "W4A16", "method": "gptq"}},
        "calibration": {"text": "file:text.txt", "sequences": 2, "length": 64},
        "evaluation": {"sequences": 1, "length": 64},
    }
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(written))
    run = Run(manifest=manifest.load(tmp_path / "manifest.yaml"), out=tmp_path / "out", executor="inprocess")
    ready = plan(run)
    graph = ready.prepared.plan.graph
    text.write_text("Something else. " * 400)
    texts._at_hand.clear()  # as in another process
    wanted = [key for key in ready.needed if graph.tasks[key].kind in ("fetch", "calibrate")]
    state = drive(graph, wanted, set(), InProcess(1), run.store, lambda event: None)
    assert "are not those that the run was planned with" in state.failed[wanted[1]]


def test_other_rows_than_planned_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"text x: its token rows are not those .* run again"):
        texts.planned_rows("0" * 64, lambda: torch.zeros(1, 1, dtype=torch.int64), "text x")
