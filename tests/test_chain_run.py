"""Whole runs with a target's own chain: what it holds, who waits for whom, the same bytes after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from converter import manifest as manifests
from converter import tensor_file
from converter.architecture import Tap
from converter.blocks import Decoder
from converter.compare.evaluation import block_tensors
from converter.containers.tables import CONTAINERS
from converter.methods import Block
from converter.progress import Event
from jobs import steps
from jobs.attempt import Attempt, original_of, rows_of
from jobs.convert import Refused, Run, convert, plan
from jobs.show import plan_json
from jobs.stages import stages_of
from jobs.store import Store
from jobs.task import Task
from jobs.work import Work
from small_run import TOKENIZER, write_manifest, write_model
from tiny_families import few

TARGETS = {
    "int2": "{format: parquet, scheme: INT2, method: gptq, group_size: 32, propagate: quantized}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, gptq], propagate: quantized}",
    "q4-0": "{format: gguf, type: Q4_0, imatrix: true, propagate: quantized}",
}


class Watch:
    """A display that looks at what lies on the disk, and interrupts after so many tasks."""

    def __init__(self, store: Store, interrupt_after: int = -1) -> None:
        self.store, self.left = store, interrupt_after
        self.most: Counter[str] = Counter()

    def show(self, event: Event) -> None:
        lying = Counter(key.partition("-")[0] for key in self.store.done())
        self.most |= lying
        if event.state == "done":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def close(self) -> None:
        pass


def a_run(place: Path, out: str) -> Run:
    return Run(manifest=manifests.load(place / "small.yaml"), out=place / out, executor="inprocess")


def sums(run: Path) -> dict[str, str]:
    """The sha256 of every file of the artifacts."""
    paths = [path for path in run.rglob("*") if path.is_file() and ".work" not in path.parts]
    ours = [path for path in paths if len(path.relative_to(run).parts) > 2]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in ours}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chained")
    write_model(folder / "model", layers=4)
    write_manifest(folder, TARGETS)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, Watch]:
    run = a_run(place, "out")
    watch = Watch(run.store)
    assert convert(run, watch).failures == ()
    return run.store.run, watch


def test_at_most_two_blocks_of_statistics_lie_on_disk(finished: tuple[Path, Watch]) -> None:
    _, watch = finished
    assert watch.most["calibrate"] == 2
    assert watch.most["propagate"] <= 2 * len(TARGETS)


def test_nothing_of_a_chain_is_left_behind(finished: tuple[Path, Watch]) -> None:
    kinds = {key.partition("-")[0] for key in Store(run=finished[0]).done()}
    assert not kinds & {"calibrate", "propagate", "quantize"}


@pytest.mark.parametrize("after", few([3, 9, 14, 17, 21, 26], (14, 21)))
def test_a_run_that_was_cut_ends_with_the_same_bytes(
    place: Path, finished: tuple[Path, Watch], after: int, tmp_path: Path
) -> None:
    run = Run(manifest=manifests.load(place / "small.yaml"), out=tmp_path, executor="inprocess")
    with pytest.raises(KeyboardInterrupt):
        convert(run, Watch(run.store, after))
    assert convert(run, Watch(run.store)).exit_code == 0
    assert sums(run.store.run) == sums(finished[0])


def test_a_chains_price_is_in_the_plan(place: Path) -> None:
    run = a_run(place, "planned")
    jobs = {job["job"]: job["notes"] for job in plan_json(run, plan(run))["jobs"]}
    assert "propagate: quantized takes 9 forwards more for each of 4 blocks" in jobs["model/int2"]
    assert "propagate: quantized takes 3 forwards more for each of 4 blocks" in jobs["model/q4-0"]


def test_each_step_of_a_chain_reads_the_one_before(place: Path) -> None:
    graph = plan(a_run(place, "planned")).prepared.plan.graph
    chain = {task.block: task for task in graph.tasks.values() if task.kind == "propagate" and "int2" in task.subject}
    assert list(chain) == [0, 1, 2, 3]
    for block, task in chain.items():
        assert block is not None
        read = {(graph.tasks[key].kind, graph.tasks[key].block) for key in task.reads}
        before = None if block == 0 else block - 1
        assert ("quantize", before) in read
        assert block == 0 or read >= {("calibrate", block - 1), ("propagate", block - 1)}
        readers = [graph.tasks[key] for key in graph.readers[task.key]]
        assert ("quantize", block) in {(reader.kind, reader.block) for reader in readers}
    # Calibration of the original gathers no Gram matrix, since no target without a chain asks for one.
    assert all(not task.spec["gram"] for task in graph.tasks.values() if task.kind == "calibrate")


def chain_of(place: Path, store: Store, target: str, block: int, threads: int) -> tuple[Task, Attempt]:
    """Run what the chain's step in front of a block needs, and it."""
    graph = plan(a_run(place, "planned")).prepared.plan.graph
    (task,) = [
        task
        for task in graph.tasks.values()
        if task.kind == "propagate" and task.block == block and task.subject == f"model/{target}"
    ]
    for key in graph.needed((), [task.key]):
        assert steps.run(graph.tasks[key], store, threads).error == ""
    assert isinstance(task.work, Work)
    attempt = Attempt(
        task=task,
        work=task.work,
        store=store,
        folder=store.run,
        record={},
        threads=1,
        report=lambda share: None,
        tell=lambda text: None,
    )
    return task, attempt


