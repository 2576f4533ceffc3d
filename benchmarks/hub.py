"""A model of one large file down from a hub, an artifact up to it, and its verification, beside the usual tools.

    python benchmarks/hub.py [--megabytes 200] [--rounds 5]

The hub is that of the tests, in a process of its own on the loopback, so that figures are of the clients and not of a
line. Down: our resumable download, which checks the sha256, beside huggingface_hub's hf_hub_download over plain HTTP,
which does not. Up: our publish (hashed, looked at before and after) beside its upload_folder. Verification: hashing as
`hubmill verify` does it beside sha256sum. Both of each pair are run in turn, several times; the medians' ratio counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "kernels")]

SERVER = """
import sys, threading, time
sys.path[:0] = sys.argv[2:]
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route
from hub_server import HubServer
from pathlib import Path
hub = HubServer()
app = Starlette(routes=[Route("/{path:path}", hub.answer, methods=["GET", "HEAD", "POST", "PUT"])])
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level=60, lifespan="off", http="h11"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.01)
hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
hub.add("owner/model", {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()})
print(hub.url, flush=True)
sys.stdin.read()
"""


def main() -> None:
    """Measure the pairs and print a JSON object for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_model(place / "model", given.megabytes)
        command = [sys.executable, "-c", SERVER, str(place / "model"), *sys.path[:3]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            os.environ["HF_ENDPOINT"] = server.stdout.readline().strip()
            measure(place, given.megabytes, given.rounds)
            server.terminate()


def write_model(folder: Path, megabytes: int) -> None:
    """One file of random weights, as a hub would have it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weight = torch.randint(-(2**15), 2**15, (megabytes, 500_000), dtype=torch.int16).view(torch.bfloat16)
    save_file({"weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


def measure(place: Path, megabytes: int, rounds: int) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    from converter.folder import file_sha256
    from converter.hub import fetch, resolve
    from converter.hub_publish import HuggingFaceHub
    from converter.publish import Destination
    from hub_server import WRITER
    from jobs.verify import hash_file

    snapshot = resolve("hub:owner/model", place / "plan", "benchmark")
    numbers = iter(range(10**6))
    folder, file = place / "model", place / "model" / "model.safetensors"
    files = {path.name: file_sha256(path) for path in folder.iterdir()}
    hub, theirs = HuggingFaceHub(token=WRITER), HfApi(token=WRITER)

    def fresh(kind: str) -> str:
        return f"{kind}-{next(numbers)}"

    def upload() -> None:
        """A file that no store has yet costs its bytes; the last ones of the weights make it another."""
        with file.open("r+b") as weights:
            weights.seek(-16, 2)
            weights.write(f"{next(numbers):016d}".encode())
        files["model.safetensors"] = file_sha256(file)

    def up_ours() -> None:
        hub.publish(Destination(hub="hf", repo=f"owner/{fresh('ours')}", kind="model"), folder, files, "m")

    def up_theirs() -> None:
        repo = f"owner/{fresh('theirs')}"
        theirs.create_repo(repo)
        theirs.upload_folder(folder_path=folder, repo_id=repo)

    pairs: list[tuple[str, Callable[[], object], Callable[[], object], Callable[[], object]]] = [
        (
            "download",
            lambda: None,
            lambda: fetch(snapshot, place / fresh("ours"), "benchmark"),
            lambda: hf_hub_download(
                "owner/model", file.name, revision=snapshot.commit, cache_dir=place / fresh("theirs")
            ),
        ),
        ("publish", upload, up_ours, up_theirs),
        (
            "verify",
            lambda: None,
            lambda: hash_file(file, lambda count: None),
            lambda: subprocess.run(["sha256sum", str(file)], check=True, stdout=subprocess.DEVNULL),
        ),
    ]
    for name, before, ours, peer in pairs:
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(rounds):
            for who, work in (("ours", ours), ("peer", peer)):
                before()
                start = perf_counter()
                work()
                seconds[who].append(perf_counter() - start)
        mine, other = statistics.median(seconds["ours"]), statistics.median(seconds["peer"])
        rate = round(megabytes / mine)
        print(json.dumps({"what": name, "ours_mb_per_second": rate, "time_ratio": round(mine / other, 2)}), flush=True)


if __name__ == "__main__":
    main()
