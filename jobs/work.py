"""What tasks are about: models that were opened, jobs that were planned, and what a step needs to find its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from converter.architecture import Architecture, block_count
from converter.containers import ArtifactPlan, TensorPlan
from converter.manifest import Calibration, Evaluation, Target
from converter.publish import Destination
from converter.source import Header, Snapshot
from converter.stats import Counted


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the manifest, opened: where its files are and what family it is (None: a plain state dict, or GGUF).

    computed: tensors of the checkpoint that the snapshot leaves out, because whoever runs the model computes them.
    """

    name: str
    snapshot: Snapshot
    architecture: Architecture | None
    computed: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        if self.architecture and self.architecture.blocks:
            return self.architecture.blocks
        return block_count(self.snapshot.config) if self.architecture or self.snapshot.gguf else 0

    @property
    def runs(self) -> bool:
        """Whether its blocks can be run one by one, to calibrate with and to measure what comes out."""
        return self.architecture is not None and self.architecture.runs != "none"

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder, whose texts are whole ones."""
        return self.architecture is not None and self.architecture.runs == "encoder"

    @cached_property
    def headers(self) -> Mapping[int | None, tuple[Header, ...]]:
        """The tensors of the checkpoint by block, None for those outside; empty where no family is known.

        Kept: a plan asks for every block, and a mixture of experts has 18 000 tensors in 48 blocks.
        """
        found: dict[int | None, list[Header]] = {}
        if self.architecture is not None:
            for header in self.snapshot.tensors.values():
                found.setdefault(self.architecture.block_of(header.name), []).append(header)
        return {block: tuple(headers) for block, headers in found.items()}


@dataclass(frozen=True, kw_only=True)
class Signed:
    """The private key that signs artifacts, and the fingerprint of its public half."""

    key: Path
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One model in one target, with everything its artifact will hold.

    place: where it is published; None: nowhere. signed: by which key; None: by none.
    """

    model: Model
    target: Target
    artifact: ArtifactPlan
    place: Destination | None
    signed: Signed | None = None

    @property
    def subject(self) -> str:
        return f"{self.model.name}/{self.target.name}"

    def blocks(self) -> list[int | None]:
        """The blocks that have tensors in the artifact, in order; None, for what lies outside of them, comes first."""
        found = {tensor.block for tensor in self.artifact.tensors}
        return sorted(found, key=lambda block: -1 if block is None else block)

    def tensors(self, block: int | None) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.artifact.tensors if tensor.block == block)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The token text of a run, by digest, so that a changed text changes the keys."""

    calibration: Calibration
    calibration_sha256: str
    evaluation: Evaluation
    evaluation_sha256: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step needs to find its way; see jobs/steps.py for which step reads which field."""

    model: Model
    texts: Texts
    target: Target | None = None
    artifact: ArtifactPlan | None = None
    tensors: tuple[TensorPlan, ...] = ()
    gram_taps: tuple[str, ...] = ()
    drift_taps: tuple[str, ...] = ()
    counted: Mapping[str, Counted] = field(default_factory=dict)  # taps that get a histogram, and of what
    watch_cache: bool = False  # whether keys and values are taps, too
    keep: str = ""  # the folder where statistics are kept for later manifests
    takes: bool = False  # whether those that are there take the place of a forward
    imatrix_sha256: str = ""  # of the file that the target names, as it was planned with
    calibrated: str = ""  # the key of the task whose statistics, or hidden state, this step reads
    chained: str = ""  # the key of a propagate task: of the block before to the next, of a block to its quantize task
    beside: str = ""  # the key of the calibrate task that left the original's hidden state in front of the block
    parts: Mapping[str, tuple[str, ...]] | None = None  # quantize key -> names of the tensors it holds
    assembled: str = ""
    referenced: str = ""
    evaluated: str = ""
    finished: str = ""
    repo: str = ""  # where the card says that the artifact is
    place: Destination | None = None
    sign_key: Path | None = None  # of a finish task, which then runs with the driver
    device: str = "cpu"
    fetched: str = ""
