"""YAML whose every value knows its line and column and keeps the text it was written as.

The tree is built from PyYAML's events. A loader would have turned `no` into False and the revision 0123456 into 42798
before anyone could ask what was meant; here a scalar stays text, and the field that takes it decides what it is. The
price is one small reader for each kind of scalar (in manifest.py). Sizes are bounded while reading: a manifest is typed
by hand, so anything deep or huge is a mistake or an attack.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import yaml

from converter.errors import ManifestError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 50_000  # counted after aliases are followed, so that nested aliases cannot multiply into gigabytes
NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True, kw_only=True, order=True)
class Mark:
    """A place in the file, counted from 1."""

    line: int
    column: int


START = Mark(line=1, column=1)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A scalar as it was written; plain means without quotes."""

    mark: Mark
    text: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in NULLS


@dataclass(frozen=True, kw_only=True)
class Items:
    """A list."""

    mark: Mark
    values: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A value and the place of its key."""

    key: Mark
    value: Node


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A mapping; its keys are text, in the order of the file."""

    mark: Mark
    entries: Mapping[str, Entry]

    def locate(self, path: Iterable[str | int]) -> Mark:
        """Give the place of the value at `path`, or of the nearest thing around it that is in the file.

        A number counts list items, or the entries of a mapping; for those the place is the key's.
        """
        mark: Mark = self.mark
        node: Node = self
        for part in path:
            if isinstance(node, Fields) and isinstance(part, int) and part < len(node.entries):
                entry = tuple(node.entries.values())[part]
                mark, node = entry.key, entry.value
            elif isinstance(node, Fields) and isinstance(part, str) and part in node.entries:
                node = node.entries[part].value
                mark = node.mark
            elif isinstance(node, Items) and isinstance(part, int) and part < len(node.values):
                node = node.values[part]
                mark = node.mark
            else:
                break
        return mark


Node = Text | Items | Fields


class Problems:
    """What is wrong with one file, gathered so that all of it can be said at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: set[tuple[Mark, str]] = set()  # a set: an override repeats the problems of what it overrides

    def add(self, mark: Mark, what: str, remedy: str) -> None:
        end = "" if remedy.endswith("?") else "."
        self.found.add((mark, f"{self.path}:{mark.line}:{mark.column}: {what}. {remedy}{end}"))

    def stop(self, mark: Mark, what: str, remedy: str) -> NoReturn:
        """Add the problem and raise ManifestError: nothing after it could be read with confidence."""
        self.add(mark, what, remedy)
        raise ManifestError(self.lines())

    def lines(self) -> tuple[str, ...]:
        return tuple(line for _, line in sorted(self.found))

    def raise_if_any(self) -> None:
        if self.found:
            raise ManifestError(self.lines())


def quoted(text: str) -> str:
    """Give `text` as one line in quotes, shortened, with anything unprintable escaped."""
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}")


def closest(text: str, choices: Iterable[str]) -> str | None:
    """Give the choice that `text` was probably meant to be; case and the kind of dash do not count."""
    folded = {choice.casefold().replace("_", "-"): choice for choice in choices}
    near = difflib.get_close_matches(text[:100].casefold().replace("_", "-"), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def suggestion(text: str, choices: Iterable[str]) -> str:
    """Give the remedy for a name that is not among the choices, which are not empty."""
    choices = tuple(choices)
    near = closest(text, choices)
    return f"Did you mean {quoted(near)}?" if near else f"Choose one of: {', '.join(choices)}"


def read_bytes(path: Path, problems: Problems, max_bytes: int = MAX_BYTES) -> bytes:
    """Give the file's bytes; raises ManifestError when it is not there, not a file, or too large."""
    try:
        if path.is_dir():
            problems.stop(START, "this is a folder", "Name the YAML file inside it")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        problems.stop(START, "there is no such file", "Check the path, or start from manifests/quickstart.yaml")
    except OSError as error:
        problems.stop(START, f"the file cannot be read: {error.strerror}", "Check its permissions")
    if len(data) > max_bytes:
        problems.stop(
            START, f"the file is larger than {max_bytes >> 20} MiB", "Name the manifest, not a model or an artifact"
        )
    return data


