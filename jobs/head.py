"""Whether the head of a Ray cluster answers: without it nothing begins and nothing ends, and Ray says nothing of it.

Ray's own calls wait for a head that is gone: `ray.init` for ever, the others until Ray ends the process after a minute,
past every `except` (ray 2.60). So a thread looks, and where the run cannot be told any more it ends the process itself;
what is finished is on the disk.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from converter.errors import UnsupportedError
from converter.progress import print_error

GLANCE_SECONDS = 2.0
SILENT_SECONDS = 20.0  # after which a head is taken for lost
GRACE_SECONDS = 10.0  # for the run to end by itself then


class Head:
    """The head at an address, looked at until `close`. One whose address names no port is taken to answer."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        self._address = address
        self._place = (host.strip("[]"), int(port)) if host and port.isdigit() else None
        self._lost: UnsupportedError | None = None
        self._told = False
        self._stop = threading.Event()
        if self._place:
            threading.Thread(target=self._look, name="head", daemon=True).start()

    def check(self) -> None:
        """Raise UnsupportedError when the head has not answered for SILENT_SECONDS."""
        if self._lost:
            self._told = True
            raise self._lost

    @property
    def lost(self) -> bool:
        """Whether the head has not answered for SILENT_SECONDS."""
        return self._lost is not None

    def close(self) -> None:
        """Look no more, unless the head is lost: then Ray may keep the process from ending."""
        if not self.lost:
            self._stop.set()

    def _look(self) -> None:
        assert self._place is not None
        answered = time.monotonic()
        while not self._stop.wait(GLANCE_SECONDS):
            try:
                socket.create_connection(self._place, GLANCE_SECONDS).close()
                answered = time.monotonic()
            except OSError as error:
                silent = time.monotonic() - answered
                if silent > SILENT_SECONDS and self._lost is None:
                    what = f"its head does not answer any more: {error}"
                    remedy = "Start the cluster again, then run the same command: what is finished is kept"
                    self._lost = UnsupportedError(f"Ray at {self._address}", what, remedy)
                if silent > SILENT_SECONDS + GRACE_SECONDS:
                    if not self._told:
                        print_error(str(self._lost))
                    os._exit(1)
