"""Manners towards a hub: bounded in time, patient as long as it asks, silent about secrets; a door of huggingface_hub.

The client's own calls have no time limit, wait for as long as a header says, and log the address that failed, which for
an upload is a signed one. `api` and `session` give the same client with limits; `overheard` turns its log into notes.
Calls that may be repeated go through `patiently`, and what the client raises becomes an error of ours in `explained`.

Messages never hold the text of a client's error: it may quote a signed URL or a header with the token.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache, partial
from threading import Event
from typing import TypeVar

import huggingface_hub.constants
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx, set_client_factory

from converter.errors import PublishError, SourceError

WAITS = (1.0, 2.0, 4.0)  # seconds before each further try, unless the hub names its own
LONGEST_WAIT = 300.0  # the window of the public hub's limits on requests
LONGEST_COMMIT_WAIT = 3700.0  # commits are limited by the hour
TIMEOUT = 30.0  # to connect, and between two pieces of a file
ANSWER_TIMEOUT = 300.0  # for an answer that takes work: a large commit, an upload put together from its parts
TOGETHER = 4  # requests in flight
COMMIT = re.compile("[0-9a-f]{40}")
PASSING = frozenset({408, 429, 500, 502, 503, 504})
FAULTS = (
    HfHubHTTPError,
    httpx.HTTPError,
    OfflineModeIsEnabled,
    HFValidationError,
    LocalTokenNotFoundError,
    UnicodeDecodeError,  # what the client makes of a proxy's error page in Latin-1 (huggingface_hub 2)
)
Item = TypeVar("Item")
Result = TypeVar("Result")
Tell = Callable[[str], None]  # told, in words, that there is a wait


def hush(note: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a call may be waited for: at most `longest_seconds` at a time, until `stop` is set; `tell` hears of it.

    A hub that asks for more is not asked again: too early a try would count against the same limit. passing: the
    statuses after which another try may succeed.
    """

    longest_seconds: float = LONGEST_WAIT
    passing: frozenset[int] = PASSING
    stop: Event = field(default_factory=Event)
    tell: Tell = hush


def api(endpoint: str | None, token: str | None) -> HfApi:
    """The client's calls, with limits in time. Arguments that are None come from the environment."""
    _set_limits()
    return HfApi(endpoint=endpoint, token=token)


def head(repo: str, kind: str, revision: str | None, patience: Patience) -> str:
    """The commit that a revision (None: the main branch) of a repo means now; a commit means itself.

    Raises SourceError.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    with explained(repo, repo, None):
        client = api(None, None)
        info = patiently(lambda: client.repo_info(repo, revision=revision, repo_type=kind, timeout=TIMEOUT), patience)
    return str(info.sha)


def session() -> httpx.Client:
    """The client's own connections, with limits in time."""
    _set_limits()
    return get_session()


@cache
def _set_limits() -> None:
    """Once in a process: the client makes its connections anew whenever one fails, and always by this factory."""
    set_client_factory(partial(_client, list(get_session().event_hooks["request"])))


def _client(request_hooks: Sequence[Callable[[httpx.Request], object]]) -> httpx.Client:
    return httpx.Client(
        event_hooks={"request": list(request_hooks), "response": [_refuse_endless_wait]},
        follow_redirects=True,  # httpx sends the token to the host of the first address only
        timeout=httpx.Timeout(TIMEOUT, read=ANSWER_TIMEOUT, write=ANSWER_TIMEOUT),
    )


def _refuse_endless_wait(response: httpx.Response) -> None:
    """End what the client would wait for without a bound: its own tries sleep for whatever the header says."""
    asked = asked_wait(response.headers)
    if response.status_code in PASSING and asked is not None and asked > LONGEST_COMMIT_WAIT:
        raise HfHubHTTPError("asks for a long wait", response=response)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """The seconds that a hub asks to wait, by Retry-After (a number or a date) or by its rate limit; None: no word."""
    named = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", named):
        return float(named)
    if left := re.search(r"\br=0\b.*\bt=(\d{1,9})", headers.get("RateLimit", "")):
        return float(left[1])
    try:
        return max(0.0, parsedate_to_datetime(named).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def patiently(call: Callable[[], Result], patience: Patience | None = None) -> Result:
    """The result of a call that may be repeated; waits as long as the hub asks when it is busy or cuts the line."""
    patience = patience or Patience()
    for number in range(len(WAITS)):
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError) as error:
            if not wait_after(error, number, patience):
                raise
    return call()


