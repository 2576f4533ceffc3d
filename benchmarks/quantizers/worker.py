"""One quantization by a peer, in the peer's own environment: started by benchmarks/peers.py, prints a line of JSON.

    python benchmarks/quantizers/worker.py '{"tool": "llm-compressor", "scheme": "W4A16", "methods": ["gptq"], ...}'

Reads the model and the token rows from files, writes the checkpoint as the tool itself does. Nothing of ours is
imported here.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize as the first argument says, and print what it took."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    quantize = {"llm-compressor": llm_compressor, "auto-round": auto_round}[asked["tool"]](asked)
    with torch.device("meta"):  # imports the code of the model's family, as ours does before its clock starts
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked["model"]))
    imported = resident_bytes()
    start, processor = time.perf_counter(), processor_seconds()
    quantize()
    figures = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - processor,
        "process_seconds": processor_seconds(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "imported_bytes": imported,
    }
    print(json.dumps(figures))


def llm_compressor(asked: dict[str, Any]) -> Any:
    """What runs llm-compressor; its packages are imported already."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from loguru import logger

    logger.remove()
    if not torch.accelerator.is_available():  # AWQ's cache asks for pinned memory, which torch has only beside a GPU
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]

    def scheme() -> Any:
        found = preset_name_to_scheme(asked["scheme"], ["Linear"])
        if asked["group_size"]:
            found.weights.group_size = asked["group_size"]
        if asked["observer"]:
            found.weights.observer = asked["observer"]
        return {"config_groups": {"group_0": found}, "ignore": ["lm_head"]}

    makers = {
        "rtn": lambda: QuantizationModifier(**scheme()),
        "gptq": lambda: GPTQModifier(**scheme()),
        "awq": lambda: AWQModifier(duo_scaling="both"),
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.8),
    }

    def quantize() -> None:
        rows = load_file(asked["rows"])["calibration"]
        columns = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"])
        oneshot(
            model=model,
            dataset=Dataset.from_dict(columns),
            recipe=[makers[method]() for method in asked["methods"]],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            max_seq_length=rows.shape[1],
        )
        model.save_pretrained(asked["out"], save_compressed=True)

    return quantize


def auto_round(asked: dict[str, Any]) -> Any:
    """What runs auto-round with its published settings, 200 steps of 8 sequences for each block."""
    from auto_round import AutoRound

    logging.getLogger("autoround").setLevel(logging.ERROR)

    def quantize() -> None:
        rows = load_file(asked["rows"])["calibration"]
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"])
        tokenizer = AutoTokenizer.from_pretrained(asked["model"])
        rounding = AutoRound(
            model,
            tokenizer,
            scheme=asked["scheme"],
            group_size=asked["group_size"],
            iters=200,
            batch_size=8,
            seqlen=rows.shape[1],
            nsamples=len(rows),
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
            device_map="cpu",
            enable_alg_ext=asked["extended"],
        )
        rounding.quantize_and_save(asked["out"], format="auto_round")

    return quantize


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def processor_seconds() -> float:
    """Processor time of this process and of children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
