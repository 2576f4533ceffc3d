"""The root of a Hessian, in the shape that solving takes it.

With H = R R^T, R upper, columns in the order of solving, the error of codes is |off R|^2, where off = w - w' is what
weights are off by. Its column k is R_kk times off_k + sum over j < k of off_j R_jk / R_kk. So whatever the columns
before it are off by, the best value of column k is w_k plus that sum: GPTQ is Babai's nearest plane. The alternative,
GPTQ as it was published, pushes errors along the root of the inverse and gives the same codes; the inverse costs as
much again as the root, and in f32 loses what the root keeps.

Source: Frantar et al. 2022, arXiv:2210.17323; Chen et al. 2025, arXiv:2507.18553.
"""

# I in.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Root:
    """An upper root R [I, I] of a Hessian.

    shares_II f32 is R_jk / R_kk, so 1 on the diagonal: what share of column j's being off column k makes up for.
    pivots_I f32 is R_kk. rough_II is shares_II in the type in which large products are computed.
    """

    shares_II: Tensor
    pivots_I: Tensor
    rough_II: Tensor


def root_of(upper_II: Tensor, products: torch.dtype = torch.float32) -> Root:
    """The root of the Hessian upper_II upper_II^T, f32 or f64; products: the type of large products."""
    pivots_I = upper_II.diagonal().contiguous()  # four times as fast to divide by
    shares_II = (upper_II / pivots_I).float().contiguous()
    return Root(shares_II=shares_II, pivots_I=pivots_I.float(), rough_II=shares_II.to(products))
