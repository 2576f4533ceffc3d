"""Which scheme each tensor of a model gets: what the containers with integer schemes decide alike.

A container knows how its schemes are stored; which tensors are worth rounding, what a rule says about one of them, and
what floating point the others keep is the same for all of them and is here, pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.codebook import CodebookGrid
from converter.grids.floats import Fp8Grid
from converter.grids.kmeans import KMeansGrid
from converter.grids.levels import LevelGrid
from converter.grids.micro import MicroGrid
from converter.grids.plain import DTYPES
from converter.methods.tables import turns
from converter.schemes import SCHEMES, Granularity, Scheme

if TYPE_CHECKING:
    from converter.manifest import Target

# Parts of names of tables that are looked up rather than multiplied with, and of gains: where no architecture is known.
NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "norm", "ln_")
_FLOATS = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16", "F8_E4M3": "BF16", "F8_E5M2": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the manifest wants for one tensor: `keep` is a floating type, or `target` is filled in and `scheme` its own.

    The target is that of the manifest with scheme, group size, granularity and symmetry as they hold for this tensor.
    """

    keep: str
    target: Target
    scheme: Scheme

    def grid(self, *, group_size: int | None, scale_dtype: str) -> Grid:
        """The grid; integers and levels in groups of `group_size` columns, where None keeps another granularity."""
        scheme, granularity = self.scheme, self.target.granularity or "channel"
        by_size = self._by_size
        match scheme.values:
            case "e4m3" | "e5m2":
                block = (scheme.block or (128, 128)) if granularity == "block" else None
                return Fp8Grid(values=scheme.values, granularity=granularity, block=block, scale_dtype=scale_dtype)
            case "nvfp4" | "mxfp4" | "mxfp8":
                return MicroGrid(values=scheme.values, by_size=by_size)
            case "nf4" | "fp4" if not scheme.scale_bits:
                return CodebookGrid(values=scheme.values, block=group_size or 64, dtype=scale_dtype, by_size=by_size)
            case "kmeans":
                return KMeansGrid(bits=scheme.bits, group_size=group_size, levels_dtype=scale_dtype)
            case "int":
                return self._integers(group_size, granularity, scale_dtype)
        return LevelGrid(
            values=scheme.values,
            group_size=group_size,
            offset=scheme.offset,
            scale_bits=scheme.scale_bits,
            scale_dtype=scale_dtype,
        )

    @property
    def _by_size(self) -> bool:
        """Whether the size of a weight says anything, which it does not once a rotation has mixed them."""
        return not turns(self.target.methods)

    def _integers(self, group_size: int | None, granularity: Granularity, scale_dtype: str) -> AffineGrid:
        if granularity == "group" and group_size is None:
            granularity = "channel"
        return AffineGrid(
            bits=self.scheme.bits,
            symmetric=bool(self.target.symmetric),
            group_size=group_size if granularity == "group" else None,
            granularity=granularity,
            observer=self.target.observer,
            scale_dtype=scale_dtype,
            by_size=self._by_size,
        )


def choose(target: Target, tensor: str) -> Choice:
    """What the target and its rules want for `tensor`, a checkpoint name; a rule's scheme brings its own defaults."""
    rule = target.rule_for(tensor)
    wanted = rule.type if rule else target.scheme
    keep = wanted if wanted in DTYPES else ""
    if rule and not keep and wanted != target.scheme:
        own = {"scheme": wanted, "group_size": None, "granularity": None, "symmetric": None}
        target = target.model_copy(update=own)
    target = target.with_defaults()
    return Choice(keep=keep or "", target=target, scheme=SCHEMES[target.format][target.scheme or ""])


def float_dtype(dtype: str) -> str | None:
    """The floating type that a tensor stored as `dtype` keeps in an artifact; None for integers.

    F32, F16 and BF16 stay, fp8 comes multiplied out as BF16, F64 becomes F32.
    """
    return _FLOATS.get(dtype)


def looks_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor looks like the weight of a linear, by its name and shape alone."""
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name.lower() for part in NOT_LINEAR)