def wait_after(error: Exception, number: int, patience: Patience) -> bool:
    """Wait before another try, the `number`th from 0; False when none is worth it."""
    if number >= len(WAITS) or not isinstance(error, (HfHubHTTPError, httpx.TransportError)):
        return False
    asked, what = None, "the line was cut"
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in patience.passing:
            return False
        asked, what = asked_wait(error.response.headers), f"the hub is busy ({error.response.status_code})"
    seconds = WAITS[number] if asked is None else asked
    if seconds > patience.longest_seconds:
        return False
    patience.tell(f"{what}: goes on in {seconds:.0f} s")
    pause(seconds, patience.stop)
    return True


def pause(seconds: float, stop: Event) -> None:
    """Wait, but not when asked to stop; sleeping would hold up Ctrl-C for as long as a hub pleases."""
    if stop.wait(seconds):
        raise InterruptedError("stopped while waiting for a hub")


def together(work: Callable[[Item], Result], items: Sequence[Item], stop: Event) -> list[Result]:
    """The results of `work` for each item, several at a time; an error or Ctrl-C sets `stop` and begins nothing new."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def overheard(tell: Tell) -> Iterator[None]:
    """Meanwhile, the client's log says only that it waits, and says it to `tell`; its other lines quote addresses."""
    logger = logging.getLogger("huggingface_hub")
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Ear(tell)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates


class _Ear(logging.Handler):
    """Passes on the seconds of the client's waits, and nothing else of its lines."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if waits := re.search(r"(?:Waiting|Retrying in) ([\d.]+)s", record.getMessage()):
            self._tell(f"the hub is busy: goes on in {float(waits[1]):.0f} s")


@contextmanager
def explained(
    where: str, repo: str, endpoint: str | None, kind: type[SourceError] | type[PublishError] = SourceError
) -> Iterator[None]:
    """Turn what a client raises into an error of ours; the original goes, for its text may hold a secret."""
    try:
        yield
    except FAULTS as error:
        address = without_credentials(endpoint or huggingface_hub.constants.ENDPOINT)
        raise kind(where, *explain(error, repo, address)) from None
    except OSError as error:
        raise kind(
            where, f"a file cannot be read or written: {error}", "Make room or mend the disk, then run it again"
        ) from error


def without_credentials(address: str) -> str:
    """An address as it may be shown: a proxy or an internal hub may have a name and a password in it."""
    return re.sub(r"//[^/@]*@", "//", address)


def explain(error: Exception, repo: str, endpoint: str) -> tuple[str, str]:
    """What went wrong with a request to a hub, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    sign_in = "set HF_TOKEN to a token with access to it"
    if isinstance(error, HFValidationError):
        return f"'{repo}' is no name of a repo", "Write owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids to ask {endpoint}", "Unset it, or use folder: or file: with a copy on this disk"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token", "Set HF_TOKEN to a token with write access"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated ({status})", f"Accept its terms at {endpoint}/{repo}, and {sign_in}"
    if isinstance(error, DisabledRepoError):
        return f"{repo} was disabled by {endpoint}", "Choose another"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision", f"Choose one of those at {endpoint}/{repo}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"a file of {repo} is gone ({status})", "Run it again: its repo was rewritten"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"{endpoint} shows no {repo} ({status})", f"Check the name; if it is private, {sign_in}"
    if status == 401:
        return f"{endpoint} does not accept the token (401)", "Set HF_TOKEN to one that is valid"
    if status == 403:
        return f"the token may not do this with {repo} (403)", f"Ask the owner of {repo} for access, and {sign_in}"
    if isinstance(error, HfHubHTTPError) and status in PASSING and (asked := asked_wait(error.response.headers)):
        return f"{endpoint} asks to come back in {asked:.0f} s ({status})", "Run it again then; what is done stays done"
    if status == 429:
        return f"{endpoint} asks to slow down (429)", "Run it again in five minutes; a token raises the limits"
    if status:
        return f"{endpoint} answers with an error ({status})", "Run it again later; what is done stays done"
    if isinstance(error, UnicodeDecodeError):
        return (
            f"{endpoint} answers with an error page that is not UTF-8",
            "Run it again later, or ask who runs the proxy",
        )
    what = f"the connection to {endpoint} failed or was cut ({type(error).__name__})"
    return what, "Check the network and run it again; it goes on where it stopped"
