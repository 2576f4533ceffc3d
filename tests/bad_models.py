"""Ways to damage the small model, and what the refusal of each has to say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

EMBEDDING, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Damage = Callable[[Path], object]


def config(**changes: object) -> Damage:
    """Change config.json; ... takes a key away."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {"layer_types": None} | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def content(name: str, data: bytes) -> Damage:
    """Give one file of the model this content."""
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def sharded(change: Callable[[dict[str, str], Path], object]) -> Damage:
    """Split the weights into two shards with an index, which `change` gets with the model's folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
        for shard in SHARDS:
            save_file({name: tensors[name] for name in tensors if index[name] == shard}, folder / shard)
        change(index, folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return damage


def lie(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b"[4096,64]", b"[4097,64]", 1))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def add_tokens(folder: Path) -> None:
    """Make the tokenizer give tokens that the embedding, which stays as it is, has no rows for."""
    config(vocab_size=100)(folder)
    weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:100].clone()}))(folder)


# What is done to the model, and what the refusal has to say: what is wrong, and further on what to do.
REFUSED: Mapping[str, tuple[Damage, str]] = {
    "missing shard": (
        sharded(lambda index, folder: (folder / SHARDS[1]).unlink()),
        r"shard model-00002-of-00002\.safetensors with 12 of 24 tensors is missing.*Fetch",
    ),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        r"truncated: \d+ of \d+ bytes are missing.*Fetch",
    ),
    "weights cut in the header": (
        lambda folder: os.truncate(folder / "model.safetensors", 500),
        r"header claims \d+ bytes in a file of 500.*fetch",
    ),
    "weights of no bytes": (content("model.safetensors", b""), r"only 0 bytes long.*Fetch"),
    "header that lies": (lie, r"'model\.embed_tokens\.weight' .* needs 524416 bytes.*fetch it again"),
    "no tokenizer": (remove(*TOKENIZER), r"no tokenizer: none of tokenizer\.json.*Put the tokenizer"),
    "broken tokenizer": (content("tokenizer.json", b"{"), r"tokenizer cannot be read.*Fetch the tokenizer"),
    "tokenizer of another kind": (content("tokenizer.json", b"{}"), r"tokenizer cannot be read: KeyError.*Fetch"),
    "tokenizer larger than the embedding": (add_tokens, r"gives token \d+, and the embedding has 100 rows.*fetch both"),
    "index that leads out": (
        sharded(lambda index, folder: index.update({NORM: "../../evil.safetensors"})),
        r"'\.\./\.\./evil\.safetensors' could lead out.*Do not use",
    ),
    "index to a file of the system": (
        sharded(lambda index, folder: index.update({NORM: "/etc/passwd"})),
        r"'/etc/passwd' could lead out.*Do not use",
    ),
    "link to a file outside": (
        lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"),
        r"'notes\.txt' is a link to a place outside.*Replace",
    ),
    "link to a folder outside": (lambda folder: (folder / "sub").symlink_to("/etc"), r"'sub' is a link to a place out"),
    "link to nothing": (lambda folder: (folder / "notes.txt").symlink_to("gone"), r"'notes\.txt' is a link to nothing"),
    "broken config": (content("config.json", b"{broken"), r"config\.json: broken JSON.*Mend the file"),
    "config that is a list": (content("config.json", b"[]"), r"config\.json: the JSON is not an object.*Mend"),
    "config in another encoding": (content("config.json", b"\xff\xfe\x00"), r"config\.json: broken JSON"),
    "architectures as text": (config(architectures="Qwen3ForCausalLM"), r"not a list of names.*Mend config\.json"),
    "architectures of numbers": (config(architectures=[3]), r"gives \[3\] for architectures.*Mend config\.json"),
    "too many blocks": (
        config(num_hidden_layers=3),
        r"counts 3 blocks, and the weights hold 2 of them: block 2 is missing.*fetch",
    ),
    "too few blocks": (config(num_hidden_layers=1), r"counts 1 blocks, and the weights hold block 1, too.*fetch"),
    "blocks without end": (config(num_hidden_layers=10**9), r"counts 1000000000 blocks, and the weights hold 2.*fetch"),
    "no blocks": (config(num_hidden_layers=0), r"gives 0 for num_hidden_layers, not a number of blocks"),
    "less than no blocks": (config(num_hidden_layers=-2), r"gives -2 for num_hidden_layers, not a number of blocks"),
    "blocks in words": (config(num_hidden_layers="two"), r"gives 'two' for num_hidden_layers, not a number of blocks"),
    "blocks not counted": (config(num_hidden_layers=...), r"gives None for num_hidden_layers, not a number of blocks"),
    "vocabulary too small": (config(vocab_size=100), r"shape \[4096, 64\], and config\.json makes it \[100, 64\]"),
    "vocabulary too large": (config(vocab_size=5000), r"shape \[4096, 64\], and config\.json makes it \[5000, 64\]"),
    "another width": (config(hidden_size=128), r"shape \[4096, 64\], and config\.json makes it \[4096, 128\]"),
    "width left out": (config(hidden_size=...), r"shape \[4096, 64\], and config\.json makes it \[4096, 4096\]"),
    "another middle": (
        config(intermediate_size=99),
        r"block 0 to 1: .*down_proj\.weight is \(64, 128\), not \(64, 99\)",
    ),
    "another number of heads": (
        config(num_attention_heads=3),
        r"block 0 to 1: .*self_attn\.o_proj\.weight is \(64, 64\)",
    ),
    "no heads": (config(num_attention_heads=0), r"cannot build a model from config\.json: .*zero\. Mend"),
    "text for a number": (config(rms_norm_eps="small"), r"cannot use config\.json: .*rms_norm_eps.*Mend config\.json"),
    "unknown activation": (config(hidden_act="bogus"), r"cannot build a model from config\.json: KeyError 'bogus'"),
    "unknown rope": (config(rope_parameters={"rope_type": "bogus"}), r"cannot build a model .*KeyError 'bogus'"),
    "text_config of nonsense": (config(text_config=5), r"transformers cannot .* config\.json"),
    "no model type": (config(model_type=...), r"cannot use config\.json: .*model_type.*Mend config\.json"),
    "another family": (
        config(model_type="llama"),
        r"block 0 to 1: .*unexpected self_attn\.k_norm\.weight.*fetch both",
    ),
    "code of its own": (
        config(auto_map={"AutoModel": "x.Y"}, model_type="qwen3_x"),
        r"asks for code .*never run, and 'qwen3_x' is no model type.*Use a version",
    ),
    "tensor left out": (weights(lambda tensors: tensors.pop(UP)), r"block 1: .*missing mlp\.up_proj\.weight"),
    "last norm left out": (weights(lambda tensors: tensors.pop(NORM)), r"the weights hold no model\.norm\.weight"),
    "head left out": (config(tie_word_embeddings=False), r"the weights hold no lm_head\.weight.*fetch both"),
    "pickled weights": (
        pickle_weights,
        r"weights are pickled \(pytorch_model\.bin\).*Convert it once, in a sandbox",
    ),
    "GGUF weights that are none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        r"model\.gguf: this is not a GGUF file.*fetch it again",
    ),
    "empty folder": (empty, r"there is no \.safetensors file.*Check that this is a model"),
    "weights without a tensor": (lambda folder: save_file({}, folder / "model.safetensors"), r"hold no tensor.*Check"),
    "quantized before": (
        config(quantization_config={"quant_method": "aqlm"}),
        r"already quantized by 'aqlm'.*Take the model it was made from",
    ),
}
