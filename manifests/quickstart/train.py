"""Train the quickstart model from scratch: a small Qwen3 that really predicts text, so that errors mean something.

The idea: quantization is only interesting on weights that have learned; on random weights every method looks alike.
A model of about four million parameters learns the Python standard library well enough in minutes on two cores.
The alternative, downloading a published small model, needs a network and somebody else's licence on the first run;
the price of ours is a model that is of no use beyond showing what a conversion costs.

    python manifests/quickstart/train.py [--steps N] [--seed S] [--out FOLDER] [--threads T] [--hidden D] [--blocks B]

A larger one for benchmarks: --hidden 512 --blocks 5 makes 17.8 million parameters.
The text is the running interpreter's standard library and this repository's calibration text. The evaluation text
and every library file whose content hash falls into the held-out share are never trained on.
"""
# B rows of a batch, T tokens of a row, V vocabulary

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parents[1] / "converter" / "texts"
SEPARATOR = "\n%%\n"  # a line of its own between two documents of a built-in text

VOCABULARY_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's pattern to the letter: readers of GGUF know it by name (tokenizer.ggml.pre = qwen2), and no other would do.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "encodings"})
HELD_OUT_SHARE = 0.03
BUILT_IN_REPEATS = 4  # the built-in text is one part in two hundred of the library; without repeats it teaches little

HIDDEN, BLOCKS = 256, 4
ROW_LENGTH = 512
ROWS_PER_STEP = 2
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 100
SLICE_ROWS, SLICE_LENGTH = 8, 256  # the fixed slice of the evaluation text that a test measures again


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents trained on, and documents kept back for measuring; none is in both lists."""

    training: list[str]
    held_out: list[str]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity per token of the model and of a unigram model on the same tokens."""

    tokens: int
    model: float
    unigram: float


def read_standard_library() -> tuple[list[str], list[str]]:
    """Return (training, held out) sources of the running interpreter's standard library, in the order of their paths.

    A file is held out when the first four bytes of its content's sha256 fall into `HELD_OUT_SHARE`, so the choice
    depends neither on the machine nor on the order of files. pydoc's topics, stored as one dictionary, are unpacked
    into one document each, because they are the longest prose the library has.
    """
    root = Path(sysconfig.get_path("stdlib"))
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        documents = [text]
        if path.name == "topics.py":
            namespace: dict[str, dict[str, str]] = {}
            exec(compile(text, "topics.py", "exec"), namespace)
            documents = list(namespace["topics"].values())
        is_held_out = int.from_bytes(hashlib.sha256(content).digest()[:4], "big") < HELD_OUT_SHARE * 2**32
        (held_out if is_held_out else training).extend(documents)
    return training, held_out


def read_built_in(path: Path) -> list[str]:
    """Return the documents of a built-in text, those written as a dialogue rendered as a chat."""
    return [as_chat(document) for document in path.read_text(encoding="utf-8").rstrip("\n").split(SEPARATOR)]


def as_chat(document: str) -> str:
    """Return a document whose first line starts with `User:` in chat markup, any other document unchanged."""
    if not document.startswith("User: "):
        return document
    parts: list[str] = []
    for line in document.split("\n"):
        for name in ("User", "Assistant"):
            if line.startswith(f"{name}: "):
                if parts:
                    parts.append(f"{TURN_END}\n")
                parts.append(f"{TURN_START}{name.lower()}\n")
                line = line.removeprefix(f"{name}: ")
        parts.append(line if parts[-1].startswith(TURN_START) else f"\n{line}")
    return "".join(parts).rstrip("\n") + f"{TURN_END}\n"


