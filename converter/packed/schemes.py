"""What compressed-tensors' config.json says about one module: the group whose targets fit it.

    quantization_config.config_groups.<any name> = {targets: [...], weights: {num_bits, strategy, group_size, ...}}

A target is a module's name, a pattern after "re:", or a class such as "Linear". Of several that fit, a name goes before
a pattern and a pattern before a class, as in compressed-tensors 0.20 (utils/match.py, match_targets).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The weights of a group. group_size: 0 means no groups; block: rows and columns, or None."""

    bits: int
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None


def group_of(settings: Mapping[str, Any], module: str, where: str) -> Mapping[str, Any]:
    """The config group of a module. Raises SourceError when none fits it or its weights are not described."""
    groups = settings.get("config_groups")
    best: tuple[int, Mapping[str, Any]] | None = None
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else ():
            rank = _rank(str(target), module, where)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, group
    if best is None or not isinstance(best[1].get("weights"), dict):
        what = f"{module} is stored in parts, and no group of config_groups says how"
        raise SourceError(f"{where}: quantization_config", what, "Fetch config.json again")
    return best[1]


def scheme_of(settings: Mapping[str, Any], module: str, where: str) -> Scheme:
    """The scheme of a module. Raises SourceError when no group fits it or what it says is none."""
    weights = group_of(settings, module, where)["weights"]
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise SourceError(
            f"{where}: quantization_config", f"num_bits of {module} is {bits!r}", "Fetch config.json again"
        )
    return Scheme(
        bits=bits,
        symmetric=weights.get("symmetric", True) is not False,
        group_size=size if type(size) is int and size > 0 else 0,
        block=block_of(weights.get("block_structure")),
    )


def block_of(stated: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, from what config.json says; None where it says none."""
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(n) is int and n > 0 for n in stated):
        return None
    return stated[0], stated[1]


def _rank(target: str, module: str, where: str) -> int | None:
    """0 for the module's own name, 1 for a pattern that fits, 2 for a class, None for what is about others."""
    if target.startswith("re:"):
        try:
            return 1 if re.match(target.removeprefix("re:"), module) else None
        except re.error as error:
            what = f"the target '{target}' is no pattern: {error}"
            raise SourceError(f"{where}: quantization_config", what, "Fetch config.json again") from error
    if target == module:
        return 0
    return 2 if "." not in target and target[:1].isupper() else None
