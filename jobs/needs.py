"""What tasks take, from shapes alone: bytes of memory while they run, bytes of disk that they leave. Upper bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from converter.calibrate import PAIRS
from converter.compare.metrics import WINDOW
from converter.histogram import BINS
from converter.manifest import Target
from converter.methods.tables import NEEDS
from converter.stats import STRIPE_COLUMNS, Counted
from jobs.task import Task
from jobs.work import Model, PlannedJob, Texts

F32_BYTES = 4
SUM_BYTES = 8  # of a column in f64
FIELDS = 4  # of SUM_BYTES that statistics have for each column: two sums in f64, three values in f32
NAMES_BYTES = 1000  # that the names of a tap's tensors take in a file
# Importing torch and transformers and reading a tokenizer takes about this much in every worker process.
WORKER_BYTES = 700_000_000
# How many times the widest Gram GPTQ holds at its peak: itself, three of f64 (7 measured in all), and smaller taps'.
GRAMS = 8
# How many times a tensor is there in f32 while it is compared: as it was, as read back, and on the way.
COMPARED = 4
CHAINED = 3  # how many hidden states of the calibration rows: the original's, the chain's, and what that comes from
# Of learned rounding: how many times a block is there in f32, and how much a pass keeps for the way back, in hidden
# states of a sequence.
LEARNED = 8
PASSED = 64
# Weights that are read, rounded and written together, and how many times as many are on the way at the peak.
SLAB_WEIGHTS = 1 << 22
SLABS = 16  # 15 measured, on 128k x 4096 weights from BF16
DECODING_SLABS = 4  # more, as f32, while codes become values: indices, scales for each weight, the product


def block_bytes(model: Model, block: int | None) -> int:
    """Bytes in f32 of the checkpoint's tensors in a block, or of those outside every block."""
    return F32_BYTES * sum(math.prod(header.shape) for header in model.headers.get(block, ()))


def hidden_bytes(model: Model, rows: int) -> int:
    return F32_BYTES * rows * embedding_shape(model)[-1]


def embedding_shape(model: Model) -> tuple[int, ...]:
    """The shape [V, D] of the embedding; the weights are there to ask, and config.json may leave out what is usual."""
    assert model.architecture is not None
    return model.snapshot.tensors[f"{model.architecture.embedding}.weight"].shape


def calibrate_bytes(model: Model, texts: Texts, block: int, grams: bool, counted: Mapping[str, Counted]) -> int:
    assert model.architecture is not None
    hidden = hidden_bytes(model, texts.calibration.sequences * texts.calibration.length)
    total = WORKER_BYTES + block_bytes(model, block) + 2 * hidden + (block_bytes(model, None) if block == 0 else 0)
    if grams:
        total += 2 * F32_BYTES * sum(width * width for width in _tap_widths(model, block).values())
    return total + _counts_bytes(model, block, counted)


def propagate_bytes(model: Model, texts: Texts, block: int, grams: bool, counted: Mapping[str, Counted]) -> int:
    """Memory of a chain's step: the block in front or the block itself, and hidden states of both beside each other."""
    hidden = hidden_bytes(model, texts.calibration.sequences * texts.calibration.length)
    before = block_bytes(model, block - 1 if block else None)
    total = WORKER_BYTES + before + block_bytes(model, block) + CHAINED * hidden + _rows_bytes(model, texts, block)
    if grams:  # the Gram matrix, as it is packed, and the drift
        total += 3 * F32_BYTES * sum(width * width for width in _tap_widths(model, block).values())
    return total + _counts_bytes(model, block, counted)


