"""Tiny random models with a real tokenizer, saved as a hub would have them: what the GGUF tests convert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from converter.adapt import adapt
from converter.architecture import Architecture, find
from converter.containers import ArtifactPlan
from converter.containers.gguf import GGUF
from converter.containers.gguf.operations import apply_preparation
from converter.containers.gguf.vocabulary.splittings import QWEN2
from converter.manifest import Target
from converter.source import Snapshot, open_folder

TEXT = (Path(__file__).parents[1] / "converter" / "texts" / "calibration.txt").read_text("utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Every line has tripped a tokenizer: contractions in both cases, runs of digits, spaces and newlines, scripts with and
# without spaces, marks that combine, surrogate-pair emoji with joiners, markup that looks special, code.
HARD_TEXT = (
    "It's I'LL we'Ve don'T O'Neill  two   three    four\t\ttabs\n\n\nlines \r\n windows  \n end "
    "1 12 123 1234 12345678 3.14159 1,000,000 ٣٤٥ Ⅻ ½ x² "
    "naïve façade Straße ÅNGSTRÖM ПриВет мир ΑΒΓ δεζ שלום مرحبا بالعالم नमस्ते दुनिया ภาษาไทย "
    "日本語のテキスト、カタカナ。中文（全角）！한국어 "
    "😀👩‍👩‍👧‍👦🇩🇪🤷🏽‍♀️ ‼️ „Zitat“ «guillemets» — – … "
    "<|im_start|>user\nhi<|im_end|>\n<|not_special|> </s> <unk> [INST] "
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # ünï\n\tif (a&&b) { c->d[0]!=~e; } //**/ "
    "https://a.b/c?d=e&f=%20 "
    "CamelCaseWord snake_case_word HTTPServer2 ALLCAPS mIxEd\u00a0nbsp\u3000wide\u200bzero "
)

SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "mixtral": MixtralConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "olmoe": OlmoeConfig,
}
# Windows shorter than the prompt, caps that the values reach, and so many layers that each kind of them occurs.
GEMMA: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rope_parameters": LLAMA3_ROPE},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 64},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "gemma3": GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 256, "norm_topk_prob": False},
    "qwen3_moe": EXPERTS | {"head_dim": 64, "norm_topk_prob": True},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 8},
}


def byte_level(steps: Sequence[str] = (QWEN2,), size: int = 1000, **options: Any) -> Tokenizer:
    """A byte-level BPE trained on the calibration text; `steps` are the patterns it splits by."""
    tokenizer = Tokenizer(models.BPE(**options))
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *[HARD_TEXT] * 50], trainer)
    return tokenizer


def sentencepiece(size: int = 600, defined: Sequence[str] = ()) -> Tokenizer:
    """A BPE over characters with byte fallback, its merges complete as a conversion from SentencePiece makes them.

    defined: user-defined tokens, which are in the vocabulary and have merges, before all others.
    """
    prepare = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = prepare
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size, limit_alphabet=120, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *defined]
    vocabulary = {token: number for number, token in enumerate(control + [t for t in learned if t not in control])}
    ranked = [*defined, *(token for token in learned if len(token) > 1 and token not in defined)]
    merges = [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = prepare
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def like_gemma() -> Tokenizer:
    """A tokenizer laid out as Gemma's: no space put first, and user-defined runs of spaces and newlines."""
    tokenizer = sentencepiece(defined=("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.save_pretrained(folder)


def save_model(
    folder: Path, family: str = "llama", rows: int = 1024, width: int = 256, middle: int = 512, **more: Any
) -> None:
    """A model with random weights whose outputs are far from uniform, so that a wrong row shows."""
    torch.manual_seed(sum(map(ord, family)))
    settings = SHAPE | EXTRAS[family] | {"vocab_size": rows, "hidden_size": width, "intermediate_size": middle} | more
    config = FAMILIES[family](max_position_embeddings=512, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(1 if parameter.mean() == 1 else 0, 0.2)
    model.save_pretrained(folder)


def load(folder: Path) -> tuple[Snapshot, Architecture]:
    snapshot = open_folder(folder, "the test's model")
    return adapt(snapshot, find(snapshot.config, "the test's model"), "the test's model")


def target(type: str, **more: Any) -> Target:
    return Target(name=type.lower(), format="gguf", type=type, **more)


def write(
    folder: Path, wanted: Target, out: Path, importance: Mapping[str, torch.Tensor] | None = None
) -> ArtifactPlan:
    """Convert the model in `folder` to `wanted` inside `out`, each tensor rounded to nearest."""
    snapshot, architecture = load(folder)
    plan = GGUF.plan(snapshot, architecture, wanted)
    planned = {tensor.name: tensor for tensor in plan.tensors}

    def parts(name: str) -> Mapping[str, torch.Tensor]:
        tensor = planned[name]
        weights = (importance or {}).get(tensor.source)
        values = snapshot.read(tensor.source).float()
        return tensor.grid.encode(apply_preparation(tensor.prepare, values) if tensor.prepare else values, weights)

    out.mkdir(exist_ok=True)
    GGUF.write(plan, snapshot, architecture, wanted, parts, out)
    return plan


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json as transformers would write them, None as null."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")
