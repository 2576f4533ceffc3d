"""A tiny random model of every family that has a YAML: tests/architectures says which config makes it.

A file there names transformers' config class and the settings beyond SHAPE; `variants` change them once more, by name,
and the class with `config`.
table_gelu: llama.cpp looks this family's activation up in a table of f16. read_as: config values that llama.cpp takes
in place of others, as the family's `otherwise` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)

HERE = Path(__file__).parent / "architectures"
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "causal": AutoModelForCausalLM,
    "encoder": AutoModel,
    "seq2seq": AutoModelForSeq2SeqLM,
    "text": AutoModelForTextEncoding,
    "relaid": AutoModelForCausalLM,  # of another family, which a test lays out as this one
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One tiny model: its family, its name among the tests, transformers' config of it and how it is loaded."""

    family: str
    name: str
    config: PretrainedConfig
    kind: str
    table_gelu: bool
    read_as: Mapping[str, Any]

    def save(self, folder: Path) -> PreTrainedModel:
        """Make the model, save it, and load it again, f32 in eval mode; its outputs are far from uniform."""
        torch.manual_seed(sum(map(ord, self.name)))
        loader = MODELS[self.kind]
        model = loader.from_config(self.config, dtype=torch.float32)
        with torch.no_grad():
            stored = model.state_dict()
            buffers = (
                buffer for name, buffer in model.named_buffers() if name in stored and buffer.is_floating_point()
            )
            for tensor in (*model.parameters(), *buffers):
                disturb(tensor)
        model.save_pretrained(folder)
        return self.load(folder)

    def load(self, folder: Path, **settings: Any) -> PreTrainedModel:
        """The model in `folder`, f32 in eval mode, with config values of its own or these."""
        options = {"dtype": torch.float32, "attn_implementation": "eager", **settings}
        loaded: PreTrainedModel = MODELS[self.kind].from_pretrained(folder, **options)
        return loaded.eval()


def names_of(*kinds: str, quick: Collection[str] = ()) -> list[Any]:
    """The names of the tiny models of these kinds, as parameters of tests.

    All but one of each family, or all but the `quick` ones, are for the long suite.
    """
    found = {name: one for name, one in tiny_models().items() if one.kind in kinds}
    return few(found, quick or [name for name, one in found.items() if name == one.family])


def few(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test of which all but the `quick` ones are for the long suite; a tuple goes by its first part."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if values[0] in quick else pytest.mark.slow))
    return found


def disturb(parameter: torch.Tensor) -> None:
    """Random values that keep the size of hidden states and leave no norm, bias or scale at its neutral value."""
    if parameter.ndim > 1:
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    elif parameter.numel() > 1:
        parameter.normal_(1 if bool((parameter == 1).all()) else 0, 0.2)
    else:
        parameter.mul_(1 + 0.2 * torch.randn_like(parameter))


@cache
def tiny_models() -> dict[str, Tiny]:
    """Every tiny model by name: "phi3", and "phi3-longrope" for a variant."""
    found: dict[str, Tiny] = {}
    for path in sorted(HERE.glob("*.yaml")):
        data = yaml.safe_load(path.read_text("utf-8"))
        variants: Mapping[str, Mapping[str, Any]] = {"": {}, **data.get("variants", {})}
        for variant, changes in variants.items():
            settings = {**SHAPE, **data["settings"], **changes}
            kind = getattr(transformers, settings.pop("config", data["config"]))
            table_gelu = settings.pop("table_gelu", data.get("table_gelu", False))
            name = f"{path.stem}-{variant}" if variant else path.stem
            found[name] = Tiny(
                family=path.stem,
                name=name,
                config=kind(**settings),
                kind=data.get("kind", "causal"),
                table_gelu=table_gelu,
                read_as=data.get("read_as", {}),
            )
    return found
