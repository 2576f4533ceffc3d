"""The transformers model that a config.json describes, without weights: on the meta device they take no memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from converter.architecture import Runs
from converter.errors import SourceError, UnsupportedError, said
from converter.untrusted import parse_json, read_small

TABLES_BYTES = 1 << 30  # causal masks of 34 blocks, as CodeGen has them, take 143 million
# Model types as first releases had them, and their keys that transformers has under other names.
FORMER_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon", "stablelm_epoch": "stablelm"}
FALCON_KEYS = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
FORMER_KEYS = {
    "RefinedWeb": FALCON_KEYS,
    "RefinedWebModel": FALCON_KEYS,
    "stablelm_epoch": {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
}


def skeleton(folder: Path, runs: Runs, dtype: torch.dtype, device: torch.device, where: str) -> Any:
    """The transformers model of folder/config.json: parameters on meta, buffers real and on `device`, in eval mode."""
    whole = _config(folder, where)
    config = whole.get_text_config(decoder=runs == "decoder")
    loader = AutoModelForCausalLM if runs == "decoder" else AutoModel
    try:
        if getattr(whole, "tie_word_embeddings", False):  # which transformers asks of the whole, not of the part
            config.tie_word_embeddings = True
        with torch.device("meta"):
            model = loader.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # KeyError, ZeroDivisionError and others: whatever a wrong value leads to
        what = f"transformers cannot build a model from config.json: {said(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if tables > TABLES_BYTES:  # no weights bear them out, so a number in config.json could ask for any memory
        what = f"config.json makes {tables:,} bytes of tables, such as those of rotary positions"
        raise SourceError(where, what, "Mend config.json")
    if runs == "encoder":
        model.pooler = None  # it would read the last hidden state, and nothing reads what it makes of it
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # NaN, so that a buffer which the next step forgets shows; integers have none
            fill = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # on meta it has no values; to draw them took most of the time here
    try:
        model.initialize_weights()  # computes the buffers, as from_pretrained does
    except Exception as error:  # as above
        what = f"transformers cannot use config.json: {said(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in stored and bool(torch.isnan(buffer).any()):
            raise UnsupportedError(where, f"transformers does not initialise buffer {name}", "Use a newer transformers")
    return model.eval()


def _config(folder: Path, where: str) -> Any:
    try:
        written = parse_json(read_small(folder / "config.json", where), f"{where}: config.json")
    except OSError as error:
        remedy = "Fetch the model's config.json again"
        raise SourceError(where, f"config.json cannot be read: {error}", remedy) from error
    written = modern(written)
    kind = written.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if "auto_map" in written and not known:
        what = f"config.json asks for code that comes with the model (auto_map), which is never run, and '{kind}' is "
        raise UnsupportedError(
            where,
            f"{what}no model type of transformers' own",
            "Use a version of the model that transformers knows itself",
        )
    try:
        # The class itself where there is one: it never looks at auto_map.
        config = (
            CONFIG_MAPPING[kind].from_dict(written)
            if known
            else AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    except Exception as error:  # whatever transformers or the model's config class makes of a wrong value
        what = f"transformers cannot use config.json: {said(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    if "quantization_config" in written:
        del config.quantization_config  # weights come to us decoded
    return config


def modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers reads it, from one that was written for a model's own code, before that."""
    kind = config.get("model_type")
    renamed = FORMER_KEYS.get(kind, {}) if isinstance(kind, str) else {}
    found = {renamed.get(key, key): value for key, value in config.items()}
    if renamed:
        found["model_type"] = FORMER_TYPES[str(kind)]
    if "n_head_kv" in config:
        found["new_decoder_architecture"] = True
    scaling = found.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) == "su":
        found["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    return found
