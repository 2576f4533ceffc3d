"""The command line: parse, call one function, print what it gives, exit with the contract's code.

0 all done · 1 some jobs failed (the rest are there) · 2 the manifest or the usage is wrong · 3 refused before
starting · 130 interrupted, resumable.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from converter import manifest as manifests
from converter import progress
from converter.errors import HubmillError, ManifestError, SourceError
from converter.progress import bytes_text, print_error, print_json, print_line
from converter.terminal import print_failures, print_plan, print_result, print_status, print_survey
from jobs.store import Store

app = typer.Typer(
    help="Offline batch converter for model hubs: one manifest in; GGUF, safetensors and Parquet out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
MANIFEST = Annotated[Path, typer.Argument(help="The manifest, a YAML file.", show_default=False)]
OUT = Annotated[Path, typer.Option(help="Folder for results; a manifest's go to OUT/<its name>.")]
ONLY = Annotated[list[str] | None, typer.Option(help="Do only this: MODEL/TARGET, a model or a target. Repeatable.")]
METRICS = Annotated[
    Path | None, typer.Option(help="A .prom file to keep for the textfile collector of Prometheus' node_exporter.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Executor(StrEnum):
    """Where tasks run."""

    RAY = "ray"
    INPROCESS = "inprocess"


class Device(StrEnum):
    """What blocks run on."""

    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"


NOTHING_TO_DO = "nothing to do: every artifact is there and its sources are unchanged"
DEVICE = Annotated[Device, typer.Option(help="What blocks run on; auto takes a GPU when there is one.")]


def main() -> None:
    """Run the command line; every expected error becomes a sentence and an exit code."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # a second one must not cut the clean end short
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)  # what schedulers and `kill` send
    try:
        app()
    except ManifestError as error:
        print_error(str(error))
        sys.exit(2)
    except HubmillError as error:
        print_error(str(error))
        sys.exit(3)
    except OSError as error:  # a full disk under the run's own files, for one; what is finished is kept
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print_error(f"{what}. Make room or mend the disk, then run the same command again.")
        sys.exit(1)
    finally:  # typer ends with exit code 1 when it is interrupted
        if interrupts:
            print_error("interrupted; everything finished so far is kept. Run the same command again to go on.")
            sys.stdout.flush()
            os._exit(130)  # finished work is on the disk, and nothing else is worth waiting for


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"hubmill {metadata.version('hubmill')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What can be said before a command."""


@app.command()
def plan(
    manifest: Annotated[
        Path,
        typer.Argument(help="The manifest; or a model: its folder, or hub:owner/name@revision.", show_default=False),
    ],
    out: OUT = Path("out"),
    only: ONLY = None,
    json: JSON = False,
    device: DEVICE = Device.CPU,
) -> None:
    """Show what would be done: jobs, types, sizes, needs, and what cannot be done and why.

    Of a model, without a manifest: its family, what each format would take, what would be left out, and everything
    that stands against it.
    """
    if source := _source(str(manifest)):
        _survey(source, out, json)
    from jobs import convert as run_module
    from jobs import show

    run = _run(manifest, out, only=only, device=device)
    ready = run_module.plan(run, print_error)
    if json:
        print_json(show.plan_json(run, ready))
    else:
        print_plan(show.plan_json(run, ready))
    for reason in ready.reasons:
        print_error(reason)
    raise typer.Exit(3 if ready.reasons else 0)


@app.command()
def convert(
    manifest: MANIFEST,
    out: OUT = Path("out"),
    executor: Annotated[Executor, typer.Option(help="Ray workers, or plain calls in this process.")] = Executor.RAY,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; left out, one is started here.")] = None,
    only: ONLY = None,
    device: DEVICE = Device.CPU,
    skip_unsupported: Annotated[
        bool, typer.Option(help="Leave out jobs that cannot be done, and do the rest.")
    ] = False,
    metrics: METRICS = None,
    json: JSON = False,
) -> None:
    """Convert, measure, compare and publish; what is done already is not done again."""
    if address and executor is Executor.INPROCESS:
        raise ManifestError(("--address: --executor inprocess uses no cluster. Leave one of the two out.",))
    if not only and _nothing_to_do(manifest, out, device, metrics, json):
        raise typer.Exit(0)
    from jobs import convert as run_module

    run = _run(manifest, out, executor=executor, address=address, only=only, device=device, skip=skip_unsupported)
    with _shown(json, run.store, metrics) as display:
        result = run_module.convert(run, display)
    if not json:
        print_result(result.rows)
        if not result.tasks_run:
            print_line(NOTHING_TO_DO)
        print_line(f"results: {run.store.run}/report.html")
        print_failures(result.failures)
    raise typer.Exit(result.exit_code)


def _nothing_to_do(manifest: Path, out: Path, device: Device, metrics: Path | None, json: bool) -> bool:
    """Whether an earlier run did all of this and nothing has changed since; then it is told, and noted in its log."""
    from jobs import events, settled

    loaded = manifests.load(manifest)
    store = Store(run=(out / loaded.name).absolute())
    if not settled.unchanged(store, loaded, device.value, print_error):
        return False
    with _shown(json, store, metrics) as display:
        ending = progress.Event(task=events.RUN, subject=loaded.name, state="done", title="run", fraction=1.0)
        events.say(store, display.show, replace(ending, note=NOTHING_TO_DO))
    if not json:
        print_line(f"results: {store.run}/report.html")
    return True


