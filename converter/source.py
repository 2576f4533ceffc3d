"""A model at one commit: its tensors by header, its small files, and one tensor, or a slab of its rows, at a time.

Planning needs names, types and shapes only, so a Snapshot is built from the headers of the safetensors files: the first
kilobytes of each, read from the disk here or over HTTP by `hub`. Every header is checked against the file's length
before anything is believed, because a shard cut short or a header that lies must fail in the plan, not in hour three.

`read` copies the bytes of one tensor into memory of its own. The alternative, mapping the file as the safetensors
library does, saves that copy; its price is that touched pages are charged to the process for as long as any view lives,
which breaks the memory bound of a conversion, and that tensors lie unaligned when the header was not padded.

Format: https://github.com/huggingface/safetensors (README, "Format"). Nothing here executes what a checkpoint holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.errors import SourceError, UnsupportedError
from converter.folder import HEADER_LIMIT_BYTES, check_path, digest_folder, list_folder
from converter.marks import quoted
from converter.packed import (
    FORMATS,
    Packed,
    ReadBytes,
    blocks_of,
    check_quantization,
    find_packed,
    kept_type,
    rows_of,
    same_grid,
)
from converter.tensor_file import read_range
from converter.untrusted import SMALL_LIMIT_BYTES, check_small, parse_json
from converter.values import DTYPES, FLOATING, check_finite, decoded
from converter.views import View

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (
    *PICKLED,
    ".safetensors",
    ".gguf",
    ".parquet",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".tflite",
    ".npz",
    ".tar",
    ".zip",
)
INDEX = "model.safetensors.index.json"
UNPICKLE = (
    'Convert it once, in a sandbox without network because unpickling may run code of its author: `python -c "'
    "import glob, torch, safetensors.torch as s; "
    "load = lambda f: torch.load(f, weights_only=True, map_location='cpu').items(); "
    "t = {{k: v.clone().contiguous() for f in glob.glob('{pattern}') for k, v in load(f)}}; "
    "s.save_file(t, 'model.safetensors')"
    '"`'
)
MOST_DIMENSIONS = 16  # no weight has more than 5
MOST_ELEMENTS = 1 << 63
MERGE = (
    "Merge it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), FOLDER)"
    ".merge_and_unload().save_pretrained(OUT), and the tokenizer beside it; llama.cpp's convert_lora_to_gguf.py makes "
    "a GGUF adapter of it as it is"
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """One tensor as the header of its file declares it; `start` and `end` are byte offsets into the file.

    Of a weight in parts (see Snapshot.packed) dtype and shape are the decoded weight's, the bytes those of its codes.
    """

    name: str
    dtype: str  # as safetensors calls it: "BF16", "F8_E4M3", ...; in a GGUF file ggml's name: "Q4_K"
    shape: tuple[int, ...]
    file: str  # relative to the snapshot's folder, with forward slashes
    start: int
    end: int
    view: View | None = None  # None: the bytes are the tensor's rows as they are


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model at one commit: everything planning needs, and `read` once the weights are in `folder`.

    Plain data: it crosses processes by pickling. `tensors` is sorted by name. A weight that the checkpoint holds in
    parts, quantized, is one tensor there, and `packed` has its parts by its name.
    """

    source: str  # "folder:/abs/path" or "hub:org/name"
    repo: str
    commit: str  # 40 hex digits
    config: Mapping[str, Any]  # {} when the model has no config.json
    tensors: Mapping[str, Header]
    files: Mapping[str, int]  # every file with its size in bytes
    folder: Path
    packed: Mapping[str, Packed] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)  # of a hub: "sha256:..." or "git:..." by file
    # The files, in order, of a model that is GGUF; its tensors have the names of those files.
    gguf: tuple[str, ...] = ()
    name: str = ""  # what the manifest calls the model; empty: as its repo
    gated: bool = False  # on its hub, where people accept terms before they may read it
    # The head's tensor, where artifacts store it apart from the embedding whatever config.json says; see adapt.untied.
    untied: str = ""

    @property
    def size_bytes(self) -> int:
        """The bytes that the tensors take as stored, scales and all; what several are seen in counts once."""
        return sum(end - start for _, start, end in {(h.file, h.start, h.end) for h in self._stored()})

    @property
    def weight_files(self) -> frozenset[str]:
        """The files that hold tensors."""
        return frozenset(header.file for header in self._stored())

    @property
    def copies(self) -> frozenset[str]:
        """The tensors that are there a second time, under a name of their own over the bytes of another."""
        own = self.tensors.get(self.untied)
        places = [(one.file, one.start) for one in self.tensors.values()] if own else []
        return frozenset({self.untied} if own and places.count((own.file, own.start)) > 1 else ())

    def _stored(self) -> Iterator[Header]:
        yield from (header for name, header in self.tensors.items() if name not in self.packed)
        yield from chain.from_iterable(packed.parts.values() for packed in self.packed.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored type; a weight in parts, and ggml blocks, come decoded, in f32.

        Raises NumericsError when a value is NaN or infinite, SourceError when the file is not what its header said.
        """
        return next(self.slabs(name, None))

    def slabs(self, name: str, weights: int | None) -> Iterator[Tensor]:
        """Read one tensor as `read` does, its rows a slab at a time: [n, I] with about so many weights each.

        None gives one slab, the tensor in its own shape. What is seen through a view is read whole all the same.
        """
        header = self.tensors[name]
        where = f"{self.repo}: {name}"
        columns = header.shape[-1] if header.shape else 1
        rows = math.prod(header.shape[:-1])
        height = rows if weights is None or not columns else max(1, min(rows, weights // columns))
        packed = self.packed.get(name)
        stored = header if header.view is None else replace(header, shape=header.view.shape)
        load = partial(self._load, stored) if packed is None else rows_of(packed, self._load, where)
        if header.view is not None:
            whole = header.view.apply(load(0, header.view.shape[0])).reshape(rows, columns)
            load = lambda first, count: whole[first : first + count]  # noqa: E731
        for first in range(0, max(1, rows), max(1, height)):
            slab = load(first, min(height, rows - first))
            if header.dtype in FLOATING:
                check_finite(slab, where, first, header.shape)
            yield slab.reshape(header.shape) if weights is None else slab

    def stored_slabs(self, name: str, size_bytes: int) -> Iterator[Tensor]:
        """The rows of a tensor as they lie in the file, u8 [n, bytes a row], in slabs of about size_bytes."""
        header = self.tensors[name]
        rows = math.prod(header.shape[:-1])
        height = max(1, size_bytes * rows // max(1, header.end - header.start))
        for first in range(0, rows, height):
            yield self._bytes(header, first, min(height, rows - first))

    def repacked(self, name: str, type: str, weights: int) -> Iterator[Tensor] | None:
        """The rows of a weight in parts as blocks of a ggml type whose grid is its own; None where no grid is shared.

        In order, about so many weights at a time: u8 [n, bytes a row], and f32 [n, I] for rows whose scales ggml's
        blocks do not hold.
        """
        header, packed = self.tensors[name], self.packed.get(name)
        view = header.view
        whole_rows = view is None or not (view.transposed or (packed is not None and FORMATS[packed.format].coded))
        if packed is None or not whole_rows or not same_grid(packed, type):
            return None
        rows, where = math.prod(packed.shape[:-1]), f"{self.repo}: {name}"
        if view is not None:
            return (view.apply(blocks) for blocks in blocks_of(packed, type, rows, self._load, where))
        return blocks_of(packed, type, max(1, min(rows, weights // packed.shape[-1])), self._load, where)

    def _load(self, header: Header, first: int, count: int) -> Tensor:
        return decoded(self._bytes(header, first, count), header.dtype)

    def _bytes(self, header: Header, first: int, count: int) -> Tensor:
        """The bytes of `count` rows of a tensor from row `first` on, u8 [count, bytes a row]."""
        path = self.folder / header.file
        row_bytes = (header.end - header.start) // max(1, math.prod(header.shape[:-1]))
        size_bytes = count * row_bytes
        try:
            raw = read_range(path, header.start + first * row_bytes, size_bytes)
        except FileNotFoundError as error:
            what = f"the file of tensor '{header.name}' is not here"
            raise SourceError(
                str(path), what, "Fetch the model's weights first, or put the missing file back"
            ) from error
        except OSError as error:
            what = f"tensor '{header.name}' cannot be read: {error.strerror}"
            raise SourceError(str(path), what, "Look at the disk and at the file's permissions") from error
        if len(raw) < size_bytes:
            what = f"the file ends {size_bytes - len(raw)} bytes before the end of tensor '{header.name}'"
            raise SourceError(str(path), what, "It was changed after planning: fetch it again and plan anew")
        return raw.reshape(count, row_bytes)


def open_folder(path: Path, where: str) -> Snapshot:
    """Open the model in a folder, reading headers only; its commit is a digest over its content (`digest_folder`).

    `where` says who asks, for messages. Raises SourceError for what cannot be read and UnsupportedError for what is not
    converted: pickled weights, adapters, a quantization that is not decoded.
    """
    root = path.resolve()
    if not root.is_dir():
        raise SourceError(where, f"there is no folder {path}", "Check the path; it is relative to the manifest")

    def read_small(name: str) -> bytes:
        return (root / name).read_bytes()

    def read_headers(names: list[str]) -> Iterator[tuple[Header, ...]]:
        for name in names:
            with (root / name).open("rb") as file:
                length = header_length(file.read(8), files[name], name, where)
                yield parse_header(file.read(length), files[name], name, where)

    def read_bytes(headers: Sequence[Header]) -> list[bytes]:
        return [read_range(root / h.file, h.start, h.end - h.start).numpy().tobytes() for h in headers]

    gguf: tuple[str, ...] = ()
    packed: Mapping[str, Packed] = {}
    try:
        files = list_folder(root, where)
        if is_gguf(files):
            from converter.containers.gguf import source  # which imports this module

            model = source.survey(files, lambda name: source.read_head(root / name), where)
            gguf, config, tensors = model.files, source.config_of(model), source.headers_of(model)
        else:
            config, tensors, packed = survey(files, read_small, read_headers, read_bytes, where)
        commit = digest_folder(root, files)[:40]
    except OSError as error:
        what = f"{error.filename or root} cannot be read: {error.strerror}"
        raise SourceError(where, what, "Look at the disk and at the file's permissions") from error
    return Snapshot(
        source=f"folder:{root}",
        repo=root.name,
        commit=commit,
        config=config,
        tensors=tensors,
        packed=packed,
        files=files,
        folder=root,
        gguf=gguf,
    )


def is_gguf(files: Mapping[str, int]) -> bool:
    """Whether the model is GGUF only: files of that kind in the top folder, and no safetensors files."""
    top = [name for name in files if "/" not in name]
    return any(name.endswith(".gguf") for name in top) and not any(name.endswith(".safetensors") for name in top)


def survey(
    files: Mapping[str, int],
    read_small: Callable[[str], bytes],
    read_headers: Callable[[list[str]], Iterable[tuple[Header, ...]]],
    read_bytes: ReadBytes,
    where: str,
) -> tuple[dict[str, Any], dict[str, Header], dict[str, Packed]]:
    """Config, tensors and weights in parts of a model, from the list of its files and ways to read them.

    The same for a folder and for a hub, which reads many headers at once. Raises SourceError and UnsupportedError.
    """

    def small(name: str) -> bytes:
        check_small(name, files[name], where)
        return read_small(name)

    config = parse_json(small("config.json"), f"{where}: config.json") if "config.json" in files else {}
    check_quantization(config, where)
    index: dict[str, str] | None = None
    if INDEX in files and "model.safetensors" not in files:
        index = parse_index(small(INDEX), files, where)
        shards = sorted(set(index.values()))
    else:
        shards = choose_shards(files, small, where)
    found: dict[str, Header] = {}
    for header in chain.from_iterable(read_headers(shards)):
        if header.name in found:
            what = f"tensor {quoted(header.name)} is in both {found[header.name].file} and {header.file}"
            raise SourceError(where, what, "Remove the file that does not belong, or write an index")
        found[header.name] = header
    if index is not None:
        check_index(index, found, where)
    packed, parts = find_packed(config, found, read_bytes, where)
    plain = {name: header for name, header in found.items() if name not in parts}
    dtype = kept_type(config)
    logical = {
        name: replace(weight.parts["codes"], name=name, dtype=dtype, shape=weight.shape)
        for name, weight in packed.items()
    }
    tensors = dict(sorted((plain | logical).items()))
    if not tensors:
        raise SourceError(where, "the weights hold no tensor", "Check that the right files were saved")
    return config, tensors, packed


def choose_shards(files: Mapping[str, int], read_small: Callable[[str], bytes], where: str) -> list[str]:
    """The safetensors files of a model without an index: model.safetensors, else all in the top folder."""
    shards = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if "model.safetensors" in shards:
        return ["model.safetensors"]
    if "adapter_config.json" in files and shards in ([], ["adapter_model.safetensors"]):
        base = _named(read_small("adapter_config.json"), "base_model_name_or_path")
        what = f"this is an adapter, not a model{base and f': it goes with {base}'}"
        raise UnsupportedError(where, what, MERGE.format(base=base or "BASE"))
    if shards:
        return shards
    if "model_index.json" in files:
        kind = _named(read_small("model_index.json"), "_class_name")
        parts = sorted({name.partition("/")[0] for name in files if "/" in name and name.endswith(".safetensors")})
        what = f"this is a pipeline{kind and f' ({kind})'} of several models ({', '.join(parts)}) that makes no text"
        raise UnsupportedError(where, what, "Name the folder of one of them, to become parquet or compressed-tensors")
    if pickled := sorted(name for name in files if name.endswith(PICKLED)):
        what = f"the weights are pickled ({pickled[0]}), and there is no safetensors file"
        safe = [name for name in pickled if re.fullmatch(r"[\w./-]+", name)]  # a stranger's name enters a command
        pattern = "pytorch_model*.bin" if any(name.startswith("pytorch_model") for name in safe) else [*safe, "FILE"][0]
        raise SourceError(where, what, UNPICKLE.format(pattern=pattern))
    raise SourceError(where, "there is no .safetensors file", "Check that this is a model and that its download ended")


def _named(data: bytes, key: str) -> str:
    """The text of a key of a JSON object that a message quotes; empty where there is none, or no JSON."""
    try:
        value = parse_json(data, key).get(key)
    except SourceError:
        return ""
    return value[:80] if isinstance(value, str) and value.isprintable() else ""


def parse_index(data: bytes, files: Mapping[str, int], where: str) -> dict[str, str]:
    """File by tensor name, from model.safetensors.index.json; each file is inside the model and present."""
    weight_map = parse_json(data, f"{where}: {INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise SourceError(f"{where}: {INDEX}", "there is no 'weight_map' of names to files", "Fetch the file again")
    index: dict[str, str] = weight_map
    for shard in sorted(set(index.values())):
        check_path(shard, f"{where}: {INDEX}")
        if shard not in files:
            missing = sum(1 for place in index.values() if place == shard)
            what = f"shard {shard} with {missing} of {len(index)} tensors is missing"
            raise SourceError(where, what, "Fetch the model again; a download may have stopped half-way")
    return index


def check_index(index: Mapping[str, str], found: Mapping[str, Header], where: str) -> None:
    """Raise SourceError unless index and shards name the same tensors in the same files."""
    for name, shard in sorted(index.items()):
        if name not in found or found[name].file != shard:
            what = f"{INDEX} puts tensor {quoted(name)} into {shard}, which does not hold it"
            raise SourceError(where, what, "Index and shards are of different versions: fetch both again")
    if extra := sorted(set(found) - set(index)):
        unnamed = quoted(extra[0])
        what = f"{found[extra[0]].file} holds tensor {unnamed}, which {INDEX} does not name ({len(extra)} in all)"
        raise SourceError(where, what, "Index and shards are of different versions: fetch both again")


def header_length(first: bytes, size: int, file: str, where: str) -> int:
    """Length in bytes of the JSON header, from the file's first eight bytes and its size."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or size < 8:
        raise SourceError(f"{where}: {file}", f"the file is only {size} bytes long", "Fetch it again")
    if length > HEADER_LIMIT_BYTES or 8 + length > size:
        what = f"the header claims {length} bytes in a file of {size}"
        raise SourceError(f"{where}: {file}", what, "It is truncated or not safetensors: fetch it again")
    return length


def parse_header(data: bytes, size: int, file: str, where: str) -> tuple[Header, ...]:
    """The tensors that a safetensors header declares, in the order of their bytes.

    `data` is the JSON header, `size` the length of the whole file in bytes. Raises SourceError when the header is not
    what the format says: each type known, each length the product of its shape, no gap, no overlap, no name twice.
    """
    place = f"{where}: {file}"
    remedy = "The file is damaged: fetch it again, or ask its author"
    declared = parse_json(data, place)
    begin = 8 + len(data)
    headers: list[Header] = []
    for name, entry in declared.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            what = f"tensor {quoted(name)} is declared without dtype, shape and two data_offsets"
            raise SourceError(place, what, remedy) from error
        said = quoted(name)
        numbers = [*shape, start, end] if isinstance(shape, list) else [None]
        if isinstance(shape, list) and len(shape) > MOST_DIMENSIONS:
            raise SourceError(place, f"tensor {said} has {len(shape)} dimensions", remedy)
        real = all(type(number) is int and 0 <= number < MOST_ELEMENTS for number in numbers)
        if not real or math.prod(max(1, size) for size in shape) >= MOST_ELEMENTS or not name.isprintable() or not name:
            raise SourceError(place, f"tensor {said} has a shape, an offset or a name that is none", remedy)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            what = f"tensor {said} has the unknown type {quoted(str(dtype))}; known are {', '.join(DTYPES)}"
            raise SourceError(place, what, "Store the model in one of those")
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end - start != expected:
            what = f"tensor {said} ({dtype} {shape}) needs {expected} bytes, its offsets span {end - start}"
            raise SourceError(place, what, remedy)
        headers.append(
            Header(name=name, dtype=dtype, shape=tuple(shape), file=file, start=begin + start, end=begin + end)
        )
    headers.sort(key=lambda header: (header.start, header.end))
    position = begin
    for header in headers:
        if header.start != position:
            fault = "overlaps the one before it" if header.start < position else "leaves a gap before it"
            raise SourceError(place, f"tensor {quoted(header.name)} {fault}", remedy)
        position = header.end
    if position > size:
        what = f"the file is truncated: {position - size} of {position} bytes are missing"
        raise SourceError(place, what, "Fetch it again; a download may have stopped half-way")
    if position < size:
        raise SourceError(place, f"{size - position} bytes after the last tensor belong to none", remedy)
    return tuple(headers)


def tied(config: Mapping[str, Any], tensors: Iterable[str], head: str = "lm_head.weight") -> bool:
    """Whether the output head is the embedding table: the head's own tensor is absent and the config does not deny it.

    The tensors are the truth. What config.json leaves out differs by family (transformers 5: Gemma True, Llama False),
    and a head that is present is used as stored. A config that says `false` beside an absent head is a missing weight.
    What it says at its top, of the whole model, goes before what its `text_config` says.
    """
    text = config.get("text_config")
    declared = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, dict)]
    return head not in set(tensors) and next((said for said in declared if said is not None), True) is not False


def travels(path: str, size: int) -> bool:
    """Whether a file goes along with the model: no weight, and at most 32 MiB (config, tokenizer, licence, ...)."""
    return size <= SMALL_LIMIT_BYTES and not path.lower().endswith(WEIGHTS)
