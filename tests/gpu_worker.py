"""Runs the Triton kernels on given cases: here where there is a GPU, else in a process with Triton's interpreter.

The interpreter is chosen when Triton is first imported, so it takes a process of its own; that process runs this file.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from patience import PATIENCE_SECONDS
from quantkernels.ggml import dequantize, quantize

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`values` to be quantized as `type`, or blocks of it, u8, to be read; the first `skip` columns are cut off."""

    type: str
    values: NDArray[np.float32] | NDArray[np.uint8]
    importance: NDArray[np.float32] | None = None
    dtype: str = "float32"
    skip: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out: blocks or weights; or the message of a ValueError."""

    values: NDArray[np.uint8] | NDArray[np.float32] | None = None
    refusal: str = ""


def outcome(case: Case, device: str) -> Outcome:
    """The result of one case on `device`."""
    try:
        if case.values.dtype == np.uint8:
            made = dequantize(torch.from_numpy(case.values).to(device), case.type, backend="triton")
        else:
            rows = torch.from_numpy(case.values).to(DTYPES[case.dtype]).to(device)[:, case.skip :]
            importance = None if case.importance is None else torch.from_numpy(case.importance).to(device)
            made = quantize(rows, case.type, importance, backend="triton")
        assert made.device.type == device
    except ValueError as error:
        return Outcome(refusal=str(error))
    return Outcome(values=made.cpu().numpy())


def outcomes(cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """The results of all cases by name."""
    if torch.cuda.is_available():
        return {name: outcome(case, "cuda") for name, case in cases.items()}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cases"
        path.write_bytes(pickle.dumps(dict(cases)))
        source = Path(__file__).parent
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = os.pathsep.join([str(source), str(source.parent / "kernels"), str(source.parent), *filter(None, given)])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True, timeout=PATIENCE_SECONDS)
        made: dict[str, Outcome] = pickle.loads(path.with_suffix(".made").read_bytes())
        return made


def main() -> None:
    import gpu_worker  # under the name by which the other process knows the classes

    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, about the infinities that a GPU passes over in silence
    made = {name: gpu_worker.outcome(case, "cpu") for name, case in pickle.loads(path.read_bytes()).items()}
    path.with_suffix(".made").write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    main()