@app.command()
def status(manifest: MANIFEST, out: OUT = Path("out"), metrics: METRICS = None, json: JSON = False) -> None:
    """Show how far a run is, from its files, also while or after it runs elsewhere."""
    from jobs.status import status as look

    store = _store(manifest, out)
    found = look(store)
    if metrics:
        from jobs import metrics as metrics_module

        metrics_module.check_place(metrics)
        metrics_module.write(store, metrics)
    if json:
        print_json(found)
        return
    print_status(found)


@app.command()
def compare(manifest: MANIFEST, out: OUT = Path("out"), json: JSON = False) -> None:
    """Show the comparison of a run that is finished."""
    from converter.compare.tables import read_comparison

    folder = _store(manifest, out).run
    found = read_comparison(folder)
    if found is None:
        raise SourceError(str(folder), "there is no comparison yet", f"Run hubmill convert {manifest} first")
    if json:
        print_json(found)
    else:
        print_result(found["artifacts"])


@app.command()
def publish(manifest: MANIFEST, out: OUT = Path("out"), only: ONLY = None, json: JSON = False) -> None:
    """Publish what is finished; an artifact that is published already is left alone."""
    from jobs import convert as run_module

    run = _run(manifest, out, only=only)
    if run.manifest.publish is None:
        raise ManifestError((f"{manifest}: there is no publish: section. Add one, with hub: and repo:.",))
    with _shown(json) as display:
        result = run_module.publish(run, display)
    if not json:
        print_failures(result.failures)
    raise typer.Exit(result.exit_code)


@app.command()
def verify(
    place: Annotated[
        str,
        typer.Argument(
            help="A run's folder, out/<name>; an artifact's; or hub:owner/name@revision.", show_default=False
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The public key, PEM, that artifacts must be signed by."),
    ] = None,
    out: OUT = Path("out"),
    json: JSON = False,
) -> None:
    """Check every file against the sha256 that travels with it, and open each by its reader."""
    from jobs.verify import verify as look

    with _shown(json) as display:

        def report(what: str, fraction: float) -> None:
            display.show(progress.Event(task="verify", subject=place, state="running", title=what, fraction=fraction))

        found = look(place, out, key, report)
    if json:
        print_json(asdict(found))
    else:
        for line in (*found.problems, *found.notes):
            print_line(line)
        whole = f"every file is there and whole: {found.files} files, {bytes_text(found.size_bytes)}"
        print_line(f"{len(found.problems)} problems" if found.problems else whole)
    raise typer.Exit(int(bool(found.problems)))


@app.command()
def merge(
    first: Annotated[Path, typer.Argument(help="The first file, NAME-00001-of-00003.gguf.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The one file to write; it must not exist.", show_default=False)],
) -> None:
    """Make one GGUF file of a model that lies in several."""
    from converter.containers.gguf.merge import merge as merge_files

    with _shown(plain=False) as display:

        def report(fraction: float) -> None:
            event = progress.Event(task="merge", subject=out.name, state="running", fraction=fraction)
            display.show(event)

        size_bytes = merge_files(first, out, report)
    print_line(f"{out}: {bytes_text(size_bytes)}, every block read again")


def _source(given: str) -> str:
    """The source that is named in place of a manifest; empty when it is a manifest."""
    path = Path(given.removeprefix("folder:"))
    if given.startswith(("hub:", "folder:")):
        return given if given.startswith("hub:") else f"folder:{path.absolute()}"
    if path.is_dir():
        return f"folder:{path.absolute()}"
    return f"folder:{path.absolute().parent}" if path.suffix == ".gguf" else ""


def _survey(source: str, out: Path, json: bool) -> NoReturn:
    """Show what can be made of one model, and exit."""
    from jobs.survey import survey

    name = source.partition("@")[0].rpartition("/")[2]
    found = survey(source, Store(run=(out / name).absolute()).downloads)
    if json:
        print_json(found)
    else:
        print_survey(found)
    for problem in found["problems"]:
        print_error(problem)
    raise typer.Exit(3 if found["problems"] else 0)


def _store(path: Path, out: Path) -> Store:
    """The files of a manifest's run. Raises ManifestError."""
    return Store(run=(out / manifests.load(path).name).absolute())


def _run(
    path: Path,
    out: Path,
    *,
    executor: Executor = Executor.RAY,
    address: str | None = None,
    only: Sequence[str] | None = None,
    device: Device = Device.CPU,
    skip: bool = False,
) -> Any:
    """The run that these options describe. Raises ManifestError."""
    loaded = manifests.load(path)
    from jobs import convert as run_module  # brings torch, which takes seconds: a wrong manifest is told before that

    return run_module.Run(
        manifest=loaded,
        out=out,
        executor=executor.value,
        address=address,
        only=tuple(only or ()),
        device=run_module.pick_device(device.value, address),
        skip_unsupported=skip,
    )


@contextmanager
def _shown(plain: bool, store: Store | None = None, metrics: Path | None = None) -> Iterator[progress.Display]:
    """A display of events; with `metrics`, one that keeps that file of the store's run, too."""
    display = progress.display(plain)
    try:
        if store and metrics:
            from jobs.metrics import Metered

            display = Metered(display, store, metrics)
        yield display
    finally:
        display.close()


if __name__ == "__main__":
    main()
