"""What a GGUF file says of its model: against gguf-py on real cards, on odd ones, and as llama.cpp takes it."""

from __future__ import annotations

import json
import re
import string
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_models as tiny
from command import Command
from converter.architecture import find
from converter.containers import TensorPlan
from converter.containers.gguf import authorship, header, naming
from converter.containers.gguf.family import family_of
from converter.containers.gguf.metadata import general_fields
from converter.grids.ggml import GgmlGrid
from converter.source import Snapshot
from llama_peer import Llama
from patience import PATIENCE_SECONDS
from test_card import BOMB

pytest_plugins = ["command"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The specification's own expression; it asks for a version, and knows no full stop before the size.
CONVENTION = re.compile(
    r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))"
    r"-(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
    r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?-(?:(?P<Version>v\d+(?:\.\d+)*))(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?"
    r"(?:-(?P<Type>LoRA|vocab))?(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
)
LLAMA = """
language: [en, de, fr, it, pt, hi, es, th]
license: llama3.1
base_model: meta-llama/Meta-Llama-3.1-8B
pipeline_tag: text-generation
tags: [facebook, meta, pytorch, llama, llama-3]
extra_gated_prompt: "### LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\\n\\nLlama 3.1 Version"
extra_gated_fields:
  First Name: text
  Affiliation: text
"""
QWEN = """
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/LICENSE
language:
- en
pipeline_tag: text-generation
base_model: Qwen/Qwen2.5-7B
tags:
- chat
library_name: transformers
"""
MIXTRAL = """
language:
- fr
- it
- de
license: apache-2.0
base_model: mistralai/Mixtral-8x7B-v0.1
inference:
  parameters:
    temperature: 0.5
widget:
- messages:
  - role: user
    content: What is your favorite condiment?
"""
MERGE = """
license: cc-by-nc-4.0
base_model:
- EmbeddedLLM/Mistral-7B-Merge-14-v0
- janai-hq/trinity-v1
tags: [merge]
"""
FINE_TUNE = """
base_model: https://huggingface.co/NousResearch/Meta-Llama-3-8B
base_model_relation: finetune
model_creator: Nous Research
tags: [Llama-3, instruct, synthetic data, chatml]
model-index:
- name: Hermes-2-Pro-Llama-3-8B
  results: [{task: {type: text-generation}, metrics: [{type: acc, value: 71.2}]}]
license: llama3
language: [en]
datasets:
- teknium/OpenHermes-2.5
- https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k
"""
FAMILY = family_of(find({"architectures": ["LlamaForCausalLM"]}, "test"), "test")
EXPERT = 3 * 4096 * 14336 * 32  # Mixtral's, in all blocks
ODD_NAMES = ("Llama-3.1-8B-Instruct", "checkpoint-500", "model", "a b", "7b", "-", "v1-2-3", "x-٣B", "ﬁ-1K-large-A3B")


def dense(weights: int) -> list[TensorPlan]:
    return [tensor_of((weights,))]


def tensor_of(shape: tuple[int, ...], name: str = "token_embd.weight", stack: str = "") -> TensorPlan:
    grid = GgmlGrid(type="Q8_0", search="ggml")
    return TensorPlan(
        name=name, source=name, shape=shape, grid=grid, block=None, size_bytes=0, quantized=True, stack=stack
    )


def of_experts(count: int, each: int, shared: int) -> list[TensorPlan]:
    stack = "blk.0.ffn_up_exps.weight"
    return [tensor_of((shared,)), *(tensor_of((each,), f"{stack}[{e}]", stack) for e in range(count))]


def snapshot_of(folder: Path, source: str = "", **changes: Any) -> Snapshot:
    source = source or f"folder:{folder}"
    repo = source.removeprefix("hub:") if source.startswith("hub:") else folder.name
    fields: dict[str, Any] = {"config": {}, "tensors": {}, "files": {}, "folder": folder}
    return Snapshot(**({"source": source, "repo": repo, "commit": COMMIT} | fields | changes))


