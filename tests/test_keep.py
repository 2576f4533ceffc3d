"""Statistics that a later manifest takes from an earlier run: when, what of them, and what damage and kills do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from converter import manifest as manifests
from converter import tensor_file
from converter.errors import ManifestError, SourceError
from converter.progress import Event
from converter.stats import observe, pack
from jobs import keep
from jobs.convert import Refused, Run, convert, plan
from jobs.keep import Asked
from jobs.show import plan_json
from small_run import write_manifest, write_model

KEEP = "folder:statistics"
TARGETS = {
    "gptq": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}",
    "imatrix": "{format: gguf, type: Q4_0, imatrix: true}",
    "fp8": "{format: compressed-tensors, scheme: FP8, kv_cache: FP8}",
    "static": "{format: compressed-tensors, scheme: W8A8_STATIC, activation_observer: percentile}",
    "folded": "{format: compressed-tensors, scheme: W8A8_STATIC, method: [smoothquant, rtn]}",
    "chain": "{format: parquet, scheme: INT4, method: gptq, propagate: quantized}",
}


class Watch:
    """A display that remembers what was said of calibration, and interrupts after so many tasks."""

    def __init__(self, interrupt_after: int = -1) -> None:
        self.said: list[str] = []
        self.left = interrupt_after

    def show(self, event: Event) -> None:
        if event.state == "done":
            self.said += [event.note] if event.title.startswith("calibrate") else []
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def close(self) -> None:
        pass

    @property
    def taken(self) -> int:
        """How many blocks were not run."""
        return sum(note.startswith("taken from") for note in self.said)


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("kept") / "model", layers=3)


def a_run(place: Path, out: str, *targets: str, keeping: str = KEEP, **settings: object) -> Run:
    """A run of a manifest of its own over the same model; keeping: nothing is kept without."""
    path = write_manifest(place, {target: TARGETS[target] for target in targets})
    told = {"sequences": 4, "length": 64} | settings | ({"keep": keeping} if keeping else {})
    text = path.read_text().replace("name: small", f"name: {out}")
    lines = [
        f"calibration: {json.dumps(told)}" if line.startswith("calibration") else line for line in text.split("\n")
    ]
    path.write_text("\n".join(lines))
    return Run(manifest=manifests.load(path), out=place / "out", executor="inprocess")


def done(run: Run, interrupt_after: int = -1) -> Watch:
    watch = Watch(interrupt_after)
    assert convert(run, watch).failures == ()
    return watch


def sums(run: Run) -> dict[str, str]:
    """The sha256 of every weight file."""
    found = [path for path in run.store.run.rglob("*") if path.suffix in (".safetensors", ".gguf", ".parquet")]
    ours = [path for path in found if ".work" not in path.parts and len(path.relative_to(run.store.run).parts) > 2]
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in ours}


def files(place: Path) -> list[Path]:
    return sorted((place / "statistics").rglob("*.safetensors"))


def test_a_second_manifest_takes_what_the_first_kept_and_writes_the_same_bytes(place: Path) -> None:
    first = a_run(place, "first", "gptq", "static", "folded", "fp8")
    assert done(first).taken == 0
    assert len(files(place)) == 3
    second = a_run(place, "second", "imatrix", "gptq", "static")
    shown = plan_json(second, plan(second))["statistics"]
    assert [(one["blocks"], one["there"], one["bytes"]) for one in shown] == [(3, 3, 0)]
    before = [path.read_bytes() for path in files(place)]
    assert done(second).taken == 3
    assert [path.read_bytes() for path in files(place)] == before
    plain = a_run(place, "plain", "imatrix", "gptq", "static", keeping="")
    assert done(plain).said == ["", "", ""]
    assert sums(second) == sums(plain)
    # But for .work, nothing tells where they came from.
    for name in ("comparison.json", "manifest.lock.yaml"):
        assert "statistics" not in (second.store.run / name).read_text()
    assert (second.store.run / "model" / "imatrix.gguf").read_bytes() == (
        plain.store.run / "model" / "imatrix.gguf"
    ).read_bytes()


def test_a_file_that_lacks_something_is_completed_and_then_serves_both(place: Path) -> None:
    done(a_run(place, "first", "fp8"))
    small = [path.stat().st_size for path in files(place)]
    second = a_run(place, "second", "gptq", "folded")
    [shown] = plan_json(second, plan(second))["statistics"]
    assert (shown["there"], shown["blocks"]) == (0, 3)
    assert done(second).taken == 0
    large = [path.stat().st_size for path in files(place)]
    assert all(after > before for before, after in zip(small, large, strict=True))
    assert sum(large) <= 1.2 * shown["bytes"]
    assert done(a_run(place, "third", "fp8", "gptq", "static")).taken == 3


SLOW = pytest.mark.slow
OTHERS = [pytest.param(change, marks=SLOW) for change in ({"length": 48}, {"sequences": 3}, {"skip_bad_rows": True})]


@pytest.mark.parametrize("change", [{"seed": 5}, *OTHERS])
def test_other_rows_have_other_statistics(change: Mapping[str, object], place: Path) -> None:
    done(a_run(place, "first", "fp8"))
    assert done(a_run(place, "second", "fp8", **change)).taken == 0
    assert len(files(place)) == 6
    [about, _] = sorted((place / "statistics").rglob("about.json"))
    assert json.loads(about.read_text())["recipe"] >= 1


@pytest.mark.slow
def test_other_weights_have_other_statistics_and_a_copy_has_the_same(place: Path) -> None:
    done(a_run(place, "first", "fp8"))
    shutil.move(place / "model", place / "elsewhere")
    shutil.copytree(place / "elsewhere", place / "model")
    assert done(a_run(place, "copied", "fp8")).taken == 3
    write_model(place / "model", layers=3, seed=1)
    assert done(a_run(place, "other", "fp8")).taken == 0


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(name, marks=SLOW) for name in ("cut", "empty"))])
def test_damage_is_found_told_and_mended(damage: str, place: Path) -> None:
    first = a_run(place, "first", "gptq")
    done(first)
    path = files(place)[1]
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 4
    path.write_bytes({"flip": bytes(whole), "cut": bytes(whole[:-40]), "empty": b""}[damage])
    second = a_run(place, "second", "gptq")
    watch = done(second)
    assert watch.taken == 2 and watch.said[1].endswith("made anew")
    assert sums(second) == sums(first)
    assert done(a_run(place, "third", "gptq")).taken == 3


def test_what_a_killed_run_kept_is_taken_and_the_rest_is_run(place: Path) -> None:
    killed = a_run(place, "killed", "gptq")
    with pytest.raises(KeyboardInterrupt):
        convert(killed, Watch(interrupt_after=5))
    kept = len(files(place))
    assert 0 < kept < 3
    second = a_run(place, "second", "gptq")
    assert done(second).taken == kept
    plain = a_run(place, "plain", "gptq", keeping="")
    done(plain)
    assert sums(second) == sums(plain)


@pytest.mark.slow
def test_a_chain_runs_the_original_beside_it_and_keeps_what_others_take(place: Path) -> None:
    assert done(a_run(place, "first", "chain", "fp8")).taken == 0
    assert done(a_run(place, "second", "fp8")).taken == 3
    again = a_run(place, "again", "chain", "fp8")
    assert done(again).taken == 0
    plain = a_run(place, "plain", "chain", "fp8", keeping="")
    done(plain)
    assert sums(again) == sums(plain)


def test_where_nothing_can_be_kept_the_plan_refuses(place: Path) -> None:
    (place / "statistics").write_text("a file")
    with pytest.raises(Refused, match=r"calibration\.keep: .* is a file.*remove keep"):
        convert(a_run(place, "first", "fp8"), Watch())


@pytest.mark.parametrize("keeping", ["statistics", "folder:", "hub:a/b"])
def test_only_a_folder_can_keep_them(keeping: str, place: Path) -> None:
    with pytest.raises(ManifestError, match=r"small\.yaml:\d+:\d+: calibration: keep '.*' has no known form"):
        a_run(place, "first", "fp8", keeping=keeping)


def test_taken_statistics_are_exactly_what_calibration_leaves(tmp_path: Path) -> None:
    hidden = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    everything = Asked(gram=frozenset({"a", "b"}), counted={"a": "column", "b": "tap"}, cache=True)
    taps = {"a": observe(hidden, True, "column"), "b": observe(hidden[:, :5], True, "tap")}
    tensors = pack(taps | {keep.KEYS: observe(hidden, False), keep.VALUES: observe(hidden, False)})
    path = tmp_path / "block.safetensors"
    metadata = {"asked": everything.to_json(), "skipped": "0", keep.CONTENT: keep._digest(tensors)}
    tensor_file.save(path, tensors, metadata)
    asked = Asked(gram=frozenset({"b"}), counted={"a": "tap"})
    taken = keep.take(path, asked)
    assert taken is not None
    expected = pack({"a": observe(hidden, False, "tap"), "b": observe(hidden[:, :5], True)})
    assert taken.tensors.keys() == expected.keys()
    assert all(torch.equal(taken.tensors[name], one) for name, one in expected.items())
    assert keep.holds(path, asked) and not keep.holds(path, Asked(counted={"b": "column"}))
    assert keep.take(path, Asked(gram=frozenset({"c"}))) is None
    assert keep.take(tmp_path / "nothing", asked) is None and not keep.holds(tmp_path / "nothing", asked)
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    with pytest.raises(SourceError):
        keep.take(tmp_path / "odd.safetensors", asked)
    assert not keep.holds(tmp_path / "odd.safetensors", asked)
