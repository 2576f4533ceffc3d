"""What tasks are about: models that were opened, jobs that were planned, and what a step needs to find its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converter.architecture import Architecture, block_count
from converter.containers import ArtifactPlan, TensorPlan
from converter.manifest import Calibration, Evaluation, Target
from converter.source import Snapshot


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the manifest, opened: where its files are and what family it is (None: a plain state dict).

    computed: tensors of the checkpoint that the snapshot leaves out, because whoever runs the model computes them.
    """

    name: str
    snapshot: Snapshot
    architecture: Architecture | None
    computed: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        return block_count(self.snapshot.config) if self.architecture else 0


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One model in one target, with everything its artifact will hold. repo: where it is published; None: nowhere."""

    model: Model
    target: Target
    artifact: ArtifactPlan
    repo: str | None

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
    calibrated: str = ""  # the key of the calibrate task that this step reads
    parts: Mapping[str, tuple[str, ...]] | None = None  # quantize key -> names of the tensors it holds
    assembled: str = ""
    referenced: str = ""
    evaluated: str = ""
    finished: str = ""
    repo: str = ""
    hub: str = ""
    private: bool = True
    device: str = "cpu"
    fetched: str = ""