def describe(snapshot: Snapshot, tensors: Sequence[TensorPlan]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The metadata as gguf-py reads it from a file that holds nothing else, and the notes."""
    fields, notes = general_fields(snapshot, FAMILY, tiny.target("Q8_0"), tensors)
    path = snapshot.folder / "head.gguf"
    path.write_bytes(header.compose(fields, ()))
    return contents(path), notes


def contents(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


def model(folder: Path, card: str | bytes = "", generation: Mapping[str, Any] | None = None) -> Path:
    """A model's folder with nothing in it but what its author says."""
    folder.mkdir(parents=True, exist_ok=True)
    data = card if isinstance(card, bytes) else f"---\n{card.lstrip()}---\n# A model\n".encode()
    (folder / "README.md").write_bytes(data)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def by_gguf_py(folder: Path, weights: int) -> dict[str, Any]:
    """What gguf-py writes of the model in `folder`, read back."""
    path = folder / "theirs.gguf"
    metadata = gguf.Metadata.load(model_path=folder, total_params=weights)
    writer = gguf.GGUFWriter(path, "llama")
    metadata.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return contents(path)


# --- against gguf-py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card", "generation", "tensors", "differs"),
    [
        (
            "Llama-3.1-8B-Instruct",
            LLAMA,
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128008]},
            dense(8_030_261_248),
            {"general.size_label": "8.0B"},
        ),
        (
            "Qwen2.5-7B-Instruct",
            QWEN,
            {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            dense(7_615_616_512),
            {"general.size_label": "7.6B", "general.sampling.penalty_repeat": pytest.approx(1.05)},
        ),
        (
            "Mixtral-8x7B-Instruct-v0.1",
            MIXTRAL,
            {"_from_model_config": True, "bos_token_id": 1},
            of_experts(8, EXPERT, 46_702_792_704 - 8 * EXPERT),
            {"general.size_label": "8x7.2B"},
        ),
        ("Mistral-7B-Merge-14-v0.1", MERGE, None, dense(7_241_732_096), {"general.size_label": "7.2B"}),
        (
            "Hermes-2-Pro-Llama-3-8B",
            FINE_TUNE,
            None,
            dense(8_031_309_824),
            {
                "general.size_label": "8.0B",
                "general.dataset.0.version": None,
                "general.dataset.0.repo_url": "https://huggingface.co/datasets/teknium/OpenHermes-2.5",
                "general.dataset.1.name": "Ultrachat_200K",
                "general.dataset.1.organization": "HuggingFaceH4",
            },
        ),
    ],
)
def test_published_models_are_described_as_by_gguf_py_but_for_what_it_gets_wrong(
    name: str,
    card: str,
    generation: Mapping[str, Any] | None,
    tensors: list[TensorPlan],
    differs: Mapping[str, Any],
    tmp_path: Path,
) -> None:
    folder = model(tmp_path / name, card, generation)
    theirs = by_gguf_py(folder, sum(tensor.shape[0] for tensor in tensors))
    ours, notes = describe(snapshot_of(folder), tensors)
    assert notes == ()
    assert {key: ours.get(key) for key in differs} == differs
    own = {"general.type", "general.file_type", "general.quantization_version", "general.quantized_by"}
    own |= {"hubmill.source.repo", "hubmill.source.commit"}
    assert own <= set(ours)
    assert {key: value for key, value in ours.items() if key not in own | set(differs)} == {
        key: value for key, value in theirs.items() if key not in differs
    }


def test_the_name_that_training_left_in_config_json_is_not_the_models(tmp_path: Path) -> None:
    folder = model(tmp_path / "Zephyr-7B-Chat")
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "mistralai/Mistral-7B-v0.1"}))
    assert by_gguf_py(folder, 7 * 10**9)["general.name"] == "Mistral 7B v0.1"
    ours, _ = describe(snapshot_of(folder), dense(7 * 10**9))
    assert (ours["general.name"], ours["general.finetune"]) == ("Zephyr 7B Chat", "Chat")
    assert "general.version" not in ours and "general.organization" not in ours


# --- card, name and hub --------------------------------------------------------------------------------------------


def test_a_card_goes_before_what_the_name_tells(tmp_path: Path) -> None:
    card = """
    model_name: Mine
    author: Some One
    version: 1.10
    basename: Own
    size_label: 70B
    model_type: llama
    description: |
      Two
      lines.
    doi: 10.1000/1
    uuid: 0b1f
    url: https://example.org/@me
    license: [apache-2.0, mit]
    language: no
    """
    folder = model(tmp_path / "Llama-3.1-8B-Instruct-v2", re.sub("^    ", "", card, flags=re.MULTILINE))
    found, notes = describe(snapshot_of(folder), dense(8 * 10**9))
    expected = {
        "name": "Mine",
        "author": "Some One",
        "version": "1.10",
        "basename": "Own",
        "finetune": "Instruct",
        "size_label": "8.0B",
        "description": "Two lines.",
        "source.doi": "10.1000/1",
        "source.uuid": "0b1f",
        "source.url": "https://example.org/@me",
        "license": "apache-2.0,mit",
        "languages": ["no"],
    }
    assert {key: found[f"general.{key}"] for key in expected} == expected and notes == ()


