"""What this machine's processor can do."""

from __future__ import annotations

import torch


def has(instructions: str) -> bool:
    """Whether it has these instructions, in torch's spelling: "avx512_bf16", "amx_bf16"."""
    return bool(torch.cpu.get_capabilities().get(instructions))


def is_fast_in_bf16() -> bool:
    """Whether products of bf16 matrices take it less time than those of f32 ones.

    True with AMX, and with AVX512_BF16 alone but on Intel's: an EPYC's products are 2.6 times as fast as in f32, those
    of a Xeon without AMX (as virtual machines may have it) half as fast. Judged by name, since a measured time could
    come out otherwise when a run goes on.
    """
    intel = "intel" in str(torch.cpu.get_capabilities().get("cpu_name", "")).lower()
    return has("amx_bf16") or (has("avx512_bf16") and not intel)
