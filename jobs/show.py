"""What a run would do, as plain data for the command line to print."""

from __future__ import annotations

from collections import Counter
from typing import Any

from converter.compare.card import stated_licence
from jobs.convert import Ready, Run
from jobs.needs import chain_forwards, disk_bytes, learning_passes, memory_bytes
from jobs.task import Graph
from jobs.work import Model, PlannedJob, Work


def plan_json(run: Run, ready: Ready) -> dict[str, Any]:
    """The plan as JSON values: jobs with every tensor, what is needed and what the machine has."""
    plan = ready.prepared.plan
    chosen = run.chosen()
    tasks = [plan.graph.tasks[key] for key in ready.needed]
    jobs = [_job_json(job, ready) for job in plan.jobs if job.subject in chosen]
    models = {job.model.name: job.model for job in plan.jobs if job.subject in chosen}
    refused = [
        {"job": key, "state": "refused", "files": {}, "exact": True, "types": {}, "notes": [error], "tensors": []}
        for key, error in ready.prepared.problems.items()
        if key in chosen
    ]
    return {
        "name": run.manifest.name,
        "models": [_model_json(model, plan.graph) for model in models.values()],
        "jobs": jobs + refused,
        "tasks": len(plan.graph.tasks),
        "tasks_needed": len(ready.needed),
        "needs": {"disk_bytes": disk_bytes(tasks), "memory_bytes": memory_bytes(tasks)},
        "machine": {
            "cpus": ready.room.cpus,
            "memory_bytes": ready.room.memory_bytes,
            "disk_bytes": ready.room.disk_bytes,
        },
        "statistics": [
            {
                "model": shelf.model,
                "folder": str(shelf.folder),
                "blocks": shelf.blocks,
                "there": shelf.there,
                "bytes": shelf.size_bytes,
            }
            for shelf in ready.shelves
        ],
        "refused": list(ready.reasons),
    }


def _model_json(model: Model, graph: Graph) -> dict[str, Any]:
    """A model as its hub or folder has it, and how it is run; its licence goes into the cards of its artifacts."""
    snapshot = model.snapshot
    licence, gap = stated_licence(snapshot.folder)
    notes = [gap.rstrip(".")] if gap else []
    if snapshot.gated:
        notes.append("It is gated: who loads an artifact accepts no terms, unless you gate its repository, too")
    calibrated = (task.work for task in graph.tasks.values() if (task.kind, task.subject) == ("calibrate", model.name))
    work = next(calibrated, None)
    if isinstance(work, Work) and work.texts.calibration.precision != "f32":
        notes.append(f"Linears multiply in {work.texts.calibration.precision} where a target is calibrated")
    return {"model": model.name, "repo": snapshot.repo, "commit": snapshot.commit, "licence": licence, "notes": notes}


def _job_json(job: PlannedJob, ready: Ready) -> dict[str, Any]:
    graph = ready.prepared.plan.graph
    left = [key for key in ready.needed if graph.tasks[key].subject == job.subject]
    tensors = job.artifact.tensors
    fallbacks = Counter(tensor.fallback for tensor in tensors if tensor.fallback)
    notes = [f"{count} x {reason}" for reason, count in fallbacks.items()]
    notes += [f"{name} is left out: {reason}" for name, reason in job.artifact.dropped.items()]
    if job.target.has_chain:
        more = f"{chain_forwards(job)} forwards more for each of {job.model.blocks} blocks"
        notes.append(f"propagate: quantized takes {more}")
    if "autoround" in job.target.methods:
        passes = learning_passes(job, ready.prepared.manifest.calibration.sequences)
        notes.append(f"autoround takes {passes:g} passes forward and back for each of {job.model.blocks} blocks")
    return {
        "job": job.subject,
        "state": f"{len(left)} tasks" if left else "done",
        "format": job.target.format,
        "files": dict(job.artifact.files),
        "exact": job.artifact.exact,
        "types": dict(Counter(tensor.grid.name for tensor in tensors)),
        "notes": [*notes, *job.artifact.notes],
        "repo": job.place.repo if job.place else None,
        "tensors": [
            {
                "name": tensor.name,
                "source": tensor.source,
                "shape": list(tensor.shape),
                "type": tensor.grid.name,
                "bytes": tensor.size_bytes,
                "fallback": tensor.fallback,
            }
            for tensor in tensors
        ],
    }