def read_corpus() -> Corpus:
    """Return the library and the calibration text; the evaluation text is read only after training."""
    training, held_out = read_standard_library()
    built_in = read_built_in(TEXTS / "calibration.txt")
    return Corpus(training=training + built_in * BUILT_IN_REPEATS, held_out=held_out)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY_SIZE` tokens with Qwen2's splitting and ChatML's three marks."""
    special_tokens = [END_OF_TEXT, TURN_START, TURN_END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(special_tokens),  # the marks come last, as in the Qwen family
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    for mark in special_tokens:
        documents = [document.replace(mark, "\n") for document in documents]
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """Return one int32 stream of the documents' tokens, each document closed by the end-of-text token."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.asarray([*encoding.ids, end], dtype=np.int32) for encoding in encoded])


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, blocks: int) -> Qwen3ForCausalLM:
    """Return an untrained model in f32; a hidden width divisible by 256 makes every input width so, as k-quants demand.

    Eight heads share the width, and the MLP is three times as wide.
    """
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        use_cache=True,
    )
    return Qwen3ForCausalLM(config).float()


def iterate_batches(stream: np.ndarray, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches [B, T + 1] int64 for ever: each pass cuts the stream at a new offset and shuffles the rows."""
    while True:
        offset = int(torch.randint(ROW_LENGTH, (1,), generator=generator))
        row_count = (len(stream) - offset - 1) // ROW_LENGTH
        order = torch.randperm(row_count, generator=generator)
        for start in range(0, row_count - ROWS_PER_STEP + 1, ROWS_PER_STEP):
            firsts = (offset + order[start : start + ROWS_PER_STEP] * ROW_LENGTH).tolist()
            yield torch.from_numpy(np.stack([stream[a : a + ROW_LENGTH + 1] for a in firsts]).astype(np.int64))


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the linear layers, and AdamW for the embedding and the norms.

    Few tokens are affordable, and after 120,000 of them Muon stood at 5.9 nats where AdamW alone stood at 6.6, for
    a fifth more time. Its update is rescaled to AdamW's size, so both share one learning rate.
    Source: Liu et al. 2025, arXiv:2502.16982.
    """
    linear = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(linear, lr=PEAK_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int, hidden: int) -> float:
    """Return the rate at a step: linear warm-up, then half a cosine down to a fiftieth of the peak.

    The peak belongs to a width of HIDDEN and falls with the root of wider ones.
    """
    peak = PEAK_LEARNING_RATE * math.sqrt(HIDDEN / hidden)
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, stream: np.ndarray, *, steps: int, seed: int) -> list[tuple[int, float]]:
    """Train in place and return the loss curve as (step, mean loss in nats since the entry before)."""
    batches = iterate_batches(stream, torch.Generator().manual_seed(seed))
    optimizers = build_optimizers(model)
    curve: list[tuple[int, float]] = []
    window: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        tokens_BT = next(batches)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, steps, model.config.hidden_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        window.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            curve.append((step + 1, round(sum(window) / len(window), 4)))
            window.clear()
            print(f"step {step + 1}/{steps}  loss {curve[-1][1]:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return curve


@torch.no_grad()
def sum_losses(model: Qwen3ForCausalLM, stream: np.ndarray, length: int) -> tuple[float, np.ndarray]:
    """Return the summed loss in nats over rows of `length` tokens, and the tokens that were predicted.

    A row's first token is given, not predicted; an incomplete last row is left out.
    """
    rows_BT = torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length).astype(np.int64))
    total = 0.0
    for start in range(0, len(rows_BT), ROWS_PER_STEP):
        part_BT = rows_BT[start : start + ROWS_PER_STEP]
        logits_BTV = model(input_ids=part_BT, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum"
        ).item()
    return total, rows_BT[:, 1:].flatten().numpy()


def measure(model: Qwen3ForCausalLM, stream: np.ndarray, counts_V: np.ndarray, length: int) -> Perplexity:
    """Return both perplexities on a stream in rows of `length`; counts_V are the training counts, smoothed by one."""
    total, predicted = sum_losses(model, stream, length)
    smoothed_V = (counts_V + 1.0) / (counts_V.sum() + len(counts_V))
    unigram = float(-np.log(smoothed_V[predicted]).mean())
    return Perplexity(
        tokens=len(predicted),
        model=round(math.exp(total / len(predicted)), 4),
        unigram=round(math.exp(unigram), 4),
    )


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bf16 with its tokenizer and its generation settings."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[model.config.eos_token_id, model.config.pad_token_id],
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written as 0600, which a copy in another user's hands cannot read
    tokenizer.save_pretrained(out)


def measure_saved(out: Path, training_stream: np.ndarray, held_out: list[str]) -> dict[str, Perplexity]:
    """Return the perplexities of what a reader gets: the weights after rounding to bf16, computed in f32."""
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    counts_V = np.bincount(training_stream, minlength=VOCABULARY_SIZE).astype(np.float64)
    evaluation = encode_stream(tokenizer, read_built_in(TEXTS / "evaluation.txt"))
    return {
        "held_out": measure(model, encode_stream(tokenizer, held_out), counts_V, ROW_LENGTH),
        "evaluation": measure(model, evaluation, counts_V, ROW_LENGTH),
        "evaluation_slice": measure(model, evaluation[: SLICE_ROWS * SLICE_LENGTH], counts_V, SLICE_LENGTH),
    }


def write_record(out: Path, record: dict[str, object], perplexities: dict[str, Perplexity]) -> None:
    """Write `training.json`, and the model card with the same figures in place of its `{{names}}`."""
    measured = {name: asdict(perplexity) for name, perplexity in perplexities.items()}
    (out / "training.json").write_text(json.dumps(record | measured, indent=2) + "\n", encoding="utf-8")
    figures = record | {f"{name}_{key}": value for name, part in measured.items() for key, value in part.items()}
    card = (HERE / "card.md").read_text(encoding="utf-8")
    for key, value in figures.items():
        text = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        card = card.replace("{{" + key + "}}", text)
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Train, save, measure what was saved, and write the record."""
    parser = argparse.ArgumentParser(description="Train the quickstart model from scratch.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)  # more is faster, and rounds otherwise
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    transformers.utils.logging.disable_progress_bar()

    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.training)
    stream = encode_stream(tokenizer, corpus.training)
    print(f"{len(corpus.training)} documents, {len(stream)} tokens", flush=True)
    model = build_model(tokenizer, arguments.hidden, arguments.blocks)
    started = time.monotonic()
    curve = train(model, stream, steps=arguments.steps, seed=arguments.seed)
    seconds = time.monotonic() - started
    save(model, tokenizer, arguments.out)

    perplexities = measure_saved(arguments.out, stream, corpus.held_out)
    for name, perplexity in perplexities.items():
        print(name, perplexity, flush=True)
    record: dict[str, object] = {
        "parameters": model.num_parameters(),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "training_tokens": len(stream),
        "tokens_seen": arguments.steps * ROWS_PER_STEP * ROW_LENGTH,
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "loss_curve": {step: loss for step, loss in curve if step % 200 == 0},
    }
    write_record(arguments.out, record, perplexities)


if __name__ == "__main__":
    main()
