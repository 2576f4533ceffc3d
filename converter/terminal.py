"""What the commands print of plans, models, runs and comparisons: plain data in, tables and lines out.

`converter/progress.py` puts them on the screen; with --json the command line prints the data themselves.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from converter.progress import bytes_text, count_text, duration_text, print_line, print_table, time_text

TASK_WORDS = {"running": "running", "done": "done", "failed": "failed", "skipped": "left out"}
# What is measured of a model's output: key in comparison.json, head of the column, how its figure is written.
OUTPUT_COLUMNS = (
    ("perplexity", "perplexity", "{:.3f}"),
    ("kl_mean", "KL divergence", "{:.5f}"),
    ("top1_agreement", "same top token", "{:.1%}"),
    ("embedding_cosine", "embedding cosine", "{:.5f}"),
    ("neighbour_agreement", "same neighbour", "{:.1%}"),
)


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print what `show.plan_json` gives."""
    rows = []
    for job in plan["jobs"]:
        size = ", ".join(
            f"{name} {'' if job['exact'] else '≤ '}{bytes_text(count)}" for name, count in job["files"].items()
        )
        types = ", ".join(f"{count} x {type}" for type, count in job["types"].items())
        rows.append([job["job"], job["state"], types, size, "; ".join(job["notes"])])
    print_table(f"{len(rows)} jobs", ("job", "state", "tensors", "weight files", "notes"), rows)
    models = [
        [model["model"], model["commit"][:12], model["licence"] or "none stated", ". ".join(model["notes"])]
        for model in plan["models"]
    ]
    print_table("models", ("model", "commit", "licence", "notes"), models)
    for shelf in plan["statistics"]:
        left = f"; the others will be kept there, {bytes_text(shelf['bytes'])}" if shelf["bytes"] else ""
        there = f"{shelf['there']} of {shelf['blocks']} blocks"
        print_line(f"statistics of {shelf['model']}: {there} from {shelf['folder']}{left}")
    needs, has = plan["needs"], plan["machine"]
    print_line(
        f"{plan['tasks_needed']} of {plan['tasks']} tasks to run; disk up to {bytes_text(needs['disk_bytes'])} of "
        f"{bytes_text(has['disk_bytes'])} free; memory up to {bytes_text(needs['memory_bytes'])} a task of "
        f"{bytes_text(has['memory_bytes'])}; {has['cpus']} cores"
    )


def print_survey(found: Mapping[str, Any]) -> None:
    """Print what `survey` gives, but for its problems, which are errors."""
    if "tensors" in found:
        types = ", ".join(f"{count} x {type}" for type, count in found["types"].items())
        family = found["family"] or "no known family"
        experts = f" of {found['experts']} experts" if found.get("experts") else ""
        blocks = f", {found['blocks']} blocks{experts}" if found["blocks"] else ""
        print_line(
            f"{found['repo']}: {family}{blocks}, {count_text(found['parameters'])} parameters, "
            f"{bytes_text(found['bytes'])} ({types})"
        )
    if tokenizer := found.get("tokenizer"):
        pre = f", pre-tokenizer {tokenizer['pre']}" if tokenizer["pre"] else ""
        print_line(f"tokenizer as GGUF has it: {tokenizer['model']}{pre}, {tokenizer['tokens']} tokens")
    rows: list[list[str]] = []
    told: dict[str, str] = {}  # reasons, by the first format that has them
    for name, entry in found["formats"].items():
        sizes = ", ".join(f"{type} {bytes_text(size)}" for type, size in entry["bytes"].items())
        first = told.setdefault(entry["why"], name)
        why = entry["why"] if first == name else f"as {first}"
        rows.append([name, "yes" if entry["possible"] else "no", sizes if entry["possible"] else why])
    if rows:
        print_table("what can be made of it", ("format", "possible", "sizes, or why not"), rows)
    if found.get("dropped"):
        dropped = [[one["tensors"], str(one["count"]), one["reason"]] for one in found["dropped"]]
        print_table("what GGUF would leave out", ("tensors", "count", "why"), dropped, numbers=(1,))
    for note in found.get("notes", ()):
        print_line(f"note: {note}")


def print_status(found: Mapping[str, Any]) -> None:
    """Print what `status` gives: the run in a line, then what happened last to each job."""
    rows = [
        [row["subject"], row["state"], f"{100 * row['fraction']:.0f} %", row["title"], row["note"]]
        for row in found["tasks"]
    ]
    print_line(_headline(found))
    print_table("jobs", ("job", "state", "done", "last task", "note"), rows, numbers=(2,))


def _headline(found: Mapping[str, Any]) -> str:
    """A run's state in a line."""
    line = f"{found['state']}{f' ({note})' if (note := found['note']) else ''}: {100 * found['fraction']:.0f} %"
    if (left := found["remaining_seconds"]) is not None:
        line += f", about {duration_text(left)} left"
    tasks = ", ".join(f"{found[state]} {word}" for state, word in TASK_WORDS.items() if found[state])
    return f"{line}; of {found['planned']} tasks {tasks or 'none done'}; begun {time_text(found['started'])}"


def print_result(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a comparison."""
    cells, left_out = [], []
    measured = [column for column in OUTPUT_COLUMNS if any(column[0] in (row.get("output") or {}) for row in rows)]
    for row in rows:
        name, output = f"{row['model']}/{row['target']}", row.get("output") or {}
        figures = []
        if row["status"] == "done":
            figures = [
                f"{row['bits_per_weight']:.2f}",
                f"{row['compression_ratio']:.2f} x",
                bytes_text(row["size_bytes"]),
            ]
            figures += [text.format(output[key]) if key in output else "" for key, _, text in measured]
        cells.append([name, row["status"], *figures, *[""] * (3 + len(measured) - len(figures))])
        if row["status"] == "skipped":
            left_out.append([name, row["error"]])
    columns = ("artifact", "status", "bits/weight", "ratio", "size", *(head for _, head, _ in measured))
    print_table("comparison", columns, cells, numbers=range(2, len(columns)))
    if left_out:
        print_table("what was left out", ("artifact", "why"), left_out)


def print_failures(failures: Sequence[tuple[str, str]]) -> None:
    """Print (task, error) of what failed, and the command to try again; nothing when nothing did."""
    if failures:
        print_table("what failed", ("task", "why"), [list(failure) for failure in failures])
        print_line(f"the rest is done. To try again: {shlex.join(['hubmill', *sys.argv[1:]])}")
