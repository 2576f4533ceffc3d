"""Reads the parts of a manifest: from a place in the YAML tree to a typed value, or to a problem with that place.

It knows mappings, lists and keys, and nothing of models and targets; manifest.py has those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converter.manifest_fields import Part, keys_of, read_part
from converter.marks import Entry, Fields, Items, Mark, Node, Problems, Text, quoted, suggestion

# Keys that people will look for before they exist, with the way to go meanwhile.
NOT_YET = {"bits_per_weight": ("the search that bits_per_weight asks for is not built yet", "Choose a type or scheme")}


class Form:
    """The file being read, as a list of problems that grows."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def part(self, kind: type[Part], fields: Fields, label: str, ready: Mapping[str, object]) -> Part | None:
        """Read one part, of which `ready` has been read already; None when something required is missing or wrong."""
        built, findings = read_part(kind, self.values(kind, fields, label) | dict(ready))
        for finding in findings:
            self.say(fields.locate(finding.at), label, finding.what, finding.remedy)
        return built

    def values(self, kind: type[Part], fields: Fields, label: str) -> dict[str, object]:
        """Give the fields that this kind of part has; the others are problems."""
        known = keys_of(kind)
        for key, entry in fields.entries.items():
            if key in NOT_YET:
                self.say(entry.key, label, *NOT_YET[key])
            elif key not in known:
                self.say(entry.key, label, f"key {quoted(key)} is not known", suggestion(key, known))
        return {key: _value(entry.value) for key, entry in fields.entries.items() if key in known}

    def say(self, mark: Mark, label: str, what: str, remedy: str) -> None:
        self.problems.add(mark, f"{label}: {what}" if label else what, remedy)

    def fields(self, node: Node, label: str, key: str) -> Fields | None:
        if isinstance(node, Fields):
            return node
        glued = isinstance(node, Text) and re.match(r"[a-z_]+:(?=\S)", node.text)
        remedy = f"Put a space after {glued.group()}" if glued else "Write key: value lines, or {key: value, ...}"
        self.say(node.mark, label, f"{key} wants keys and values here", remedy)
        return None

    def items(self, fields: Fields, key: str, label: str) -> tuple[Node, ...]:
        """Give the items of a list, which may be left out but not be empty."""
        if key not in fields.entries:
            return ()
        node = fields.entries[key].value
        if not isinstance(node, Items) or not node.values:
            self.say(node.mark, label, f"{key} wants a list here", "Write lines that start with '- ', or [one, two]")
        return node.values if isinstance(node, Items) else ()

    def named_parts(self, fields: Fields, key: str, label: str) -> Mapping[str, Entry]:
        """Give the entries of a mapping from names to mappings, which may be left out but not be empty."""
        if key not in fields.entries:
            return {}
        node = self.fields(fields.entries[key].value, label, key)
        if node is None:
            return {}
        if not node.entries:
            self.say(node.mark, label, f"{key} is empty", "Add name: {key: value, ...}")
        return {name: entry for name, entry in node.entries.items() if self.fields(entry.value, label, quoted(name))}


def plain(node: Node) -> object:
    """Give the node as text, lists and dicts, without places; an empty value is None."""
    if isinstance(node, Text):
        return None if node.is_null else node.text
    if isinstance(node, Items):
        return [plain(item) for item in node.values]
    return {key: plain(entry.value) for key, entry in node.entries.items()}


def _value(node: Node) -> object:
    """Give the node as the fields take it: scalars stay Text, which remembers its quotes."""
    if isinstance(node, Text):
        return None if node.is_null else node
    if isinstance(node, Items):
        return [_value(item) for item in node.values]
    return {key: _value(entry.value) for key, entry in node.entries.items()}
