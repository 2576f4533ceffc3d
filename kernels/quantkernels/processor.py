"""What this machine's processor can do."""

from __future__ import annotations

import torch


def has(instructions: str) -> bool:
    """Whether it has these instructions, in torch's spelling: "avx512_bf16", "amx_bf16"."""
    return bool(torch.cpu.get_capabilities().get(instructions))