def test_the_chain_is_what_transformers_computes_with_the_artifact(
    place: Path, finished: tuple[Path, Watch], tmp_path: Path
) -> None:
    task, attempt = chain_of(place, Store(run=tmp_path), "int2", 2, 1)
    found = tensor_file.load(attempt.store.output(task.key) / "hidden.safetensors")["hidden"]
    model = attempt.work.model
    opened = CONTAINERS["parquet"].open(finished[0] / "model" / "int2", model.architecture)
    reference = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    state = {name: opened.read(name) for name in opened.names}
    reference.load_state_dict(state, strict=False)  # the head is the embedding
    rows = rows_of(attempt, model, attempt.work.texts.calibration)
    with torch.no_grad():
        expected = reference(rows, output_hidden_states=True).hidden_states[2]
    # Two blocks of f32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_chain_quantizes_activations_as_a_server_does(
    place: Path, finished: tuple[Path, Watch], tmp_path: Path
) -> None:
    task, attempt = chain_of(place, Store(run=tmp_path), "w8a8", 1, 1)
    found = tensor_file.load(attempt.store.output(task.key) / "hidden.safetensors")["hidden"]
    model = attempt.work.model
    assert model.architecture is not None
    opened = CONTAINERS["compressed-tensors"].open(finished[0] / "model" / "w8a8", model.architecture)
    decoder = Decoder(place / "model", model.architecture, "the test's model", stored=model.snapshot.tensors)
    rows, prefix = rows_of(attempt, model, attempt.work.texts.calibration), model.architecture.prefix(0)
    names = block_tensors(original_of(attempt, model), 0)
    said = {name.removesuffix(".weight"): opened.activations(prefix + name) for name in names}
    activations = {module: how for module, how in said.items() if how}
    assert len(activations) == 7
    hidden = decoder.embed(rows, {name: opened.read(name) for name in decoder.input_names})
    tensors = {name: opened.read(prefix + name) for name in names}
    assert torch.equal(found, decoder.run_block(0, tensors, hidden, activations=activations))
    assert not torch.equal(found, decoder.run_block(0, tensors, hidden))


def test_a_chain_has_the_same_bytes_on_any_number_of_threads(place: Path, tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        task, attempt = chain_of(place, Store(run=tmp_path / str(threads)), "int2", 1, threads)
        output = attempt.store.output(task.key)
        files.append([(output / name).read_bytes() for name in ("hidden.safetensors", "stats.safetensors")])
    assert files[0] == files[1]


def test_experts_are_not_corrected_and_the_comparison_says_so(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "model" / name)
    write_manifest(tmp_path, {"int2": TARGETS["int2"]})
    run = a_run(tmp_path, "out")
    result = convert(run, Watch(run.store))
    assert result.failures == ()
    (row,) = result.rows
    noted = {name for name, note in row["notes"].items() if "routed otherwise in the chain" in note}
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in noted
    assert not any("self_attn" in name for name in noted)


def test_a_model_that_is_not_run_has_no_chain(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    save_file({"0.weight": torch.randn(64, 64)}, tmp_path / "model" / "model.safetensors")
    write_manifest(tmp_path, {"int2": TARGETS["int2"]})
    with pytest.raises(Refused):
        plan_or_refuse(a_run(tmp_path, "out"))


def plan_or_refuse(run: Run) -> None:
    ready = plan(run)
    if ready.reasons:
        raise Refused(ready.reasons)


def test_what_a_block_reads_first_is_rounded_first() -> None:
    taps = (
        Tap(name="attention_input", linears=("q", "k")),
        Tap(name="attention_output", linears=("o",)),
        Tap(name="shared_input", linears=("absent",)),
        Tap(name="expert_input.0", linears=("e.0.up",)),
        Tap(name="expert_middle.0", linears=("e.0.down",)),
        Tap(name="expert_input.1", linears=("e.1.up",)),
        Tap(name="expert_middle.1", linears=("e.1.down",)),
    )
    names = ["norm", "e.1.down", "e.1.up", "e.0.down", "e.0.up", "o", "k", "q"]
    block = Block(where="", tensors={f"{name}.weight": torch.zeros(1) for name in names}, stats={}, taps=taps)
    assert [(taps, [name.removesuffix(".weight") for name in names]) for taps, names in stages_of(block)] == [
        (["attention_input"], ["norm", "q", "k"]),
        (["attention_output"], ["o"]),
        (["expert_input.0", "expert_input.1"], ["e.0.up", "e.1.up"]),
        (["expert_middle.0", "expert_middle.1"], ["e.0.down", "e.1.down"]),
    ]
    assert stages_of(dataclasses.replace(block, taps=())) == [([], list(block.tensors))]
