"""The faults of a cluster: three Ray nodes on this machine, whose runs must end with the bytes of a run without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid

from chaos.faults import Before, Trial, allow_statistics, finish, settle
from chaos.runs import GONE_SECONDS, Broken, check_nobody, events, kill

KILLS_A_RUN = 6
START_SECONDS = 5.0  # that Python and Ray take before any work begins
HEAD_LOST_SECONDS = 120.0
MONITOR_SECONDS = 900.0  # every task there is started five times, each time in a new process


def ray_killed(trial: Trial) -> None:
    """SIGKILL of a driver with the cluster that it has in itself: nothing of it may live on."""
    mark = f"ray-killed-{uuid.uuid4().hex}"
    for _ in range(2):
        before, driver = Before.of(trial.run), trial.start_afresh(mark)
        try:
            driver.wait(START_SECONDS + trial.moment(2.0))
            break
        except subprocess.TimeoutExpired:
            kill(driver)
        trial.injected += 1
        check_nobody(driver.pid, mark)
        settle(trial, driver, before)
    finish(trial)
    check_nobody(driver.pid, mark, agents=True)


def worker_killed(trial: Trial) -> None:
    """SIGKILL of workers that run a task; the driver starts their tasks again."""
    cluster = trial.cluster()
    before, driver = Before.of(trial.run), trial.start(cluster.address)
    while True:
        try:
            status = driver.wait(trial.dice.uniform(0.3, 3.0))
            break
        except subprocess.TimeoutExpired:
            busy = sorted(cluster.busy())
        if busy and trial.injected < KILLS_A_RUN and end(trial.dice.choice(busy)):
            trial.injected += 1
    if status not in (0, 1):  # 1: the same task was hit four times
        raise trial.broken(f"killed workers ended the run with {status}") from None
    if status:
        allow_statistics(trial)
    settle(trial, driver, before)
    wait_for_idle(trial)
    finish(trial)


def node_killed(trial: Trial) -> None:
    """SIGKILL of everything of a node, which another one replaces later."""
    cluster = trial.cluster()
    before, driver = Before.of(trial.run), trial.start(cluster.address)
    try:
        driver.wait(trial.moment(3.0))
    except subprocess.TimeoutExpired:
        cluster.workers.pop(trial.dice.randrange(2)).kill()
        trial.injected += 1
    status = driver.wait()
    cluster.join()
    if status:
        raise trial.broken(f"a killed node ended the run with {status}") from None
    settle(trial, driver, before)
    cluster.wait_for_workers()
    finish(trial)


def ray_driver_killed(trial: Trial) -> None:
    """SIGKILL of the driver of a cluster: its workers end, and the next driver goes on."""
    cluster = trial.cluster()
    for _ in range(2):
        before, driver = Before.of(trial.run), trial.start(cluster.address)
        try:
            driver.wait(trial.moment(3.0))
            break
        except subprocess.TimeoutExpired:
            kill(driver)
        trial.injected += 1
        wait_for_idle(trial)
        settle(trial, driver, before)
    finish(trial)


def head_lost(trial: Trial) -> None:
    """SIGKILL of the head: the driver says so and ends, and the run goes on with another cluster."""
    cluster = trial.cluster()
    before, driver = Before.of(trial.run), trial.start(cluster.address)
    try:
        driver.wait(trial.moment(3.0))
    except subprocess.TimeoutExpired:
        assert cluster.head is not None
        cluster.head.kill()
        trial.injected += 1
        try:
            driver.wait(HEAD_LOST_SECONDS)
        except subprocess.TimeoutExpired:
            kill(driver)
            raise trial.broken("the driver did not notice") from None
        finally:
            cluster.stop()
            cluster.start()
        if "does not answer" not in trial.said.read_text():
            raise trial.broken("the driver did not say why it ended") from None
    settle(trial, driver, before)
    finish(trial)


def memory_monitor(trial: Trial) -> None:
    """A node whose memory is always short ends every task: again with more, then given up with a reason."""
    cluster = trial.cluster()
    for node in cluster.workers:
        node.kill()
    cluster.workers.clear()
    cluster.join(settings={"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"})
    cluster.wait_for_workers()
    before, driver = Before.of(trial.run), trial.start(cluster.address)
    try:
        status = driver.wait(MONITOR_SECONDS)
    finally:
        cluster.workers.pop().kill()
        for _ in range(2):
            cluster.join()
        cluster.wait_for_workers()
    notes = [str(event.get("note", "")) for event in events(trial.run)]
    trial.injected += sum("ran out of memory: started again" in note for note in notes)
    if status and not any("no node has more" in note for note in notes):
        raise trial.broken(f"the run ended with {status} and without a reason") from None
    allow_statistics(trial)
    settle(trial, driver, before)
    finish(trial)


def end(pid: int) -> bool:
    """SIGKILL a worker of our own cluster; False when it has just ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def wait_for_idle(trial: Trial) -> None:
    """Raise Broken when workers go on with the tasks of a driver that is gone."""
    deadline = time.monotonic() + GONE_SECONDS
    while busy := trial.cluster().busy():
        if time.monotonic() > deadline:
            raise Broken(f"workers {busy} go on without a driver")
        time.sleep(0.1)
