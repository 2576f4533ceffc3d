"""What a run says, and how it is shown: bars on a terminal, JSON lines elsewhere. The only place that prints.

Everything else returns or yields events, so that a run can be watched, logged and tested without a screen.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# What a terminal would obey or cannot show: control characters but line ends and tabs, marks that turn the direction of
# text, halves of characters. What is shown in their place, and how JSON spells those that it would leave as they are.
MARKS = (*range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *MARKS) if chr(code) not in "\n\t"}
ESCAPED = {code: f"\\u{code:04x}" for code in MARKS}
State = Literal["start", "running", "done", "failed", "skipped", "note"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened. task: its key. subject: the job it belongs to, model/target, or the model.

    fraction: how far the job's whole work is, 0 to 1. note: error, fallback or figure, in words. counts: of a plan, how
    many tasks of each kind it asks for.
    """

    task: str
    subject: str
    state: State
    title: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    fraction: float = 0.0
    note: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


class Display(Protocol):
    """Where events go."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line on standard output: for logs, cron and programs."""

    def show(self, event: Event) -> None:
        if event.state != "running":
            filled = {key: value for key, value in asdict(event).items() if value}
            sys.stdout.write(json_text(filled) + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.flush()


class Bars:
    """A bar for each job on a terminal, with what it is doing now."""

    def __init__(self, console: Console) -> None:
        name, doing = (TextColumn(f"{{task.fields[{key}]}}", markup=False) for key in ("name", "doing"))
        share = TextColumn("{task.percentage:>3.0f} %")
        self._progress = Progress(name, BarColumn(bar_width=30), share, TimeElapsedColumn(), doing, console=console)
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, event: Event) -> None:
        bar = self._bars.get(event.subject)
        if bar is None:
            bar = self._progress.add_task("", total=1.0, name=harmless(event.subject), doing="")
            self._bars[event.subject] = bar
        doing = f"{event.state} {event.title}" if event.state in ("failed", "skipped") else event.title
        self._progress.update(bar, completed=event.fraction, doing=harmless(doing))
        if event.note:
            self._progress.console.print(shown(f"{event.title or event.subject}: {event.note}"))

    def close(self) -> None:
        self._progress.stop()


def display(plain: bool) -> Display:
    """Bars when standard output is a terminal, JSON lines otherwise or when `plain`."""
    console = Console()
    return JsonLines() if plain or not console.is_terminal else Bars(console)


def harmless(text: str) -> str:
    """The text without what a terminal would obey: file names and words of strangers come here, too."""
    return text.translate(CONTROLS)


def shown(text: str) -> Text:
    """The text as rich shows it: neither its markup nor its names of emoji mean anything in it."""
    return Text(harmless(text))


def json_text(data: Mapping[str, object], indent: int | None = None) -> str:
    """JSON in the letters it is about, but for those that a terminal would obey."""
    return json.dumps(data, indent=indent, ensure_ascii=False).translate(ESCAPED)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    """Print a table; `numbers` are the columns to set flush right."""
    table = Table(title=shown(title), title_justify="left", show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(shown(column), justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)


def print_json(data: Mapping[str, object]) -> None:
    """Print one JSON document for programs to read."""
    sys.stdout.write(json_text(data, indent=1) + "\n")


def print_line(text: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(harmless(text) + "\n")


def print_error(text: str) -> None:
    """Print a line on standard error."""
    sys.stderr.write(harmless(text).rstrip("\n") + "\n")


def bytes_text(count: float) -> str:
    """A number of bytes as people read it: 1.4 GB, decimal units as hubs show them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def count_text(count: int) -> str:
    """A number of parameters as people read it: 8.03 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return str(count)


def duration_text(seconds: float) -> str:
    """A duration as people read it, to two units: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_text(seconds: float) -> str:
    """A moment in seconds since 1970 as people read it, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
