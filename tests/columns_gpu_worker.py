"""Solves columns by the Triton kernels: on a GPU where there is one, else in a process with Triton's interpreter.

The interpreter is chosen when Triton is first imported, so it takes a process of its own; that process runs this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from patience import PATIENCE_SECONDS
from quantkernels import columns
from quantkernels.columns import Frame, Root


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight to be solved, and then refined by so many sweeps."""

    weight: Tensor
    hessian: Tensor
    root: Root
    order_I: Tensor
    frame: Frame
    sweeps: int = 2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Codes after solving and after the sweeps."""

    codes: Tensor
    refined: Tensor


def outcome(case: Case, device: str) -> Outcome:
    """The result of one case on `device`."""
    weight, order_I = case.weight.to(device), case.order_I
    codes = columns.solve(weight, case.root, case.frame, order_I, backend="triton")
    _, refined = columns.refine(weight, case.hessian, case.frame, codes, sweeps=case.sweeps, backend="triton")
    assert codes.device.type == refined.device.type == device
    return Outcome(codes=codes.cpu(), refined=refined.cpu())


def outcomes(cases: list[Case]) -> list[Outcome]:
    """The results of all cases."""
    if torch.cuda.is_available():
        return [outcome(case, "cuda") for case in cases]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cases"
        torch.save(cases, path)
        source = Path(__file__).parent
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = os.pathsep.join([str(source), str(source.parent / "kernels"), str(source.parent), *filter(None, given)])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True, timeout=PATIENCE_SECONDS)
        made: list[Outcome] = torch.load(path.with_suffix(".made"), weights_only=False)
        return made


def main() -> None:
    import columns_gpu_worker as worker  # under the name by which the other process knows the classes

    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = torch.load(path, weights_only=False)
    torch.save([worker.outcome(case, "cpu") for case in cases], path.with_suffix(".made"))


if __name__ == "__main__":
    main()
