"""How positions are stretched: what config.json's rope scaling becomes in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.containers.gguf.family import Family
from converter.containers.gguf.header import Field, f32, string, u32
from converter.containers.gguf.hyper import Hyper
from converter.errors import SourceError, UnsupportedError

FREQUENCIES = "rope_freqs.weight"
ROUNDED = (
    "readers of GGUF round the bounds between stretched and kept rotations to whole pairs, so positions are turned a "
    "little otherwise than in transformers"
)
SAID = {"yarn_mscale": "yarn with mscale equal to mscale_all_dim"}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions are stretched: metadata, and by tensor name one divisor per rotated frequency (empty: none).

    notes: what readers have to be told besides, a sentence each.
    """

    kind: str = ""
    floats: Mapping[str, float] = field(default_factory=dict)
    original_context: int = 0
    divisors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fields(self, prefix: str) -> dict[str, Field]:
        """The metadata under the architecture's prefix."""
        found = {f"{prefix}rope.scaling.type": string(self.kind)} if self.kind else {}
        found |= {f"{prefix}rope.scaling.{key}": f32(value) for key, value in self.floats.items()}
        if self.original_context:
            found[f"{prefix}rope.scaling.original_context_length"] = u32(self.original_context)
        return found


def rope_scaling(family: Family, config: Mapping[str, Any], hyper: Hyper, where: str) -> RopeScaling:
    """What config.json's rope scaling becomes; raises UnsupportedError for kinds that GGUF cannot say.

    Divisors: Llama 3.1's rule, as in transformers (modeling_rope_utils, "llama3").
    """
    if "rope.freq_base" not in hyper.floats:
        return RopeScaling()
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    settings = settings.get("full_attention", settings)  # Gemma 3; its layers with a window have none, see `requires`
    kind = settings.get("rope_type", settings.get("type")) or "default"
    if kind in ("su", "yarn") and settings.get("long_factor"):  # what the first models with it called it
        kind = "longrope"
    unknown = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if settings.get(name) is not None]
    if kind == "yarn" and unknown == ["mscale", "mscale_all_dim"] and settings["mscale"] == settings["mscale_all_dim"]:
        kind = "yarn_mscale" if "yarn_mscale" in family.rope and settings["mscale"] else kind
    if kind not in family.rope or (kind == "longrope" and unknown):
        asked = f"rope scaling '{kind}'" if kind not in family.rope else "a rope with " + ", ".join(unknown)
        stored = ", ".join(SAID.get(one, one) for one in family.rope)
        what = f"config.json asks for {asked}; GGUF stores for {family.architecture}: {stored}"
        raise UnsupportedError(where, what, "Choose another format for this model")
    _check_rotated(config, settings, hyper, where)
    if kind == "dynamic" and settings.get("alpha"):  # the base is stretched already, see hunyuan_v1_dense.yaml
        return RopeScaling(kind="none", floats={"factor": 1.0}, original_context=hyper.integers["context_length"])
    if kind in ("default", "dynamic"):  # dynamic scaling changes nothing within the declared context
        return RopeScaling()
    if kind == "longrope":
        return _longrope(settings, config, hyper, where)
    base, dimensions = hyper.floats["rope.freq_base"], hyper.integers["rope.dimension_count"]
    try:
        factor = float(settings["factor"])
        if kind == "linear":
            return RopeScaling(kind=kind, floats={"factor": factor})
        original = int(settings.get("original_max_position_embeddings") or hyper.integers["context_length"])
        if kind in ("yarn", "yarn_mscale"):
            floats = {"factor": factor}
            floats |= {f"yarn_{key}": float(settings[key]) for key in ("beta_fast", "beta_slow") if settings.get(key)}
            if kind == "yarn":
                floats |= _attention_factor(settings, factor)
            else:  # DeepSeek's: rotated heads keep their length, scores grow by the square
                floats["yarn_log_multiplier"] = 0.1 * float(settings["mscale"])
            return RopeScaling(kind="yarn", floats=floats, original_context=original, notes=_ramp(settings))
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"config.json's rope scaling '{kind}' is incomplete: {error}"
        raise SourceError(where, what, "Complete config.json from the model's original") from error
    divisors = tuple(
        _llama3_divisor(base ** (-2 * pair / dimensions), factor, low, high, original)
        for pair in range(dimensions // 2)
    )
    return RopeScaling(divisors={FREQUENCIES: divisors})


def _ramp(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What readers do otherwise with YaRN's ramp whatever the file says, a sentence each."""
    told = tuple(
        f"readers of GGUF stretch positions with {name} {taken} in place of {settings[name]} unless they are told: "
        f"give llama.cpp --yarn-{name.replace('_', '-')} {settings[name]}"
        for name, taken in (("beta_fast", 32), ("beta_slow", 1))
        if (settings.get(name) or taken) != taken
    )
    return told if settings.get("truncate", True) else (*told, ROUNDED)


def _attention_factor(settings: Mapping[str, Any], factor: float) -> dict[str, float]:
    """What corrects the attention factor that readers derive from YaRN's factor to the one that config.json asks for.

    As in transformers (modeling_rope_utils, "yarn").
    """

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scale, whole = settings.get("mscale"), settings.get("mscale_all_dim")
    derived = grown(scale) / grown(whole) if scale and whole else grown(1.0)
    wanted = float(settings.get("attention_factor") or derived)
    near = math.isclose(wanted, grown(1.0), rel_tol=2**-23)  # a step of f32, in which readers compute
    return {} if near else {"attn_factor": wanted / grown(1.0)}


def _longrope(settings: Mapping[str, Any], config: Mapping[str, Any], hyper: Hyper, where: str) -> RopeScaling:
    """A divisor for each frequency, others for contexts beyond the original one, and what keeps attention as sharp.

    As in transformers (modeling_rope_utils, "longrope"). Raises SourceError for factors that do not fit.
    """
    context, pairs = hyper.integers["context_length"], hyper.integers["rope.dimension_count"] // 2
    try:
        own = hyper.integers.get("rope.scaling.original_context_length")  # of families that have a default for it
        key = "original_max_position_embeddings"
        original = int(config.get(key) or settings.get(key) or own or context)
        divisors = {
            f"rope_factors_{length}.weight": tuple(map(float, settings[f"{length}_factor"]))
            for length in ("long", "short")
        }
        factor = float(settings.get("factor") or context / original)
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        what = f"config.json's rope scaling 'longrope' is incomplete: {error}"
        raise SourceError(where, what, "Complete config.json from the model's original") from error
    for name, values in divisors.items():
        if len(values) != pairs or not all(math.isfinite(value) and value > 0 for value in values):
            what = f"config.json gives {len(values)} factors for {name}, and {pairs} pairs of a head are rotated"
            raise SourceError(where, what, "Complete config.json from the model's original")
    return RopeScaling(kind="longrope", floats={"attn_factor": attention}, original_context=original, divisors=divisors)


def _check_rotated(config: Mapping[str, Any], settings: Mapping[str, Any], hyper: Hyper, where: str) -> None:
    """Raise UnsupportedError when only a part of a head is rotated and the family's section does not say so."""
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    whole = hyper.integers.get("attention.key_length")
    if partial is None or whole is None or int(whole * partial) == hyper.integers["rope.dimension_count"]:
        return
    what = f"config.json gives partial_rotary_factor {partial}, and readers of GGUF rotate whole heads in this family"
    raise UnsupportedError(where, what, "Choose another format for this model")


def _llama3_divisor(frequency: float, factor: float, low: float, high: float, original: int) -> float:
    turns = original * frequency / (2 * math.pi)  # full rotations within the original context
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
