"""How the model's author would have tokens drawn, from generation_config.json, as GGUF's `general.sampling.*`.

llama.cpp takes these as its defaults where a user gives nothing else. gguf-py 0.19 looks for llama.cpp's own word for
the repetition penalty only, which no such file has; here transformers' word is read too. Where the file says
`do_sample: false`, its temperature and cut-offs are not in force and would turn a greedy model into one that samples,
so they are left out; without that word they are taken for advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf

from converter.errors import SourceError
from converter.untrusted import parse_json, read_small

FILE = "generation_config.json"
LARGEST = 1e6  # no setting comes near it; what is beyond is a mistake
# What follows `sampling_` in gguf.Metadata -> keys of generation_config.json, the first that is there wins.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "temp": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "xtc_probability": ("xtc_probability",),
    "xtc_threshold": ("xtc_threshold",),
    "penalty_last_n": ("penalty_last_n",),
    "penalty_repeat": ("penalty_repeat", "repetition_penalty"),
    "mirostat": ("mirostat",),
    "mirostat_tau": ("mirostat_tau",),
    "mirostat_eta": ("mirostat_eta",),
}
WHOLE = ("top_k", "penalty_last_n", "mirostat")
WHEN_GREEDY = ("penalty_last_n", "penalty_repeat")


def add_sampling(metadata: gguf.Metadata, folder: Path) -> tuple[str, ...]:
    """Add what the generation config in `folder` says to `metadata`; gives what could not be used, a sentence each."""
    try:
        said = parse_json(read_small(folder / FILE, FILE), FILE)
    except OSError:
        return ()
    except SourceError:
        return (f"{FILE} cannot be read, so the sampling that it advises is left out",)
    odd = []
    for name, keys in SETTINGS.items():
        key = next((key for key in keys if said.get(key) is not None), "")
        if not key or (said.get("do_sample") is False and name not in WHEN_GREEDY):
            continue
        if _usable(said[key], whole=name in WHOLE):
            setattr(metadata, f"sampling_{name}", said[key])
        else:
            odd.append(key)
    return (f"{FILE} has values that are no settings ({', '.join(odd)}), which are left out",) if odd else ()


def _usable(value: object, whole: bool) -> bool:
    """Whether a value is a setting: a number, not negative unless it counts (-1: all), of a usual size."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return (-1 if whole else 0) <= value <= LARGEST  # which is false for NaN, that JSON from Python may hold
