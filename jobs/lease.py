"""Who works in a run's folder: a file with the holder's name and a heartbeat. Hosts need share nothing but the folder.

    lease     the holder, JSON; its time of change is the heartbeat

The file is made by the one call that every file system does for one caller only, and the heartbeat sets its time, which
needs no room on a full disk. Who finds a lease watches it by a clock of its own, since clocks of hosts differ: if the
heartbeat goes on, the holder lives; if it stands still, it does not. On the holder's own machine the system knows at
once. A holder that was away for too long, a laptop asleep, a host without its network, finds the lease gone, and stops.

The alternative, a lock of the file system, ends by itself with its process, but not every shared one keeps it between
hosts, and none says who holds it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from converter.errors import UnsupportedError

BEAT_SECONDS = 3.0
GONE_SECONDS = 30.0  # without a heartbeat, after which a holder is taken for dead
GLANCE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that works in a folder, and what its machine needs to know whether it still lives."""

    number: str  # of this lease, which no other has
    user: str
    host: str
    machine: str  # boot and process namespace: where `pid` means this process
    pid: int
    begun: str  # when the process did, in ticks since boot: numbers of processes come again
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            number=uuid.uuid4().hex,
            user=_user(),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            begun=_begun(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"

    @property
    def lives_here(self) -> bool | None:
        """Whether the process lives, if it is one of this machine; None when it is another's."""
        return _begun(self.pid) == self.begun if self.begun and self.machine == _machine() else None


class Lease:
    """A lease that is held; `check` raises when it was lost."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self._holder = holder
        self._lost_to = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UnsupportedError when another run has taken over meanwhile."""
        if not self._lost_to:
            with contextlib.suppress(OSError):  # it does not answer: the heartbeat asks again
                self._look()
        if self._lost_to:
            what = f"this run stood still for too long, and {self._lost_to}"
            raise UnsupportedError(str(self._path.parent.parent), what, "Leave the folder to it; what is done is kept")

    def release(self) -> None:
        """End the heartbeat and let go, unless it is another's by now."""
        self._stop.set()
        self._thread.join()
        if _read(self._path)[0] == self._holder:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._lost_to and not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the folder does not answer: if it stays so, the lease is taken over
                if self._look():
                    os.utime(self._path)

    def _look(self) -> bool:
        """Whether the lease is this one; otherwise it is lost for good."""
        found, _ = _read(self._path)
        if found != self._holder:
            self._lost_to = f"another took over: {found}" if found else "its lease is gone"
        return found == self._holder


@contextmanager
def held(path: Path) -> Iterator[Lease]:
    """Hold a lease while the body runs.

    Raises UnsupportedError, naming the holder, when another process holds it; that may take GONE_SECONDS to find out
    when it is on another machine. Raises OSError when the file cannot be made.
    """
    own = Holder.here()
    while not (_make(path, own) or _inherit(path, own)):
        pass
    lease = Lease(path, own)
    try:
        yield lease
    finally:
        lease.release()


def holder_of(path: Path) -> Holder | None:
    """Who holds a lease, as far as one look tells; None when nobody does."""
    found, changed = _read(path)
    if found is None:
        return None
    lives = found.lives_here
    return found if lives or (lives is None and abs(time.time() - changed) < GONE_SECONDS) else None


def _make(path: Path, holder: Holder) -> bool:
    """Make the lease; False when there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(holder)) + "\n")
    return True


def _inherit(path: Path, own: Holder) -> bool:
    """Take a dead holder's lease over; False when there is none any more. Raises UnsupportedError when it lives."""
    first = _read(path)
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        found, changed = _read(path)
        if changed == 0.0:
            return False
        lives = found.lives_here if found else None
        if lives or (found, changed) != first:
            said = f"another run is working in this folder: {found or 'its name is not readable'}"
            raise UnsupportedError(str(path.parent.parent), said, "Wait for it, or choose another --out")
        late = time.monotonic() - deadline
        if (lives is False or late > 0) and _take_over(path, first, own, stale=late > GONE_SECONDS):
            return True
        time.sleep(GLANCE_SECONDS)


def _take_over(path: Path, dead: tuple[Holder | None, float], own: Holder, stale: bool) -> bool:
    """Replace a dead holder's lease by one's own; False when a rival is doing that, or has done it.

    Between looking at the lease and replacing it a claim on this very lease keeps rivals away. stale: nobody who made
    a claim can be that slow, so one that is there is removed.
    """
    claim = path.with_name(f"{path.name}.{dead[0].number if dead[0] else 'unknown'}")
    if stale:
        claim.unlink(missing_ok=True)
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    try:
        if _read(path) != dead:
            return False
        fresh = path.with_name(f".{path.name}.{own.number}")
        fresh.write_text(json.dumps(asdict(own)) + "\n", "utf-8")
        fresh.rename(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Holder | None, float]:
    """The holder and the heartbeat; None for one that is not readable, and 0.0 when there is no lease.

    The file is opened for its time, too: that is what makes a client of a network file system ask for the newest.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, 0.0
    try:
        return Holder(**json.loads(text)), changed
    except (ValueError, TypeError):  # its maker was killed between making and writing it
        return None, changed


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return str(os.getuid())


def _machine() -> str:
    """This boot of this machine, and in it what the numbers of processes are counted in; empty where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _begun(pid: int) -> str:
    """When a process of this machine began; empty when there is none, or it has ended and nobody asked how."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
