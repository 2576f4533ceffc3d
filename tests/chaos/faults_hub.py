"""The faults of a hub: it is busy, breaks, cuts the line, damages bytes, stalls, or takes a commit of others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import huggingface_hub.constants

from chaos.faults import Before, Trial, finish, settle
from chaos.runs import Broken, Place, kill
from hub_server import WRITER, HubServer
from small_run import write_manifest

REPOS = {("models", "owner/model-q8-0"): "q8-0", ("datasets", "owner/model-int8"): "int8"}
TARGETS: Mapping[str, str] = {"q8-0": "{format: gguf, type: Q8_0}", "int8": "{format: parquet, scheme: INT8}"}
READS = (("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "/resolve/"), ("GET", r"\.safetensors$"))
WRITES = (
    ("POST", "/api/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/_lfs/"),
    ("POST", "/verify"),
    ("POST", "/commit/main"),
)
STATUSES = (429, 500, 502, 503)
NOTE = "NOTES.md"


@dataclass(kw_only=True)
class HubPlace(Place):
    """A place whose model comes from a hub, and whose artifacts go there."""

    server: HubServer

    def prepare(self) -> None:
        """As for any place, with the model on the hub."""
        self.before = self.connect
        super().prepare()

    def write(self, name: str) -> None:
        """A manifest for a run that begins with nothing, on a hub that has nothing but the model."""
        self.server.faults.clear()
        self.server.before_commit.clear()
        self.server.repos.clear()
        self.server.objects.clear()
        model = {path.name: path.read_bytes() for path in (self.folder / "model").iterdir()}
        self.server.add("owner/model", model)
        (self.folder / name).mkdir()
        publish = 'publish: {hub: hf, repo: "owner/{model}-{target}"}'
        path = write_manifest(self.folder / name, self.targets, publish, ("owner/model",))
        path.write_text(path.read_text("utf-8").replace("folder:owner", "hub:owner"), "utf-8")

    def connect(self) -> None:
        """Let this process know the hub, as HF_ENDPOINT would if it were started afresh."""
        constants = huggingface_hub.constants
        constants.ENDPOINT = self.server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = self.server.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_DISABLE_XET = True
        os.environ["HF_TOKEN"] = WRITER


def hub_in_trouble(trial: Trial) -> None:
    """The hub fails in one to four ways, at any of the requests; sometimes the driver is killed besides."""
    server = server_of(trial)
    for _ in range(trial.dice.randint(1, 4)):
        trial.dice.choice(TROUBLES)(server, trial.dice)
    wanted = sum(fault.times for fault in server.faults)
    before, driver = Before.of(trial.run), trial.start()
    try:
        status = driver.wait(trial.moment(1.0) if trial.dice.random() < 0.3 else None)
        if status not in (0, 1, 3):  # 3: the plan could not ask it
            raise trial.broken(f"the hub's trouble ended the run with {status}")
    except subprocess.TimeoutExpired:
        kill(driver)
    trial.injected += wanted - sum(fault.times for fault in server.faults)
    server.faults.clear()
    settle(trial, driver, before)
    finish(trial)
    check_published(trial)


def stale_parent(trial: Trial) -> None:
    """Somebody commits just before our commit arrives: it is built upon, or told and left alone."""
    server = server_of(trial)
    theirs: list[tuple[str, str]] = []
    file = trial.dice.choice((".gitattributes", NOTE))

    def interlope() -> None:
        kind, repo = trial.dice.choice([place for place in REPOS if place in server.repos])
        server.add(repo, server.files(repo, kind) | {file: b"theirs"}, kind=kind)
        theirs.append((kind, repo))

    server.before_commit.append(interlope)
    if trial.start().wait() not in (0, 1):
        raise trial.broken("a commit of somebody else ended the run")
    trial.injected += len(theirs)
    for kind, repo in theirs:
        if file == NOTE and server.files(repo, kind).get(NOTE) == b"theirs" and len(server.files(repo, kind)) == 1:
            if f"somebody else committed {NOTE}" not in trial.said.read_text():
                raise trial.broken("who committed in between was not told")
            server.add(repo, {}, kind=kind)  # they take it back
            theirs.append((kind, repo))
            break
    finish(trial)
    check_published(trial, theirs)


def check_published(trial: Trial, theirs: Sequence[tuple[str, str]] = ()) -> None:
    """Raise Broken unless the hub holds exactly our files, from one commit of ours; theirs: repos, once a commit."""
    server = server_of(trial)
    for place, target in REPOS.items():
        found = server.files(place[1], place[0])
        folder = trial.run / "model" / target
        if found != {path.name: path.read_bytes() for path in folder.iterdir()}:
            raise Broken(f"{place[1]} is not what was made: {sorted(found)}")
        if (commits := len(server.repos[place].commits)) != 2 + theirs.count(place):
            raise Broken(f"{place[1]} has {commits} commits")


def server_of(trial: Trial) -> HubServer:
    assert isinstance(trial.place, HubPlace)
    return trial.place.server


def answer(server: HubServer, dice: Random) -> None:
    """An error in place of an answer."""
    status = dice.choice(STATUSES)
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    method, path = dice.choice(READS + WRITES)
    server.fail(method, path, status=status, headers=headers, skip=dice.randrange(3), times=dice.randint(1, 2))


def cut(server: HubServer, dice: Random) -> None:
    """The line is cut in the middle of a file that comes."""
    server.fail("GET", "/resolve/", cut_after=dice.randrange(100_000), skip=dice.randrange(4))


def lose(server: HubServer, dice: Random) -> None:
    """The line is cut in the middle of a file, or of a commit, that goes."""
    method, path = dice.choice((("PUT", "/_lfs/"), ("POST", "/commit/main")))
    server.fail(method, path, take=dice.randrange(1, 3000), skip=dice.randrange(2))


def spoil(server: HubServer, dice: Random) -> None:
    """A byte of a file comes as another."""
    server.fail("GET", r"\.safetensors$", damage=True, skip=dice.randrange(2, 5))


def stall(server: HubServer, dice: Random) -> None:
    """An answer takes its time."""
    method, path = dice.choice(READS + WRITES)
    server.fail(method, path, stall=dice.uniform(0.1, 2.0), skip=dice.randrange(3))


TROUBLES: tuple[Callable[[HubServer, Random], None], ...] = (answer, answer, cut, lose, spoil, stall)
