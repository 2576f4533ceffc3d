"""The transformers model that a config.json describes, without weights: on the meta device they take no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from converter.architecture import Runs
from converter.errors import SourceError, UnsupportedError, said


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
    if runs == "encoder":
        model.pooler = None  # it would read the last hidden state, and nothing reads what it makes of it
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # NaN, so that a buffer which the next step forgets shows; integers have none
            fill = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # on meta it has no values; to draw them took most of the time here
    model.initialize_weights()  # computes the buffers, as from_pretrained does
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in stored and bool(torch.isnan(buffer).any()):
            raise UnsupportedError(where, f"transformers does not initialise buffer {name}", "Use a newer transformers")
    return model.eval()


def _config(folder: Path, where: str) -> Any:
    try:
        written = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Fetch the model's config.json again"
        raise SourceError(where, f"config.json cannot be read: {error}", remedy) from error
    if "auto_map" in written:
        raise UnsupportedError(
            where,
            "config.json asks for code that comes with the model (auto_map), which is never run",
            "Use a version of the model that transformers knows itself; if it is one, take auto_map out of config.json",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers or the model's config class makes of a wrong value
        what = f"transformers cannot use config.json: {said(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    if "quantization_config" in written:
        del config.quantization_config  # weights come to us decoded
    return config
