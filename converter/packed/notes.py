"""What a plan says about a source that is quantized already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from converter.packed.formats import FORMATS
from converter.packed.repack import same_grid
from converter.packed.weight import Packed

SHOWN = 3


def packed_notes(config: Mapping[str, Any], packed: Mapping[str, Packed], types: Mapping[str, str]) -> tuple[str, ...]:
    """Sentences without full stop.

    packed: the source's weights in parts; types: the ggml type that each of them gets, empty where nothing goes over as
    it is.
    """
    if not packed:
        settings = config.get("quantization_config") or {}
        stated = "" if settings.get("format") == "dense" else settings.get("quant_method", "")
        said = f"config.json says that the weights are quantized by '{stated}' and none is: they are taken as they are"
        return (said,) if stated else ()
    titles = Counter(_title(weight) for weight in packed.values())
    what = ", ".join(f"{count} x {title}" for title, count in titles.most_common(SHOWN))
    notes = [f"the source is quantized already ({what}), so its error comes on top of what is measured here"]
    moved = Counter(types[name] for name, weight in packed.items() if name in types and same_grid(weight, types[name]))
    for type, count in sorted(moved.items()):
        notes.append(
            f"the codes of {count} tensors go over to {type}, whose grid is theirs, as they are where order and scales "
            "allow"
        )
    return tuple(notes)


def _title(packed: Packed) -> str:
    title = FORMATS[packed.format].title
    return f"{title} {packed.bits} bits" if packed.format in ("gptq", "pack-quantized") else title
