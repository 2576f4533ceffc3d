"""Every family beside llama.cpp's own converter: which of the two converts it, and whether the files say the same.

    python benchmarks/original_converter.py --llama-cpp CHECKOUT [--variants] [--only NAME ...] [--json FILE]

The models are the tiny random ones of the tests, saved by the installed transformers, with a byte-level tokenizer of
their own. The converter is tried as it is, and once more with an answer to what it cannot know, the tokenizer's hash.
Where both give a file, tensors are compared byte by byte and metadata value by value, but for those under `general.`
and `tokenizer.`. Whether a file is right is for the tests to say, which run it in llama.cpp beside transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
from gguf import GGUFReader

import gguf_models as tiny
from converter.errors import HubmillError
from tiny_families import Tiny, tiny_models

WRITTEN_APART = ("general.", "tokenizer.", "hubmill.", "GGUF.")  # what metadata are not compared begins with
# A process that has the converter loaded and runs it in a fork for every line that names a folder and a file.
CONVERTER = """
import os, runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion import base
from transformers import AutoTokenizer
known = base.TextModel.get_vocab_base_pre
for line in sys.stdin:
    folder, out, named = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        if named == "named":
            base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
        os.dup2(os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", out]
        runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Original:
    """llama.cpp's converter, kept loaded."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, "-c", CONVERTER, str(checkout)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def convert(self, folder: Path, out: Path, named: bool) -> str:
        """Convert; gives what went wrong, the last line that it says, or nothing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder}\t{out}\t{'named' if named else 'as-is'}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline().strip()).lstrip("-").isdecimal():
            if not line and self.process.poll() is not None:
                raise RuntimeError("the converter could not be loaded")
        if line == "0" and out.is_file():
            return ""
        said = [line for line in Path(f"{out}.log").read_text("utf-8", "replace").splitlines() if line.strip()]
        return said[-1][:200] if said else f"exit code {line}"


def main() -> None:
    """Convert each model both ways and print a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    arguments.add_argument("--variants", action="store_true", help="all models of a family, not one")
    arguments.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models")
    arguments.add_argument("--json", type=Path, help="also write the findings to this file")
    given = arguments.parse_args()
    original = Original(given.llama_cpp)
    tokenizer = tiny.byte_level()
    found: dict[str, dict[str, Any]] = {}
    for name, one in tiny_models().items():
        if (given.only and name not in given.only) or (not given.only and not given.variants and name != one.family):
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name
            one.save(folder)
            tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
            found[name] = compare(one, folder, Path(place), original)
        print(f"{name:<24} {in_words(found[name])}", flush=True)
    for key in ("ours", "as_is", "named"):
        print(f"{key:<6} {sum(not row[key] for row in found.values())} of {len(found)}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), "utf-8")


def compare(one: Tiny, folder: Path, place: Path, original: Original) -> dict[str, Any]:
    """What went wrong on each side, empty when nothing, and how two files differ."""
    row: dict[str, Any] = {"ours": "", "differences": []}
    try:
        tiny.write(folder, tiny.target("F32"), place / "ours")
    except HubmillError as error:
        row["ours"] = str(error)
    row["as_is"] = original.convert(folder, place / "as-is.gguf", named=False)
    row["named"] = original.convert(folder, place / "named.gguf", named=True) if row["as_is"] else ""
    theirs = place / ("named.gguf" if row["as_is"] else "as-is.gguf")
    if not row["ours"] and not row["named"]:
        row["differences"] = list(differences(next((place / "ours").glob("*.gguf")), theirs))
    return row


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """What two files do not have alike, a phrase each."""
    first, second = GGUFReader(ours), GGUFReader(theirs)
    values = [
        {key: field.contents() for key, field in reader.fields.items() if not key.startswith(WRITTEN_APART)}
        for reader in (first, second)
    ]
    for key in sorted(values[0].keys() | values[1].keys()):
        left, right = (side.get(key, "-") for side in values)
        if not same(left, right):
            yield f"{key}: {shown(left)}, theirs {shown(right)}"
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (first, second)]
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        pair = [side.get(name) for side in tensors]
        if pair[0] is None or pair[1] is None:
            yield f"tensor {name} only {'theirs' if pair[0] is None else 'ours'}"
        elif list(pair[0].shape) != list(pair[1].shape) or pair[0].tensor_type != pair[1].tensor_type:
            yield f"tensor {name} is {pair[0].shape}, theirs {pair[1].shape}"
        elif not np.array_equal(pair[0].data, pair[1].data):
            left, right = (side.data.astype(np.float64) for side in pair)
            yield f"tensor {name} differs by {abs(left - right).max() / abs(right).max():.0e} of its largest value"


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, floats but for their rounding to F32."""
    if isinstance(left, float) and isinstance(right, float):
        return bool(np.float32(left) == np.float32(right))
    return bool(left == right)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:36] + "..."


def in_words(row: dict[str, Any]) -> str:
    theirs = row["named"] and f"theirs fails: {row['named']}"
    ours = row["ours"] and f"OURS FAILS: {row['ours']}"
    return "; ".join(filter(None, (ours, theirs, summary(row["differences"])))) or "the same"


def summary(said: Sequence[str], most: int = 8) -> str:
    return "; ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


if __name__ == "__main__":
    main()
