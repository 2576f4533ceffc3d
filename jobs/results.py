"""What a run leaves beside its artifacts: the comparison, from what tasks recorded, also when others failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converter.compare import report, tables
from converter.manifest import Job, Manifest
from jobs.drive import Progress
from jobs.prepare import Prepared
from jobs.store import Store, write_json, write_text
from jobs.task import Graph


def write_results(prepared: Prepared, state: Progress, store: Store) -> list[dict[str, Any]]:
    """Write comparison.json, the two Parquet tables, the report and its picture; gives the comparison's rows."""
    manifest, folder = prepared.manifest, store.run
    rows = [_row(store, job, prepared, state) for job in manifest.jobs()]
    measured = _measured(prepared.plan.graph, state, store)
    sources = _sources(manifest, rows)
    texts = {
        "calibration": manifest.calibration.model_dump(mode="json", exclude={"keep"}),
        "evaluation": manifest.evaluation.model_dump(mode="json"),
    }
    content = tables.comparison(manifest.name, sources, rows, texts)
    tensors = [
        {"model": subject.rpartition("/")[0], "target": subject.rpartition("/")[2]} | dict(tensor)
        for subject, record in measured.items()
        for tensor in record["tensors"]
    ]
    blocks = {
        (subject.rpartition("/")[0], subject.rpartition("/")[2]): record["blocks"]
        for subject, record in measured.items()
    }
    tables.write_table(tables.artifact_table(rows), folder / "comparison.parquet")
    tables.write_table(tables.tensor_table(tensors), folder / "tensors.parquet")
    write_text(folder / "report.html", report.report_html(content, tensors, blocks))
    write_text(folder / "comparison.svg", report.comparison_svg(content))
    write_json(folder / "comparison.json", content)
    return rows


def _measured(graph: Graph, state: Progress, store: Store) -> dict[str, dict[str, Any]]:
    """The evaluation records of finished jobs, by model/target."""
    return {
        task.subject: store.record(key)
        for key, task in graph.tasks.items()
        if task.kind == "evaluate" and key in state.done
    }


def _row(store: Store, job: Job, prepared: Prepared, state: Progress) -> dict[str, Any]:
    """The job's row of the comparison, whatever became of it."""
    row = {"model": job.model.name, "target": job.target.name, "format": job.target.format}
    if job.key in prepared.problems:
        return row | {"status": "skipped", "error": prepared.problems[job.key]}
    graph = prepared.plan.graph
    finish = next(key for key, task in graph.tasks.items() if task.kind == "finish" and task.subject == job.key)
    if finish in state.done:
        done: dict[str, Any] = store.record(finish)["row"]
        return done
    for key, error in state.failed.items():
        if key == finish or finish in graph.dependents(key):
            return row | {"status": "failed", "error": error}
    return row | {"status": "skipped", "error": "left out by --only and not made before"}


def _sources(manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The originals with their own figures, one a model."""
    found: dict[str, dict[str, Any]] = {
        job.model.name: {"model": job.model.name, "source": job.model.source.partition(":")[0]}
        for job in manifest.jobs()
    }
    for row in rows:
        if row["status"] == "done":
            found[row["model"]] |= row["source"]
    return list(found.values())