def test_a_model_of_a_hub_is_told_with_its_address_at_the_commit(tmp_path: Path) -> None:
    folder = model(
        tmp_path / "m", "license: other\nlicense_name: own\nlicense_link: LICENSE\nrepo_url: https://x.org\n"
    )
    snapshot = snapshot_of(folder, "hub:mistral-ai/Mistral-Nemo-Instruct-2407", files={"LICENSE": 3})
    found, _ = describe(snapshot, dense(12_247_782_400))
    place = "https://huggingface.co/mistral-ai/Mistral-Nemo-Instruct-2407"
    expected = {
        "general.name": "Mistral Nemo Instruct 2407",
        "general.organization": "Mistral Ai",
        "general.version": "2407",
        "general.size_label": "12B",
        "general.source.repo_url": place,
        "general.source.url": f"{place}/tree/{COMMIT}",
        "general.license": "other",
        "general.license.name": "own",
        "general.license.link": f"{place}/blob/{COMMIT}/LICENSE",
        "hubmill.source.repo": snapshot.repo,
        "hubmill.source.commit": COMMIT,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "general.license.link" not in describe(snapshot_of(folder, files={"LICENSE": 3}), dense(1))[0]


@pytest.mark.parametrize("name", ["checkpoint-500", "run-2024-05-01", "model-v2", "final-100B"])
def test_a_folder_is_not_taken_at_its_name_without_a_size_that_fits(name: str, tmp_path: Path) -> None:
    found, _ = describe(snapshot_of(model(tmp_path / name)), dense(135_000_000))
    assert not {"general.version", "general.basename", "general.finetune"} & set(found)
    assert found["general.size_label"] == "135M"


def test_lineage_gives_away_neither_disks_nor_passwords(tmp_path: Path) -> None:
    card = {
        "base_model": [
            "/home/me/secret/llama-3-8b/",
            "C:\\Users\\me\\qwen-7b",
            "https://me:hunter2@hub.example/x/own",
            {"name": "Parts", "version": 2, "repo_url": "javascript:alert(1)", "url": "https://example.org/parts"},
            "https://example.org/models/1",
            "gpt2",
        ]
    }
    found, _ = describe(snapshot_of(model(tmp_path / "m", yaml.safe_dump(card))), dense(8 * 10**9))
    bases = {key.removeprefix("general.base_model."): value for key, value in found.items() if "base_model" in key}
    assert bases == {
        "count": 6,
        "0.name": "Llama 3 8b",
        "1.name": "Qwen 7b",
        "2.name": "Own",
        "3.name": "Parts",
        "3.version": "2",
        "3.url": "https://example.org/parts",
        "4.repo_url": "https://example.org/models/1",
        "5.name": "Gpt2",
    }
    assert not re.search("secret|hunter2|javascript|Users", str(found))


@pytest.mark.parametrize(
    ("tensors", "label"),
    [
        (dense(134_515_008), "135M"),
        (dense(70_553_706_496), "71B"),
        (dense(640_000), "640K"),
        (of_experts(8, EXPERT, 46_702_792_704 - 8 * EXPERT), "8x7.2B"),
        (of_experts(3, 1_000_000, 500_000), "3x1.5M"),
    ],
)
def test_the_size_is_counted(tensors: list[TensorPlan], label: str) -> None:
    assert naming.size_label(tensors) == label


def test_experts_of_a_written_file_are_counted_as_gguf_py_counts_them(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "in", "mixtral")
    tiny.save_tokenizer(tiny.byte_level(), tmp_path / "in")
    tiny.write(tmp_path / "in", tiny.target("Q8_0"), tmp_path / "out")
    reader = gguf.GGUFReader(next((tmp_path / "out").iterdir()))
    writer = gguf.GGUFWriter(None, "llama")
    for tensor in reader.tensors:
        shape = [int(side) for side in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype("float32"), 0)
    assert contents(next((tmp_path / "out").iterdir()))["general.size_label"] == gguf.size_label(
        *writer.get_total_parameter_count()
    )


# --- odd cards -----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(codec="utf-8"), max_size=60)
    | st.sampled_from(["org/name", "https://huggingface.co/a/b", "x" * 5000, "\u202e", "a\n---\nb", "/", "http://"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(authorship.PARTS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = [
    *(key for keys in authorship.SCALARS.values() for key in keys),
    *authorship.BASES,
    *authorship.DATASETS,
    *("license", "tags", "pipeline_tag", "language", "languages", "model-index", "size_label"),
]


@settings(deadline=None, max_examples=80)
@given(card=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8), name=st.sampled_from(ODD_NAMES))
def test_no_card_stops_a_conversion_or_gets_more_than_short_lines_into_the_file(
    card: dict[str, Any], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = model(tmp_path_factory.getbasetemp() / "odd", yaml.safe_dump(card, allow_unicode=True))
    found, _ = describe(snapshot_of(folder, "hub:org/" + name), dense(8 * 10**9))
    for value in found.values():
        for text in value if isinstance(value, list) else [value]:
            assert not isinstance(text, str) or (text.isprintable() and len(text) <= authorship.MAX_CHARACTERS)
    assert found["general.name"] and found["hubmill.source.commit"] == COMMIT
    assert found.get("general.base_model.count", 1) > 0


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=300), opened=st.booleans())
def test_no_bytes_in_place_of_a_card_stop_a_conversion(
    data: bytes, opened: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = model(tmp_path_factory.getbasetemp() / "odd", b"---\n" + data + b"\n---\n" if opened else data)
    (folder / "generation_config.json").write_bytes(data)
    assert describe(snapshot_of(folder, "hub:org/m"), dense(1000))[0]["general.name"] == "M"


@pytest.mark.parametrize(
    "front",
    [
        BOMB,
        "license: [apache-2.0",
        "license: !!python/object/apply:os.system [ls]",
        "[a, b]",
        f"license: mit\n{'#' * 70_000}",
        "a: " + "[" * 3000,
        'license: "\\UFFFFFFFF"',
        "license: \x00",
    ],
)
def test_front_matter_that_cannot_be_read_is_told(front: str, tmp_path: Path) -> None:
    found, notes = describe(snapshot_of(model(tmp_path / "m", front + "\n")), dense(1000))
    assert any("front matter of README.md cannot be read" in note for note in notes)
    assert "general.license" not in found and "general.tags" not in found


def test_what_a_key_cannot_hold_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    card = {"license": {"a": 1}, "tags": ["ok", ["x"], None], "base_model": [7, []], "author": "x" * 3000}
    found, notes = describe(snapshot_of(model(tmp_path / "m", yaml.safe_dump(card))), dense(1000))
    assert notes == (
        "the front matter of README.md has values of another form (author, license, tags, base_model), "
        "which are left out",
    )
    assert found["general.tags"] == ["ok"] and found["general.base_model.0.name"] == "7"


def test_a_licence_behind_long_tables_of_results_and_tabs_is_found(tmp_path: Path) -> None:
    results = "".join(
        f"  - task: {{type: Retrieval}}\n    metrics: [{{type: ndcg, value: {n}}}]\n" for n in range(4000)
    )
    card = f"tags:\n\t- mteb\nmodel-index:\n- name: e5\n  results:\n{results}\n# all\nlicense: mit\n"
    found, notes = describe(snapshot_of(model(tmp_path / "m", card)), dense(1000))
    assert len(results) > 2 * 64 << 10 and notes == ()
    assert (found["general.license"], found["general.tags"]) == ("mit", ["mteb"])


# --- sampling ------------------------------------------------------------------------------------------------------


def sampling_of(generation: Any, folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    found, notes = describe(snapshot_of(model(folder, "", generation)), dense(1000))
    start = "general.sampling."
    return {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}, notes


def test_a_model_that_is_greedy_keeps_its_penalty_only(tmp_path: Path) -> None:
    said = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "top_k": 50, "repetition_penalty": 1.5}
    assert sampling_of(said, tmp_path) == ({"penalty_repeat": 1.5}, ())


def test_settings_that_are_none_are_told_and_left_out(tmp_path: Path) -> None:
    said = {
        "temperature": -1,
        "top_k": 2.5,
        "top_p": "0.9",
        "min_p": True,
        "repetition_penalty": 1e40,
        "mirostat": None,
    }
    found, (note,) = sampling_of(said | {"mirostat_tau": float("nan"), "xtc_threshold": 0.5}, tmp_path)
    assert found == {"xtc_threshold": 0.5}
    assert re.findall(r"\((.*)\)", note) == ["temperature, top_k, top_p, min_p, repetition_penalty, mirostat_tau"]
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in describe(snapshot_of(tmp_path), dense(1000))[1][0]


def test_llama_cpp_samples_as_the_generation_config_says(tmp_path: Path) -> None:
    said = {"temperature": 0.625, "top_k": 17, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.125}
    model(tmp_path / "in", "", said)
    tiny.save_model(tmp_path / "in")
    tiny.save_tokenizer(tiny.byte_level(), tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(said))
    tiny.write(tmp_path / "in", tiny.target("Q8_0"), tmp_path / "out")
    with (
        Llama(next((tmp_path / "out").iterdir())) as reader,
        urllib.request.urlopen(f"{reader.address}/props", timeout=PATIENCE_SECONDS) as answer,
    ):
        used = json.load(answer)["default_generation_settings"]["params"]
    words = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    words["repetition_penalty"] = "repeat_penalty"
    assert {key: used[word] for key, word in words.items()} == said  # exact: each is a sum of few powers of two


# --- file names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Mixtral-8x7B-Instruct-v0.1", ("Mixtral", "8x7B", "Instruct", "v0.1")),
        ("TinyLlama-1.1B-Chat-v1.0", ("TinyLlama", "1.1B", "Chat", "v1.0")),
        ("Hermes-2-Pro-Llama-3-8B-DPO-v2", ("Hermes-2-Pro-Llama-3", "8B", "DPO", "v2")),
        ("Grok-100B-v1.0", ("Grok", "100B", None, "v1.0")),
    ],
)
def test_a_model_named_by_the_convention_gives_a_file_named_by_it(
    name: str, parts: tuple[str | None, ...], tmp_path: Path
) -> None:
    stem = naming.file_stem(snapshot_of(tmp_path, f"hub:org/{name}"), tiny.target("Q4_K_M"))
    assert stem == f"{name}-Q4_K_M"
    for ending in (".gguf", "-00001-of-00003.gguf"):
        found = CONVENTION.fullmatch(stem + ending)
        assert found
        assert found.group("BaseName", "SizeLabel", "FineTune", "Version", "Encoding") == (*parts, "Q4_K_M")


def test_a_file_is_called_as_its_model(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path, "hub:meta-llama/Llama-3.1-8B-Instruct")
    assert naming.file_stem(snapshot, tiny.target("IQ4_XS")) == "Llama-3.1-8B-Instruct-IQ4_XS"
    named = snapshot_of(tmp_path, "hub:meta-llama/Llama-3.1-8B-Instruct", name="mine")
    assert naming.file_stem(named, tiny.target("IQ4_XS")) == "mine-IQ4_XS"


@settings(deadline=None, max_examples=50)
@given(name=st.text(string.ascii_letters + string.digits + "-._xB٣ é", min_size=1, max_size=20))
def test_any_name_has_parts_or_none(name: str) -> None:
    for weights in (1, 8 * 10**9):
        assert isinstance(naming.name_parts(name, weights, published=True), naming.NameParts)


def test_the_manifests_name_for_a_model_is_its_files_name(tmp_path: Path, hubmill: Command) -> None:
    tiny.save_model(tmp_path / "final")
    tiny.save_tokenizer(tiny.byte_level(), tmp_path / "final")
    text = """
name: names
models: [{source: folder:final, name: Tiny-1M-v0.1}, {source: folder:final}]
targets: {q8: {format: gguf, type: Q8_0}}
calibration: {sequences: 2, length: 16}
evaluation: {sequences: 2, length: 16}
"""
    (tmp_path / "names.yaml").write_text(text)
    answer = hubmill("plan", tmp_path / "names.yaml", "--out", tmp_path / "out", "--json")
    files = [list(job["files"]) for job in json.loads(answer.output)["jobs"]]
    assert files == [["Tiny-1M-v0.1-Q8_0.gguf"], ["final-Q8_0.gguf"]]
