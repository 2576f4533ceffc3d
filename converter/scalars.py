"""What a scalar of the manifest means to the field that takes it.

YAML 1.1, which PyYAML speaks, and YAML 1.2, which editors speak, disagree about no, 010, 1:30 and 1e3. A reader here
takes only what both read alike and otherwise says how to write it. A value that is not a Text passes unchanged, for it
comes from Python code and has its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from converter.marks import Text, closest, quoted, suggestion

MAX_TEXT = 4096
SWITCHES = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
SIZE = "^[1-9][0-9]{0,8}[KMG]$"
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
# What YAML 1.1 and 1.2, or people, may read as something other than text.
AMBIGUOUS = re.compile(r"[-+.]?[0-9][0-9a-fA-FoOxX_.:eE+-]*|[-+]?\.(inf|nan)|y|n|yes|no|on|off|true|false", re.I)
Reader = Callable[[object], object]


class RefusedError(ValueError):
    """A value that its field does not take: what is wrong, after the field's name, and the remedy."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy


def scalar(value: object) -> Text | None:
    """Give the scalar as written, or None for a typed value; raises RefusedError for a list, a mapping or nothing."""
    if isinstance(value, Text):
        if not value.text.isprintable() or len(value.text) > MAX_TEXT:
            raise RefusedError(f"{quoted(value.text)} is too long or not printable", "Write plain text")
        return value
    if value is None:
        raise RefusedError("is empty", "Give a value, or remove the key")
    if isinstance(value, list | dict):
        raise RefusedError(
            f"takes one value, not a {'list' if isinstance(value, list) else 'mapping'}", "Write one value"
        )
    return None


def text(value: object) -> object:
    """Give the text as it was typed: 0123456, 1e10 and no stay what they look like."""
    written = scalar(value)
    if written is not None and not written.text:
        raise RefusedError("is empty", "Give a value, or remove the key")
    return written.text if written is not None else value


def whole(value: object) -> object:
    """Read a whole number in decimal digits."""
    written = scalar(value)
    if written is None:
        return value
    digits = written.text
    if not written.plain:
        raise RefusedError(f"{quoted(digits)} is in quotes, which makes it text", "Write the number without quotes")
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", digits, re.ASCII):
        return int(digits)
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?[eE]\+?[0-9]", digits, re.ASCII):
        raise RefusedError(f"{digits} is text to YAML 1.1", f"Write {float(digits):.0f}")
    if re.fullmatch(r"0[0-7]{1,9}", digits, re.ASCII):
        octal = int(digits, 8)
        raise RefusedError(f"{digits} is {octal} to YAML 1.1, written in octal", f"Write {int(digits)} or {octal}")
    raise RefusedError(f"{quoted(digits)} is not a whole number", "Write decimal digits only, such as 128")


def real(value: object) -> object:
    """Read a decimal number; 1e-2 is taken, for it can mean nothing else."""
    written = scalar(value)
    if written is None:
        return value
    if written.plain and re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{0,17})?([eE][+-]?[0-9]{1,2})?", written.text, re.ASCII):
        return float(written.text)
    raise RefusedError(f"{quoted(written.text)} is not a number", "Write it without quotes, such as 0.01 or 1e-2")


def switch(value: object) -> object:
    """Read true or false, and nothing else."""
    written = scalar(value)
    if written is None:
        return value
    if written.plain and written.text in ("true", "false"):
        return written.text == "true"
    wanted = SWITCHES.get(written.text.casefold(), "true or false")
    raise RefusedError(f"{quoted(written.text)} is not true or false", f"Write {wanted}, without quotes")


def switch_or_path(value: object) -> object:
    """Read true, false, or else the path of a file; a word that looks like a switch is refused as one."""
    written = scalar(value)
    if written is None:
        return value
    return switch(written) if written.text.casefold() in SWITCHES else text(written)


def size(value: object) -> object:
    """Read a number of bytes with its unit, such as 500M; see size_bytes."""
    written = text(value)
    if isinstance(written, str) and re.match(SIZE, written, re.ASCII):
        return written
    raise RefusedError(f"{quoted(str(written))} is not a size", "Write a whole number and K, M or G, such as 2G")


def size_bytes(written: str) -> int:
    """Give the bytes that a size such as 500M stands for; K, M and G are decimal."""
    return int(written[:-1]) * UNITS[written[-1]]


