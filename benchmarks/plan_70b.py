"""Seconds and peak memory of `hubmill plan` on models of 70 and 671 billion parameters, from their headers alone.

    python benchmarks/plan_70b.py [--models llama-70b deepseek-v3] [--repeats 3] [--json FILE]

Each layout is written with the real one's config.json, shards, names, shapes and types; its weights are holes in sparse
files, which no plan may read. The tokenizer has as many tokens and merges as the real one. The command runs in a fresh
process; wall time, processor time and the highest resident memory are the system's own figures for that process. The
last line is an import of torch alone, beside the same load, to tell the machine from the command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "manifests" / "quickstart" / "model"
BYTES = {"BF16": 2, "F32": 4}
Tensor = tuple[str, tuple[int, ...], str]  # name, shape, type

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def main() -> None:
    """Write each layout, plan it in fresh processes and print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments.add_argument("--folder", type=Path, help="write the layouts here, and keep them")
    given = arguments.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        for model in given.models:
            folder = (given.folder or Path(name)) / model
            config, shards, tensors = LAYOUTS[model]
            write_layout(folder, config, shards, list(tensors(config)))
            found.append({"model": model} | measure([cli(), "plan", str(folder)], given.repeats))
            print(as_text(found[-1]), flush=True)
    found.append({"model": "import torch"} | measure([sys.executable, "-c", "import torch"], given.repeats))
    print(as_text(found[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def cli() -> str:
    """The command as it is installed beside this Python."""
    return str(Path(sys.executable).parent / "hubmill")


def llama(config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of Llama 3.3 70B."""
    hidden, middle, narrow = config["hidden_size"], config["intermediate_size"], 8 * 128
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), "BF16"
    for b in range(config["num_hidden_layers"]):
        block = f"model.layers.{b}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            yield f"{block}{name}.weight", shape, "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (config["vocab_size"], hidden), "BF16"


def deepseek(config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of DeepSeek V3 in BF16, the block that predicts a further token among them."""
    hidden, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    attention = {
        "q_a_proj": (query, hidden),
        "q_a_layernorm": (query,),
        "q_b_proj": (heads * (128 + rope), query),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * 256, latent),
        "o_proj": (hidden, heads * 128),
    }
    yield "model.embed_tokens.weight", (vocabulary, hidden), "BF16"
    for b in range(config["num_hidden_layers"] + 1):
        block = f"model.layers.{b}."
        for name, shape in attention.items():
            yield f"{block}self_attn.{name}.weight", shape, "BF16"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}{norm}.weight", (hidden,), "BF16"
        if b < config["first_k_dense_replace"]:
            yield from linears(f"{block}mlp.", hidden, config["intermediate_size"])
        else:
            yield f"{block}mlp.gate.weight", (config["n_routed_experts"], hidden), "BF16"
            yield f"{block}mlp.gate.e_score_correction_bias", (config["n_routed_experts"],), "F32"
            yield from linears(f"{block}mlp.shared_experts.", hidden, config["moe_intermediate_size"])
            for e in range(config["n_routed_experts"]):
                yield from linears(f"{block}mlp.experts.{e}.", hidden, config["moe_intermediate_size"])
        if b == config["num_hidden_layers"]:
            yield f"{block}embed_tokens.weight", (vocabulary, hidden), "BF16"
            yield f"{block}shared_head.head.weight", (vocabulary, hidden), "BF16"
            yield f"{block}eh_proj.weight", (hidden, 2 * hidden), "BF16"
            for norm in ("shared_head.norm", "enorm", "hnorm"):
                yield f"{block}{norm}.weight", (hidden,), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (vocabulary, hidden), "BF16"


def linears(prefix: str, hidden: int, middle: int) -> Iterator[Tensor]:
    """The three linears of a gated feed-forward part."""
    for name, shape in (("gate", (middle, hidden)), ("up", (middle, hidden)), ("down", (hidden, middle))):
        yield f"{prefix}{name}_proj.weight", shape, "BF16"


LAYOUTS: dict[str, tuple[dict[str, Any], int, Callable[[dict[str, Any]], Iterator[Tensor]]]] = {
    "llama-70b": (LLAMA, 30, llama),
    "deepseek-v3": (DEEPSEEK, 163, deepseek),
}


def write_layout(folder: Path, config: dict[str, Any], shards: int, tensors: list[Tensor]) -> None:
    """Write config, tokenizer, index and as many shards of nothing but headers and holes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    write_tokenizer(folder, config["vocab_size"])
    weight_map: dict[str, str] = {}
    each = -(-len(tensors) // shards)
    for number in range(shards):
        own = tensors[number * each : (number + 1) * each]
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor, shape, dtype in own:
            size_bytes = BYTES[dtype]
            for side in shape:
                size_bytes *= side
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size_bytes]}
            position += size_bytes
            weight_map[tensor] = name
        data = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(data).to_bytes(8, "little") + data)
            file.truncate(8 + len(data) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def write_tokenizer(folder: Path, size: int) -> None:
    """The quickstart's tokenizer with merges made up until it has `size` tokens."""
    content = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    chosen, tokens = random.Random(0), sorted(content["model"]["vocab"])
    taken = {token["content"] for token in content["added_tokens"]} | set(vocabulary)
    number = max(vocabulary.values(), default=0)
    number = max([number, *(token["id"] for token in content["added_tokens"])])
    while number < size - 1:
        first, second = chosen.choice(tokens), chosen.choice(tokens)
        if first + second not in taken and len(first + second) < 16:
            number += 1
            vocabulary[first + second] = number
            taken.add(first + second)
            tokens.append(first + second)
            merges.append([first, second] if isinstance(merges[0], list) else f"{first} {second}")
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def measure(command: list[str], repeats: int) -> dict[str, Any]:
    """The fastest of `repeats` fresh processes: seconds of the clock and of the processor, and the highest memory."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={"OMP_NUM_THREADS": "1", **os.environ})
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{' '.join(command)} failed:\n{said.decode()}")
        found.append(
            {
                "seconds": round(time.perf_counter() - begin, 2),
                "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
                "peak_bytes": usage.ru_maxrss * 1024,
            }
        )
    return min(found, key=lambda one: one["seconds"])


def as_text(figures: dict[str, Any]) -> str:
    """One command in words, megabytes of a million bytes."""
    return (
        f"{figures['model']:12s} {figures['seconds']:6.2f} s, {figures['processor_seconds']:6.2f} s of processor time, "
        f"peak {figures['peak_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
