"""What the author of a model says of it at the head of README.md, in the YAML that hubs show: its front matter.

Strangers write it, so its size is bounded and its scalars stay text: the language `no` is Norwegian, version 1.10 not
1.1. The results of benchmarks are passed over before it is read: cards of embedding models hold hundreds of kilobytes
of them, which would cost seconds and is asked for by nobody here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from converter.errors import ManifestError
from converter.marks import Fields, Node, Problems, parse

FILE_LIMIT_BYTES = 4 << 20  # of a README that are looked at
LIMIT_BYTES = 64 << 10  # of front matter without results that are read
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # of a model or a data set
MATTER = re.compile(rb"(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)
RESULTS = re.compile(rb"^model-index:.*\n(?:[ \t#-].*\n|\r?\n)*", re.MULTILINE)


def read_front_matter(folder: Path) -> tuple[Mapping[str, Node], str]:
    """The front matter of the README.md in `folder` by key, and why it could not be read (empty: it could, or is not).

    Every key but model-index, each with its first value.
    """
    try:
        with (folder / "README.md").open("rb") as file:
            head = file.read(FILE_LIMIT_BYTES)
    except OSError:
        return {}, ""
    found = MATTER.match(head)
    if not found:
        cut = head.startswith(b"---\n") and len(head) == FILE_LIMIT_BYTES
        return {}, f"it does not end within {FILE_LIMIT_BYTES >> 20} MiB" if cut else ""
    # Lines keep their numbers for messages; cards that are indented by tabs are about.
    rest = RESULTS.sub(lambda results: b"\n" * results.group().count(b"\n"), b"\n" + found.group(1))
    matter = rest.replace(b"\t", b"  ")
    if len(matter) > LIMIT_BYTES:
        return {}, f"it is longer than {LIMIT_BYTES >> 10} KiB"
    problems = Problems(Path("README.md"))
    try:
        fields: Fields = parse(matter, problems)
    except ManifestError as error:
        return {}, str(error)
    return {key: entry.value for key, entry in fields.entries.items()}, ""