def value(given: object) -> object:
    """Read a value of any kind: a whole number, a decimal number, true or false, and text, in quotes if need be."""
    written = scalar(given)
    if written is None or not written.text or not written.plain:
        return text(given)
    if written.text in ("true", "false"):
        return written.text == "true"
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", written.text, re.ASCII):
        return int(written.text)
    if re.fullmatch(r"-?[0-9]{1,15}\.[0-9]{1,17}([eE][+-][0-9]{1,2})?", written.text, re.ASCII):
        return float(written.text)
    if AMBIGUOUS.fullmatch(written.text):
        what = f"{quoted(written.text)} can be read in two ways"
        raise RefusedError(what, "Write a number such as 128 or 0.5, or put it in quotes if text is meant")
    return written.text


def one_of(choices: tuple[str, ...]) -> Reader:
    """Give a reader that takes only the choices and offers the nearest one."""

    def read(value: object) -> object:
        chosen = text(value)
        if isinstance(chosen, str) and chosen not in choices:
            raise RefusedError(f"{quoted(chosen)} is not known", suggestion(chosen, choices))
        return chosen

    return read


def optional(read: Reader) -> Reader:
    """Give a reader that takes an empty value as None."""
    return lambda value: None if value is None else read(value)


def one_or_many(value: object) -> object:
    """Give a list where one value may stand for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def folder_or_hub(source: str) -> str:
    """Check where a model comes from, folder:path or hub:org/name@revision; @main where no revision is given."""
    kind, _, rest = source.partition(":")
    if kind == "folder" and rest:
        return source
    if kind == "hub":
        return f"hub:{_repo_at_revision(rest)}"
    raise RefusedError(
        f"{quoted(source)} has no known form", _source_remedy(source, ("folder:path", "hub:org/name@revision"))
    )


def text_source(source: str) -> str:
    """Check where text comes from: builtin, file:path or hub:org/dataset@revision#column, defaults main and text."""
    kind, _, rest = source.partition(":")
    if source == "builtin" or (kind == "file" and rest):
        return source
    if kind == "hub":
        repo, hash_sign, column = rest.partition("#")
        if hash_sign and not column:
            raise RefusedError(f"{quoted(source)} has nothing after #", "Name a column, or remove the #")
        return f"hub:{_repo_at_revision(repo)}#{column or 'text'}"
    raise RefusedError(
        f"{quoted(source)} has no known form",
        _source_remedy(source, ("builtin", "file:path", "hub:org/data@rev#column")),
    )


def folder_only(folder: str) -> str:
    """Check the form folder:path."""
    kind, _, rest = folder.partition(":")
    if kind == "folder" and rest:
        return folder
    raise RefusedError(f"{quoted(folder)} has no known form", _source_remedy(folder, ("folder:path",)))


def hub_target(hub: str) -> str:
    """Check where artifacts go: folder:path, or hf for the Hugging Face hub."""
    kind, _, rest = hub.partition(":")
    if hub == "hf" or (kind == "folder" and rest):
        return hub
    raise RefusedError(f"{quoted(hub)} has no known form", _source_remedy(hub, ("folder:path", "hf")))


def _repo_at_revision(rest: str) -> str:
    repo, at, revision = rest.partition("@")
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}/{part}", repo, re.ASCII) or ".." in repo or len(repo) > 200:
        raise RefusedError(f"{quoted(repo)} is not a repository", "Write owner/name, as in hub:org/name@revision")
    if at and not revision:
        raise RefusedError(
            f"{quoted(rest)} has nothing after @", "Write a commit, tag or branch there, or remove the @"
        )
    if at and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/+-]*", revision, re.ASCII) or ".." in revision):
        raise RefusedError(f"{quoted(revision)} is not a revision", "Write a commit, tag or branch after the @")
    return f"{repo}@{revision or 'main'}"


def _source_remedy(source: str, forms: tuple[str, ...]) -> str:
    """Give the forms, or the one that was probably meant."""
    listed = f"Write {', '.join(forms[:-1])} or {forms[-1]}"
    kinds = {form.partition(":")[0]: form for form in forms}
    kind, colon, rest = source.partition(":")
    near = closest(kind, kinds)
    if colon and near and kind not in kinds:
        return f"Did you mean {quoted(f'{near}:{rest}')}?"
    path_kind = next((name for name in ("folder", "file") if name in kinds), None)
    if path_kind and source.startswith(("/", "./", "../", "~")):
        return f"Did you mean {quoted(f'{path_kind}:{source}')}?"
    if "hub" in kinds and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        return f"Did you mean {quoted(f'hub:{source}')}?"
    return listed
