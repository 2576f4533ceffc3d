"""Run by tests as a program, torchao on its path: what transformers makes of an artifact of torchao's kind.

    python torchao_reader.py LOADER ARTIFACT TOKENS FOUND

LOADER is a class of transformers, such as AutoModel. FOUND becomes a safetensors file of the `output` for the `tokens`
[N, T] in TOKENS, and of each weight of torchao's own class, decoded by it, with what its linear `read` and `made`.
torchao lies apart from the other packages, since transformers would import it, and print its warnings, in every process
of the tests.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

loader, artifact, tokens, out = sys.argv[1:]
model, info = getattr(transformers, loader).from_pretrained(artifact, output_loading_info=True)
if left := {kind: names for kind, names in info.items() if names}:
    sys.exit(f"transformers did not load all: {left}")
found: dict[str, Tensor] = {}


def keep(name: str, weight: Tensor) -> None:
    """Keep the decoded weight and, once it has run, the linear's input and output."""
    found[name] = weight.dequantize().float().contiguous()  # type: ignore[no-untyped-call]

    def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        for what, values in (("read", given[0]), ("made", made)):
            found[f"{name}/{what}"] = values.clone(memory_format=torch.contiguous_format)

    model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)


for path, module in model.named_modules():
    if isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("torchao"):
        keep(f"{path}.weight", module.weight)
with torch.no_grad():
    found["output"] = model(load_file(tokens)["tokens"])[0]
save_file(found, out)
