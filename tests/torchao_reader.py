"""Run by tests as a program, torchao on its path: what transformers makes of an artifact of torchao's kind.

    python torchao_reader.py ARTIFACT TOKENS FOUND

FOUND becomes a safetensors file of `logits` [N, T, V] for the `tokens` [N, T] in TOKENS, and of each weight of
torchao's own class, decoded by it, with what its linear `read` and `made`. torchao lies apart from the other packages,
since transformers would import it, and print its warnings, in every process of the tests.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

artifact, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(artifact)
found: dict[str, Tensor] = {}


def keep(name: str, weight: Tensor) -> None:
    """Keep the decoded weight and, once it has run, the linear's input and output."""
    found[name] = weight.dequantize().float().contiguous()  # type: ignore[no-untyped-call]

    def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        found[f"{name}/read"], found[f"{name}/made"] = given[0].clone(), made.clone()

    model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)


for path, module in model.named_modules():
    if isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("torchao"):
        keep(f"{path}.weight", module.weight)
with torch.no_grad():
    found["logits"] = model(load_file(tokens)["tokens"]).logits
save_file(found, out)
