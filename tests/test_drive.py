"""The task graph and the loop that drives it, without any model: what runs, in which order, what a failure takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import tensor_file
from converter.hub_calls import Tell
from converter.progress import Event
from jobs.drive import CONNECTIONS, drive
from jobs.outcome import Outcome
from jobs.store import DamagedError, Store
from jobs.task import Graph, Kind, Resources, Task


def task(
    name: str,
    *reads: Task,
    kind: Kind = "quantize",
    waits: Sequence[Task] = (),
    temporary: bool = False,
    resources: Resources | None = None,
) -> Task:
    return Task(
        kind=kind,
        subject=name,
        spec={"name": name},
        work=None,
        reads=tuple(read.key for read in reads),
        waits=tuple(wait.key for wait in waits),
        temporary=temporary,
        resources=resources or Resources(),
    )


class Recorder:
    """An executor that makes an empty output for each task, or fails it."""

    def __init__(self, fails: Sequence[str] = (), slots: int = 1) -> None:
        self.fails, self.slots = fails, slots
        self.order: list[str] = []
        self.most = 0
        self.pending: list[tuple[Task, Store]] = []

    def check(self, tasks: Sequence[Task], store: Store) -> None:
        pass

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        self.order.append(task.subject)
        self.pending.append((task, store))
        self.most = max(self.most, len(self.pending))

    def wait(self, seconds: float) -> list[Outcome]:
        if not self.pending:
            return []
        task, store = self.pending.pop()  # the newest first: an order that no graph may rely on
        failed = task.subject in self.fails
        if not failed:
            with store.attempt(task.key):
                pass
        return [Outcome(key=task.key, seconds=0.1, peak_bytes=1, error="it broke" if failed else "")]

    def close(self) -> None:
        pass


def run(graph: Graph, tmp_path: Path, executor: Recorder) -> tuple[Store, dict[str, str], dict[str, str]]:
    store = Store(run=tmp_path)
    done = store.done()
    events: list[Event] = []
    state = drive(graph, graph.needed(done), done, executor, store, events.append)
    assert not state.running
    return store, state.failed, state.skipped


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    first = task("a")
    graph = Graph([first, task("b", first)])
    run(graph, tmp_path, Recorder())
    again = Recorder()
    run(graph, tmp_path, again)
    assert again.order == []


def test_a_new_end_reruns_only_what_is_new(tmp_path: Path) -> None:
    a = task("a")
    run(Graph([a, task("b", a)]), tmp_path, Recorder())
    again = Recorder()
    run(Graph([a, task("b", a), task("c", a)]), tmp_path, again)
    assert again.order == ["c"]


def test_a_removed_intermediate_is_made_again_only_when_it_is_read(tmp_path: Path) -> None:
    a = task("a", temporary=True)
    b = task("b", a)
    store, _, _ = run(Graph([a, b]), tmp_path, Recorder())
    assert a.key not in store.done(), "a temporary output goes when its readers are done"
    again = Recorder()
    run(Graph([a, b, task("c", a)]), tmp_path, again)
    assert again.order == ["a", "c"]


def test_a_failure_stops_only_its_dependents(tmp_path: Path) -> None:
    a = task("a")
    bad = task("bad", a)
    graph = Graph([a, bad, task("after bad", bad), task("good", a)])
    executor = Recorder(fails=["bad"])
    _, failed, skipped = run(graph, tmp_path, executor)
    assert set(failed.values()) == {"it broke"}
    assert set(skipped.values()) == {"quantize bad"}
    assert "good" in executor.order
    assert "after bad" not in executor.order


def test_what_a_failed_task_reads_is_kept_for_its_next_attempt(tmp_path: Path) -> None:
    a = task("a", temporary=True)
    graph = Graph([a, task("bad", a), task("good", a)])
    store, _, _ = run(graph, tmp_path, Recorder(fails=["bad"]))
    assert a.key in store.done()
    again = Recorder()
    run(graph, tmp_path, again)
    assert again.order == ["bad"]


def test_what_only_a_failed_end_would_have_read_is_not_made(tmp_path: Path) -> None:
    """Calibration of later blocks stops when the only target that asked for it has failed."""
    first = task("calibrate 0", kind="calibrate", temporary=True)
    second = task("calibrate 1", first, kind="calibrate", temporary=True)
    quantize = [task("quantize 0", first), task("quantize 1", second)]
    graph = Graph([first, quantize[0], second, quantize[1], task("assemble", *quantize)])
    executor = Recorder(fails=["quantize 0"])
    store, _, skipped = run(graph, tmp_path, executor)
    assert "quantize 1" not in executor.order
    assert quantize[1].key in skipped
    assert second.key not in store.done(), "nothing that will run reads it"
    assert first.key in store.done(), "the failed task will read it again"


def test_what_a_failed_job_had_rounded_stays_for_its_next_attempt(tmp_path: Path) -> None:
    statistics = task("statistics", kind="calibrate", temporary=True)
    good, bad = task("good", statistics, temporary=True), task("bad", statistics, temporary=True)
    graph = Graph([statistics, good, bad, task("assemble", good, bad)])
    store, _, skipped = run(graph, tmp_path, Recorder(fails=["bad"]))
    assert len(skipped) == 1
    assert good.key in store.done()
    again = Recorder()
    run(graph, tmp_path, again)
    assert again.order == ["bad", "assemble"]


def test_a_goal_is_reached_although_what_reads_it_is_done(tmp_path: Path) -> None:
    finish = task("finish")
    publish = task("publish", finish)
    bad = task("bad")
    graph = Graph([bad, finish, publish])
    store = Store(run=tmp_path)
    executor = Recorder(fails=["bad"])
    events: list[Event] = []
    state = drive(graph, [bad.key, finish.key], {publish.key}, executor, store, events.append)
    assert finish.key in state.done


def test_temporaries_go_though_other_jobs_would_have_read_them(tmp_path: Path) -> None:
    """With --only, readers that do not run hold nothing back."""
    shared = task("shared", temporary=True)
    graph = Graph([shared, chosen := task("chosen", shared), task("other", shared)])
    store = Store(run=tmp_path)
    state = drive(graph, graph.needed((), [chosen.key]), (), Recorder(), store, lambda event: None)
    assert chosen.key in state.done
    assert shared.key not in store.done()


def test_a_failed_wait_holds_nobody_back_for_ever(tmp_path: Path) -> None:
    bad = task("bad")
    executor = Recorder(fails=["bad"])
    run(Graph([bad, task("waiter", waits=[bad])]), tmp_path, executor)
    assert executor.order == ["bad", "waiter"]


def test_waits_are_no_part_of_the_key() -> None:
    other = task("other")
    assert task("a").key == task("a", waits=[other]).key
    assert task("a").key != task("a", other).key


def test_submission_is_bounded_by_the_slots(tmp_path: Path) -> None:
    executor = Recorder(slots=3)
    run(Graph([task(str(index)) for index in range(20)]), tmp_path, executor)
    assert executor.most == 3


def test_a_killed_attempt_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    store = Store(run=tmp_path)
    with pytest.raises(KeyboardInterrupt), store.attempt("quantize-1") as (folder, _):
        (folder / "half").write_text("half a result")
        raise KeyboardInterrupt
    assert store.done() == set()
    assert not list((tmp_path / ".work" / "attempts").iterdir())


def test_the_same_task_finished_twice_is_harmless(tmp_path: Path) -> None:
    store = Store(run=tmp_path)
    with store.attempt("quantize-1") as (outer, record):
        record["which"] = "late"
        with store.attempt("quantize-1") as (_, inner):
            inner["which"] = "early"
        (outer / "file").write_text("x")
    assert store.record("quantize-1")["which"] == "early"


@pytest.mark.parametrize("durable", [True, False])
def test_what_stays_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with Store(run=tmp_path).attempt("quantize-1", durable) as (folder, _):
        tensor_file.save(folder / "deep.safetensors", {"one": torch.ones(3)})
    wanted = {str(folder), str(folder / "deep.safetensors"), str(folder / "done.json")}
    assert wanted & set(flushed) == (wanted if durable else set())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 7), max_size=3), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
    st.integers(1, 4),
)
def test_every_task_ends_done_failed_or_skipped_after_what_it_reads(
    tmp_path_factory: pytest.TempPathFactory, edges: list[set[int]], broken: set[int], slots: int
) -> None:
    tasks: list[Task] = []
    for index, reads in enumerate(edges):
        tasks.append(task(str(index), *(tasks[read] for read in sorted(reads) if read < index)))
    graph = Graph(tasks)
    executor = Recorder(fails=[str(index) for index in broken], slots=slots)
    store, failed, skipped = run(graph, tmp_path_factory.mktemp("run"), executor)
    done = store.done()
    assert set(graph.tasks) == done | set(failed) | set(skipped)
    position = {subject: index for index, subject in enumerate(executor.order)}
    for key in done:
        for read in graph.tasks[key].reads:
            assert position[graph.tasks[read].subject] < position[graph.tasks[key].subject]


def test_connections_to_hubs_are_bounded_and_what_needs_none_goes_on(tmp_path: Path) -> None:
    busy = Resources(connections=CONNECTIONS // 2)
    far = [task(f"far {number}", resources=busy) for number in range(6)]
    near = [task(f"near {number}") for number in range(6)]
    most = 0

    class Watching(Recorder):
        def submit(self, task: Task, store: Store, tell: Tell) -> None:
            nonlocal most
            super().submit(task, store, tell)
            most = max(most, sum(one.resources.connections for one, _ in self.pending))

    executor = Watching(slots=8)
    run(Graph([*far, *near]), tmp_path, executor)
    assert most == CONNECTIONS and len(executor.order) == 12 and executor.most == 8


def test_a_wait_is_said_once_and_is_in_the_log(tmp_path: Path) -> None:
    class Waiting(Recorder):
        def submit(self, task: Task, store: Store, tell: Tell) -> None:
            super().submit(task, store, tell)
            store.reporter(task.key).tell("the hub is busy (429): goes on in 55 s")
            self.polls = 3

        def wait(self, seconds: float) -> list[Outcome]:
            self.polls -= 1
            return [] if self.polls else super().wait(seconds)

    events: list[Event] = []
    graph, store = Graph([task("a")]), Store(run=tmp_path)
    drive(graph, graph.needed([]), [], Waiting(), store, events.append)
    notes = [event.note for event in events if event.state == "note"]
    assert notes == ["the hub is busy (429): goes on in 55 s"]
    assert sum("goes on in 55 s" in line for line in store.events.read_text().splitlines()) == 1


class Reading(Recorder):
    """An executor whose tasks read what they depend on, as steps do; `spoil` damages outputs when a task starts."""

    def __init__(self, spoil: Callable[[Task, Store], None]) -> None:
        super().__init__()
        self.spoil = spoil

    def wait(self, seconds: float) -> list[Outcome]:
        if not self.pending:
            return []
        task, store = self.pending.pop()
        self.spoil(task, store)
        try:
            with store.attempt(task.key) as (folder, _):
                for read in task.reads:
                    store.file(read, "result")
                (folder / "result").write_text(task.subject)
        except DamagedError as error:
            return [Outcome(key=task.key, seconds=0.1, peak_bytes=1, error=str(error), damaged=error.key)]
        return [Outcome(key=task.key, seconds=0.1, peak_bytes=1)]


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),  # what a loss of power leaves of what was not flushed
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["result", "done.json"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_output_is_made_again_and_never_used(tmp_path: Path, damage: str, file: str) -> None:
    """Also when what it was made of is gone by then: `a` is temporary, and only `b` reads it."""
    a = task("a", temporary=True)
    b = task("b", a)
    c = task("c", b)
    damaged = []

    def spoil(task: Task, store: Store) -> None:
        if task.subject == "c" and not damaged:
            damaged.append(DAMAGE[damage](store.output(b.key) / file))

    executor = Reading(spoil)
    store, failed, _ = run(Graph([a, b, c]), tmp_path, executor)
    assert not failed
    assert executor.order == ["a", "b", "c", "a", "b", "c"]
    assert store.file(b.key, "result").read_text() == "b"
    assert a.key not in store.done()


def test_a_disk_that_damages_the_same_output_again_and_again_is_a_failure(tmp_path: Path) -> None:
    a = task("a")
    b = task("b", a)

    def spoil(task: Task, store: Store) -> None:
        if task.subject == "b":
            DAMAGE["flipped"](store.output(a.key) / "result")

    executor = Reading(spoil)
    _, failed, _ = run(Graph([a, b]), tmp_path, executor)
    assert executor.order == ["a", "b"] * 3
    assert "not what was written" in failed[b.key]


def test_damage_that_two_tasks_find_is_mended_once(tmp_path: Path) -> None:
    a = task("a")
    readers = [task("b", a), task("c", a)]
    damaged = []

    def spoil(task: Task, store: Store) -> None:
        if task.subject != "a" and not damaged:
            damaged.append(DAMAGE["flipped"](store.output(a.key) / "result"))

    class Late(Reading):
        """Tells of the first reader's damage when the second has run into it, too."""

        def wait(self, seconds: float) -> list[Outcome]:
            return [outcome for _ in range(len(self.pending)) for outcome in super(Late, self).wait(seconds)]

    executor = Late(spoil)
    executor.slots = 2
    _, failed, _ = run(Graph([a, *readers]), tmp_path, executor)
    assert not failed
    assert sorted(executor.order) == ["a", "a", "b", "b", "c", "c"]
