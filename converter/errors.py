"""What can go wrong, and how it is told.

Every message has three parts: where it happened, what is wrong, what to do about it.

    HubmillError
    ├── ManifestError      the manifest or the command line is wrong          exit 2
    ├── UnsupportedError   refused before starting: cannot be stored, no room  exit 3
    ├── SourceError        a model, a text or a hub cannot be read
    ├── NumericsError      the numbers do not allow it: NaN, overflow, no samples
    └── PublishError       the hub did not take an artifact
"""

from __future__ import annotations


class HubmillError(Exception):
    """One problem: `where`, `what` and `remedy` are sentences for a person, without a full stop at the end."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)  # all three: exceptions cross processes by pickling their arguments
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}."


class ManifestError(HubmillError):
    """The manifest or the command line is wrong; `problems` holds every problem found, each a full line."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        Exception.__init__(self, problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class UnsupportedError(HubmillError):
    """What is asked cannot be stored, is not known, or does not fit on this machine; found before any work starts."""


class SourceError(HubmillError):
    """A model, a text or a hub cannot be read, or does not hold what it says."""


class NumericsError(HubmillError):
    """The numbers do not allow it: a weight that is not finite, a Hessian that cannot be mended."""


class PublishError(HubmillError):
    """The hub did not take an artifact."""


def said(error: Exception) -> str:
    """A stranger's error in one line, with its type where the text alone says little, as for KeyError."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()
