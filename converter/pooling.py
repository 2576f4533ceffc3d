"""How an encoder makes one vector of a text's hidden states, as sentence-transformers writes it beside the weights.

modules.json names the folder of the pooling module, whose config.json says which. Several ways at once give their
vectors one behind the other. What follows a pooling module there (a dense layer, say) is not done here.
Source: sentence-transformers 5, models/Pooling.py.
"""

# N texts, T tokens of a text, D hidden width

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.errors import SourceError
from converter.folder import check_path
from converter.untrusted import load_json, read_small

USUAL = ("mean",)  # what sentence-transformers does with a model that says nothing
# In the order in which several are put behind each other; keys of older files are "pooling_mode_" and the second name.
MODES: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "cls": ("cls_token", lambda hidden_NTD: hidden_NTD[:, 0]),
    "max": ("max_tokens", lambda hidden_NTD: hidden_NTD.amax(1)),
    "mean": ("mean_tokens", lambda hidden_NTD: hidden_NTD.mean(1)),
    "mean_sqrt_len_tokens": ("mean_sqrt_len_tokens", lambda hidden_NTD: hidden_NTD.sum(1) / hidden_NTD.shape[1] ** 0.5),
    "weightedmean": ("weightedmean_tokens", lambda hidden_NTD: _weighted(hidden_NTD)),
    "lasttoken": ("lasttoken", lambda hidden_NTD: hidden_NTD[:, -1]),
}


def declared_pooling(folder: Path, where: str) -> tuple[str, ...]:
    """The ways in which the model in `folder` pools, names of MODES; empty when it says nothing.

    Raises SourceError when what it says cannot be read, or is not known.
    """
    place = folder / "modules.json"
    if not place.is_file():
        return ()
    try:
        modules = load_json(read_small(place, where), f"{where}: {place.name}")
        paths = [str(module["path"]) for module in modules if str(module["type"]).endswith("Pooling")]
        if not paths:
            return ()
        if paths[0]:  # as old models have it, pooling's settings stand in the folder itself
            check_path(paths[0], where)
        settings = load_json(
            read_small(folder / paths[0] / "config.json", where), f"{where}: the pooling's config.json"
        )
        modes = _modes(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"modules.json and its pooling's config.json cannot be read: {error}"
        raise SourceError(where, what, "Fetch them again, or take modules.json away") from error
    if not modes or any(mode not in MODES for mode in modes):
        what = f"the pooling {', '.join(modes) or 'of no kind'} is not known"
        raise SourceError(where, what, f"Known are {', '.join(MODES)}; or take modules.json away")
    return modes


def _modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    given = settings.get("pooling_mode")
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(map(str, given))
    return tuple(mode for mode, (key, _) in MODES.items() if settings.get(f"pooling_mode_{key}"))


def pool(hidden_NTD: Tensor, modes: tuple[str, ...]) -> Tensor:
    """The vectors [N, D times the number of modes], f64 and of length 1, of texts without padding."""
    pooled = torch.cat([MODES[mode][1](hidden_NTD.double()) for mode in modes or USUAL], -1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def _weighted(hidden_NTD: Tensor) -> Tensor:
    """The mean in which a token counts as much as its position, from 1."""
    weight_T = torch.arange(1, hidden_NTD.shape[1] + 1, dtype=hidden_NTD.dtype)
    return torch.einsum("ntd,t->nd", hidden_NTD, weight_T / weight_T.sum())