def _counts_bytes(model: Model, block: int, counted: Mapping[str, Counted]) -> int:
    """What histograms of a block's taps take: a row of counts a column, or a stripe of columns at most."""
    widths = {tap: width for tap, width in _tap_widths(model, block).items() if tap in counted}
    rows = (width if counted[tap] == "column" else -(-width // STRIPE_COLUMNS) for tap, width in widths.items())
    return SUM_BYTES * BINS * sum(rows)


def _tap_widths(model: Model, block: int) -> dict[str, int]:
    """The number of columns of each tap of a block, by its name."""
    assert model.architecture is not None
    widths: dict[str, int] = {}
    for header in model.headers.get(block, ()):
        if tap := model.architecture.tap_of(header.name):
            widths[tap.name] = header.shape[-1]
    return widths


def evaluate_bytes(model: Model, texts: Texts) -> int:
    if not model.runs:
        widest = max((math.prod(header.shape) for header in model.snapshot.tensors.values()), default=0)
        return WORKER_BYTES + COMPARED * F32_BYTES * widest
    hidden = hidden_bytes(model, texts.evaluation.sequences * texts.evaluation.length)
    largest = max((block_bytes(model, block) for block in range(model.blocks)), default=0)
    logits = 4 * F32_BYTES * min(texts.evaluation.length, WINDOW) * embedding_shape(model)[0]
    return WORKER_BYTES + 2 * largest + 2 * block_bytes(model, None) + 3 * hidden + logits


def streams(target: Target) -> bool:
    """Whether tensors of this target are rounded a slab of rows at a time (see jobs/stream.py)."""
    return target.format == "gguf" and target.methods == ("rtn",)


def rounds_on_gpu(target: Target) -> bool:
    """Whether there are GPU kernels for how this target is rounded: ggml's own search, not the thorough one; GPTQ."""
    return target.search == "ggml" if streams(target) else target.methods[-1] == "gptq"


def quantize_bytes(job: PlannedJob, block: int | None, gram: bool) -> int:
    """Memory of rounding a block, or, outside the blocks, the widest tensor there; gram: its statistics have one."""
    if streams(job.target):
        snapshot, sources = job.model.snapshot, [tensor.source for tensor in job.tensors(block)]
        views = (snapshot.tensors[name].view for name in sources if name in snapshot.tensors)
        viewed = max((math.prod(view.shape) for view in views if view is not None), default=0)
        parts = max((snapshot.packed[name].size_bytes for name in sources if name in snapshot.packed), default=0)
        rows = max((tensor.shape[-1] for tensor in job.tensors(block)), default=0)
        slabs = SLABS + (DECODING_SLABS if parts else 0)
        return WORKER_BYTES + F32_BYTES * (slabs * max(SLAB_WEIGHTS, rows) + 3 * viewed) + parts
    shapes = [tensor.shape for tensor in job.tensors(block)]
    weights = sum(math.prod(shape) for shape in shapes) if block is not None else 0
    widest = max((math.prod(shape) for shape in shapes), default=0)
    columns = max((shape[-1] for shape in shapes if shape), default=0) if gram else 0
    experts = _expert_grams(job.model, block) if gram and block is not None else 0
    return WORKER_BYTES + F32_BYTES * (weights + 3 * widest + GRAMS * columns**2 + experts)


def _expert_grams(model: Model, block: int) -> int:
    """Values of the Gram matrices of a block's experts, all there at once, rare ones twice, and of the layer's."""
    assert model.architecture is not None
    widths = _tap_widths(model, block)
    own = [
        widths[tap.name] ** 2
        for tap in model.architecture.taps
        if tap.name in widths and model.architecture.is_routed(tap)
    ]
    return 2 * sum(own) + 2 * max(own, default=0)


def stages_bytes(job: PlannedJob, texts: Texts, block: int) -> int:
    """Memory of rounding a chain's block in stages, which runs it, too: as it was, as it is so far, and both chains."""
    hidden = hidden_bytes(job.model, texts.calibration.sequences * texts.calibration.length)
    running = 3 * block_bytes(job.model, block) + 2 * hidden + _rows_bytes(job.model, texts, block)
    drifts = 2 * F32_BYTES * sum(width * width for width in _tap_widths(job.model, block).values())
    return quantize_bytes(job, block, gram=True) + running + drifts


def learning_bytes(job: PlannedJob, texts: Texts, block: int, threads: int) -> int:
    """Memory of learning how to round a block: weights, shifts, codes, gradients of each thread, what a pass keeps."""
    hidden = hidden_bytes(job.model, texts.calibration.sequences * texts.calibration.length)
    passed = threads * PASSED * hidden_bytes(job.model, texts.calibration.length)
    learned = (LEARNED + threads) * block_bytes(job.model, block) + 4 * hidden + passed
    return quantize_bytes(job, block, gram=True) + learned


def _rows_bytes(model: Model, texts: Texts, block: int) -> int:
    """What the taps of a block read of the sequences of the original that run at a time beside a chain."""
    return 2 * F32_BYTES * PAIRS * texts.calibration.length * sum(_tap_widths(model, block).values())


def chain_forwards(job: PlannedJob) -> int:
    """Forwards of a block over all calibration rows that a chain takes: see jobs/propagate.py and jobs/stages.py."""
    architecture, rounder = job.model.architecture, job.target.methods[-1]
    assert architecture is not None
    stages = {tap.name.partition(".")[0] for tap in architecture.taps}
    return 3 + (2 * (len(stages) - 1) if NEEDS[rounder](job.target.collects_imatrix).drift else 0)


def learning_passes(job: PlannedJob, sequences: int) -> float:
    """Passes of a block forward and back over all calibration rows that learned rounding takes, at `sequences` rows."""
    return job.target.iterations * min(job.target.batch_size, sequences) / sequences


def calibrate_disk(model: Model, texts: Texts, block: int, grams: bool, counted: Mapping[str, Counted]) -> int:
    """Disk of a block's statistics, of the sums of all blocks up to it, and of the rows behind it."""
    rows = hidden_bytes(model, texts.calibration.sequences * texts.calibration.length)
    sums = (block + 1) * SUM_BYTES * sum(_tap_widths(model, block).values())
    return rows + sums + statistics_disk(model, block, grams, counted)


def statistics_disk(model: Model, block: int, grams: bool, counted: Mapping[str, Counted]) -> int:
    """Disk of a block's statistics alone."""
    widths = _tap_widths(model, block).values()
    matrices = sum(width * (width + 1) // 2 for width in widths) * F32_BYTES if grams else 0  # the upper triangles
    sums = FIELDS * SUM_BYTES * sum(widths) + NAMES_BYTES * len(widths)
    return sums + matrices + _counts_bytes(model, block, counted)


def propagate_disk(model: Model, texts: Texts, block: int, grams: bool, counted: Mapping[str, Counted]) -> int:
    """Disk of a chain's rows in front of a block, and of the block's statistics with a drift for each Gram matrix."""
    rows = hidden_bytes(model, texts.calibration.sequences * texts.calibration.length)
    widths = _tap_widths(model, block).values()
    matrices = sum(2 * width * width for width in widths) * F32_BYTES if grams else 0
    return rows + matrices + _counts_bytes(model, block, counted)


def reference_disk(model: Model, texts: Texts) -> int:
    """Disk of the original's hidden states in front of every block and behind the last."""
    return (model.blocks + 1) * hidden_bytes(model, texts.evaluation.sequences * texts.evaluation.length)


def quantize_disk(job: PlannedJob, block: int | None) -> int:
    """Disk of a block's parts: a byte a code, and what is stored as it is."""
    return sum(math.prod(t.shape) + t.size_bytes for t in job.tensors(block))


def disk_bytes(tasks: Iterable[Task]) -> int:
    """Disk for these tasks together. Of statistics, two blocks of each model and chain lie there at the same time."""
    total = 0
    statistics: dict[str, int] = {}
    for task in tasks:
        if task.kind in ("calibrate", "propagate"):
            statistics[task.subject] = max(statistics.get(task.subject, 0), task.resources.disk_bytes)
        else:
            total += task.resources.disk_bytes
    return total + 2 * sum(statistics.values())


def memory_bytes(tasks: Iterable[Task]) -> int:
    """Memory of the largest of these tasks."""
    return max((task.resources.memory_bytes for task in tasks), default=0)