def parse(data: bytes, problems: Problems, max_values: int = MAX_VALUES) -> Fields:
    """Give the mapping that UTF-8 YAML holds, its duplicate keys added to `problems`.

    Raises ManifestError when there is no mapping: not UTF-8, not YAML, empty, a list, two documents, a tag, too deep.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        problems.stop(_mark_after(before), "the text is not UTF-8", "Save the file as UTF-8")
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd:
        problems.stop(_mark_after(text[: odd.start()]), f"the character {odd.group()!a} is not allowed", "Remove it")
    builder = _Builder(text, problems, max_values)
    try:
        return builder.document()
    except yaml.MarkedYAMLError as error:
        mark = _mark(error.problem_mark or error.context_mark)
        if error.problem and "'\\t'" in error.problem:
            problems.stop(mark, "a tab stands where YAML wants spaces", "Indent with spaces")
        context = f" {error.context}" if error.context else ""
        what = f"this is not valid YAML:{context} {error.problem}".replace("\n", " ")
        problems.stop(mark, what, "Check the indentation, quotes and brackets just before this place")
    except (ValueError, OverflowError) as error:  # PyYAML hands an escape such as "\UFFFFFFFF" to chr() unchecked
        what = f"this or the next value is not valid YAML: {quoted(str(error))}"
        problems.stop(builder.latest, what, "Check the escapes in double quotes")


class _Builder:
    """Turns PyYAML's events into nodes; one use."""

    def __init__(self, text: str, problems: Problems, max_values: int) -> None:
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.problems = problems
        self.max_values = max_values
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.count = 0
        self.latest = START

    def document(self) -> Fields:
        root: Node | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self.problems.stop(
                        _mark(event.start_mark), "a second document starts", "Put it in a file of its own"
                    )
                root = self.node(next(self.events), 0)
        if root is None or (isinstance(root, Text) and root.is_null):
            self.problems.stop(START, "the manifest is empty", "Start from manifests/quickstart.yaml")
        if not isinstance(root, Fields):
            self.problems.stop(
                root.mark, "the file does not hold keys and values", "Start it with a line such as name: mine"
            )
        return root

    def node(self, event: yaml.Event, depth: int) -> Node:
        mark = self.latest = _mark(event.start_mark)
        self.grow(mark, 1)
        if depth > MAX_DEPTH:
            self.problems.stop(mark, f"lists and mappings are nested more than {MAX_DEPTH} deep", "Flatten them")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.problems.stop(
                    mark, f"alias {quoted(str(event.anchor))} has no finished anchor before it", "Write it out"
                )
            node, size = self.anchors[event.anchor]
            self.grow(mark, size)
            return node
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent), event
        if event.tag is not None:
            self.problems.stop(mark, f"the tag {quoted(event.tag)} is not allowed", "Remove it")
        before = self.count
        built: Node
        if isinstance(event, yaml.ScalarEvent):
            built = Text(mark=mark, text=event.value, plain=not event.style)
        elif isinstance(event, yaml.SequenceStartEvent):
            built = self.items(mark, depth)
        else:
            built = self.fields(mark, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (built, self.count - before + 1)
        return built

    def items(self, mark: Mark, depth: int) -> Items:
        values: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self.node(event, depth + 1))
        return Items(mark=mark, values=tuple(values))

    def fields(self, mark: Mark, depth: int) -> Fields:
        entries: dict[str, Entry] = {}
        inherited: dict[str, Entry] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if not isinstance(key, Text):
                self.problems.add(key.mark, "a list or mapping stands where a key is wanted", "Write a plain name")
            elif key.text == "<<" and key.plain:
                inherited |= self.inherit(value)
            elif key.text in entries:
                first = entries[key.text].key.line
                self.problems.add(
                    key.mark, f"key {quoted(key.text)} is already on line {first}", "Remove one of the two"
                )
            else:
                entries[key.text] = Entry(key=key.mark, value=value)
        return Fields(mark=mark, entries=entries | {k: entry for k, entry in inherited.items() if k not in entries})

    def inherit(self, value: Node) -> Mapping[str, Entry]:
        """Give what a merge key `<<` brings in: of several mappings the earlier wins, and own keys win over all."""
        merged: dict[str, Entry] = {}
        for source in reversed(value.values if isinstance(value, Items) else (value,)):
            if isinstance(source, Fields):
                merged |= source.entries
            else:
                self.problems.add(source.mark, "<< takes a mapping or a list of mappings", "Write <<: *name")
        return merged

    def grow(self, mark: Mark, size: int) -> None:
        self.count += size
        if self.count > self.max_values:
            self.problems.stop(
                mark, f"the file holds more than {self.max_values} values once aliases are followed", "Split it"
            )


def write_yaml(value: Mapping[str, object]) -> str:
    """Give `value` as YAML text with its keys in their own order; strings that would read as numbers are quoted."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


class _Place(Protocol):
    line: int
    column: int


def _mark(mark: _Place | None) -> Mark:
    assert mark is not None, "PyYAML gives a mark with every event and error"
    return Mark(line=mark.line + 1, column=mark.column + 1)


def _mark_after(text: str) -> Mark:
    return Mark(line=text.count("\n") + 1, column=len(text) - text.rfind("\n"))
