"""A few hundred damaged inputs for every reader, always the same ones, and those that `make fuzz` found."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest

import fuzz
from converter.errors import HubmillError
from fuzz.engine import examine, mutated
from fuzz.targets import TARGETS

INPUTS = {"config": 10, "manifest": 40}  # planning takes its time
FOUND = sorted((Path(fuzz.__file__).parent / "found").glob("*/*"))  # each once ended in a stranger's error


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name: str) -> None:
    seeds = TARGETS[name].seeds()
    for data in islice(mutated(seeds, Random(name)), INPUTS.get(name, 200)):
        assert (found := examine(TARGETS[name], data)) is None, (found.place, found.said, data)


@pytest.mark.parametrize("name", TARGETS)
def test_whole_input_is_read(name: str) -> None:
    ends = []
    for data in TARGETS[name].seeds():
        try:
            TARGETS[name].read(data)
            ends.append("read")
        except HubmillError as error:
            ends.append(str(error))
    assert "read" in ends, "a reader that refuses everything would pass any test"


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_input_that_was_found_is_read_or_refused(path: Path) -> None:
    assert (found := examine(TARGETS[path.parent.name], path.read_bytes())) is None, found.said
