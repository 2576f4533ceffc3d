"""The manifest: what it accepts, and that every mistake is found, placed and explained."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from converter.errors import ManifestError
from converter.manifest import Manifest, Target, json_schema, load
from converter.manifest_fields import Calibration, Evaluation, Publish, keys_of
from converter.manifest_rules import KEEP, UNCODED
from converter.schemes import METHODS, ROUNDERS, SCHEMES, STORES, TRANSFORMS

ROOT = Path(__file__).parent.parent
QUICKSTART = (ROOT / "manifests" / "quickstart.yaml").read_text(encoding="utf-8")
LINE = re.compile(r"\S.*\.yaml:[1-9]\d*:[1-9]\d*: \S.*[.?]")

GOOD = """\
name: small
models:
  - source: folder:model
  - source: hub:org/name@0123456
    targets: [int8, q8-0]
    overrides: {int8: {group_size: 64, rules: {lm_head: BF16}}}
targets:
  q8-0: {format: gguf, type: Q8_0, rules: {output: F16}}
  int8: {format: parquet, scheme: INT8, rules: {embed: F16, lm_head: F32}}
  w8a8:
    format: compressed-tensors
    scheme: W8A8
    method: [smoothquant, gptq]
    smoothing_strength: 0.5
    damping: 1e-2
calibration: {text: builtin, sequences: 8, length: 64}
evaluation: {text: "hub:org/texts@main#body", sequences: 8, length: 64}
publish: {hub: folder:out/hub, repo: "{name}/{model}-{target}", private: true}
exclude:
  - {model: model, target: w8a8}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the manifests of these tests name."""
    folder = tmp_path_factory.mktemp("manifests")
    for name in ("model", "one/twin", "two/twin", "quickstart/model"):
        (folder / name).mkdir(parents=True)
    (folder / "text.txt").write_text("text")
    return folder


def read(folder: Path, content: str | bytes) -> Manifest:
    path = folder / "m.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(path)


def problems(folder: Path, content: str | bytes) -> list[str]:
    """Give the problems without the file's folder; there must be some, each a full line with its place."""
    with pytest.raises(ManifestError) as caught:
        read(folder, content)
    assert all(LINE.fullmatch(line) for line in caught.value.problems), caught.value.problems
    return [line.removeprefix(f"{folder}/") for line in caught.value.problems]


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, f"{old} must be there once"
    return text.replace(old, new)


# What is accepted.


def test_quickstart_is_the_contract_of_the_design() -> None:
    manifest = load(ROOT / "manifests" / "quickstart.yaml")
    assert [job.key for job in manifest.jobs()] == [
        f"model/{target}" for target in ("q4-k-m", "q8-0", "w4a16", "w8a8", "int8", "int2")
    ]
    assert manifest.targets["w8a8"].methods == ("smoothquant", "gptq")
    assert manifest.targets["int8"].methods == ("rtn",)
    assert manifest.targets["q4-k-m"].imatrix and not manifest.targets["q8-0"].imatrix
    assert (manifest.calibration.sequences, manifest.calibration.length, manifest.calibration.seed) == (32, 256, 0)
    assert manifest.publish is not None
    assert manifest.publish.hub == f"folder:{ROOT / 'out' / 'hub'}"
    assert manifest.models[0].folder == ROOT / "manifests" / "quickstart" / "model"
    assert manifest.targets["int2"].where.endswith("manifests/quickstart.yaml:12")


@pytest.mark.parametrize("given", ["awq", "smoothquant", "[awq]", "[smoothquant, awq]"])
def test_transforms_alone_are_followed_by_rounding_to_nearest(folder: Path, given: str) -> None:
    manifest = read(folder, changed("[smoothquant, gptq]\n    smoothing_strength: 0.5\n    damping: 1e-2", given))
    assert manifest.targets["w8a8"].methods == (*given.strip("[]").split(", "), "rtn")


def test_awq_weighs_by_the_statistics_that_it_brings() -> None:
    target = Target(name="t", format="compressed-tensors", scheme="W4A16_ASYM", methods=("awq",))
    assert target.methods == ("awq", "rtn") and target.with_defaults().collects_imatrix
    assert not target.model_copy(update={"methods": ("smoothquant", "rtn")}).with_defaults().collects_imatrix


def test_jobs_are_models_times_targets_with_selection_overrides_and_exclude(folder: Path) -> None:
    manifest = read(folder, GOOD)
    jobs = {job.key: job.target for job in manifest.jobs()}
    assert list(jobs) == ["model/q8-0", "model/int8", "name/q8-0", "name/int8"]
    assert jobs["model/int8"].group_size is None
    assert jobs["name/int8"].group_size == 64
    assert [(rule.pattern, rule.type) for rule in jobs["name/int8"].rules] == [("lm_head", "BF16"), ("embed", "F16")]
    assert jobs["name/int8"] is not jobs["model/int8"] and jobs["name/q8-0"] == jobs["model/q8-0"]
    assert manifest.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert manifest.publish is not None
    assert [manifest.publish.repo_of(manifest.name, job) for job in manifest.jobs()][-1] == "small/name-int8"


def test_targets_may_share_a_repository_when_each_has_a_branch_of_it(folder: Path) -> None:
    text = changed('hub: folder:out/hub, repo: "{name}/{model}-{target}"', 'hub: hf, repo: "org/{model}"')
    manifest = read(folder, changed("private: true", 'branch: "quantized/{target}"', text))
    assert manifest.publish is not None
    places = {(manifest.publish.repo_of("x", job), manifest.publish.branch_of("x", job)) for job in manifest.jobs()}
    assert ("org/name", "quantized/int8") in places and len(places) == len(manifest.jobs())


def test_the_first_matching_rule_wins(folder: Path) -> None:
    target = read(folder, GOOD).targets["int8"]
    rule = target.rule_for("model.embed_tokens.weight")
    assert rule is not None and rule.type == "F16"
    assert target.rule_for("model.norm.weight") is None


def test_null_in_an_override_returns_to_the_default(folder: Path) -> None:
    text = changed("{int8: {group_size: 64, rules", "{w8a8: {damping: null, smoothing_strength: ~}, int8: {rules")
    text = changed("targets: [int8, q8-0]", "targets: [w8a8, int8]", text)
    jobs = {job.key: job.target for job in read(folder, text).jobs()}
    assert (jobs["name/w8a8"].damping, jobs["name/w8a8"].smoothing_strength) == (0.01, 0.8)


def test_targets_can_be_added_and_removed_for_one_model(folder: Path) -> None:
    text = changed("targets: [int8, q8-0]", "targets: {remove: [w8a8], add: {f16: {format: gguf, type: F16}}}")
    manifest = read(folder, text)
    assert [job.key for job in manifest.jobs()][2:] == ["name/q8-0", "name/int8", "name/f16"]
    assert "f16" not in manifest.targets


def test_same_named_models_get_their_owner_in_front(folder: Path) -> None:
    text = changed("folder:model", "folder:one/twin\n  - source: folder:two/twin\n  - source: hub:org/Twin", GOOD)
    text = changed("  - {model: model, target: w8a8}", "  - {model: one-twin, target: int8}", text)
    manifest = read(folder, text)
    assert [model.name for model in manifest.models] == ["one-twin", "two-twin", "org-Twin", "name"]
    assert manifest.models[2].source == "hub:org/Twin@main"
    assert [job.key for job in manifest.jobs()][:3] == ["one-twin/q8-0", "one-twin/w8a8", "two-twin/q8-0"]


@pytest.mark.parametrize(
    "revision", ["0123456", "1234567", "1e10", "0x1F", "12_345", "no", "9" * 40, "refs/pr/3", "v1.0"]
)
def test_a_revision_keeps_the_spelling_it_was_typed_in(folder: Path, revision: str) -> None:
    text = changed("hub:org/name@0123456", f"hub:org/name@{revision}")
    assert read(folder, text).models[1].source == f"hub:org/name@{revision}"


@pytest.mark.parametrize("name", ["no", "on", "1e3", "010", "1.0", "2024-01-01", "true", "0x1F", "null"])
def test_a_name_that_yaml_would_turn_into_something_else_stays_a_name(folder: Path, name: str) -> None:
    text = changed("name: small", f'name: "{name}"' if name == "null" else f"name: {name}")
    text = changed("  w8a8:\n", f"  {name}:\n", text).replace("target: w8a8", f'target: "{name}"')
    manifest = read(folder, text)
    assert manifest.name == name
    assert name in manifest.targets


def test_anchors_aliases_and_merge_keys_work(folder: Path) -> None:
    text = changed("  q8-0: {", "  q8-0: &base {")
    text = changed("  w8a8:\n", "  q4-0: {<<: *base, type: Q4_0}\n  w8a8:\n", text)
    target = read(folder, text).targets["q4-0"]
    assert (target.format, target.type, target.rules[0].type) == ("gguf", "Q4_0", "F16")


def test_defaults_come_from_the_scheme_unless_given() -> None:
    target = Target(name="t", format="compressed-tensors", scheme="W4A16_ASYM").with_defaults()
    assert (target.group_size, target.symmetric, target.granularity) == (128, False, "group")
    channel = Target(name="t", format="compressed-tensors", scheme="W4A16", granularity="channel").with_defaults()
    assert (channel.group_size, channel.symmetric, channel.granularity) == (None, True, "channel")
    grouped = Target(name="t", format="parquet", scheme="INT8", group_size=32, symmetric=False).with_defaults()
    assert (grouped.group_size, grouped.symmetric, grouped.granularity) == (32, False, "group")


@pytest.mark.parametrize(
    ("format", "store"), [(format, store) for format, stores in STORES.items() for store in stores]
)
def test_every_entry_of_the_tables_is_accepted_by_loader_and_schema(folder: Path, format: str, store: str) -> None:
    key = "scheme" if format in SCHEMES else "type"
    schema = jsonschema.Draft202012Validator(json.loads(json_schema()))
    for method in METHODS[format]:
        if method == "rotation" and store.startswith("W8A8_STATIC"):
            continue  # a rotation leaves the range of inputs unknown, see test_rotation_run.py
        if method == "hqq" and not SCHEMES[format][store].offset:
            continue
        if method == "autoround" and (SCHEMES[format][store].values in UNCODED if format in SCHEMES else store in KEEP):
            continue  # nothing to learn, see test_autoround_run.py
        methods = [method] if method in ROUNDERS else [method, "rtn"]
        document = {
            "name": "n",
            "models": [{"source": "folder:model"}],
            "targets": {"t": {"format": format, key: store, "method": methods}},
        }
        schema.validate(document)
        target = read(folder, yaml.safe_dump(document)).targets["t"]
        assert (target.type or target.scheme, target.methods) == (store, tuple(methods))


def test_the_keys_of_gguf_targets_are_read(folder: Path) -> None:
    keys = (
        "search: thorough, imatrix: text.txt, output_type: Q6_K, embedding_type: IQ4_NL, pure: true, fallback: refuse"
    )
    more = "requantize: true, split_size: 500M, metadata: {general.name: A b, a.n: -3, a.x: 0.5, a.on: true, a.s: '1'}"
    target = read(folder, changed("type: Q8_0", f"type: Q4_K, {keys}, {more}")).targets["q8-0"]
    assert (target.search, target.output_type, target.embedding_type) == ("thorough", "Q6_K", "IQ4_NL")
    assert (target.pure, target.fallback, target.requantize, target.split_bytes) == (True, "refuse", True, 500_000_000)
    assert target.imatrix_file == folder / "text.txt"
    assert target.weighs_columns and not target.collects_imatrix
    values = {"general.name": "A b", "a.n": -3, "a.x": 0.5, "a.on": True, "a.s": "1"}
    assert {key: (value, type(value)) for key, value in target.metadata.items()} == {
        key: (value, type(value)) for key, value in values.items()
    }


def test_gguf_targets_are_plain_unless_told_otherwise(folder: Path) -> None:
    target = read(folder, GOOD).targets["q8-0"]
    assert (target.search, target.fallback, target.imatrix) == ("ggml", "allow", False)
    assert not target.pure and not target.requantize and not target.metadata
    assert (target.output_type, target.embedding_type, target.split_tensors, target.split_bytes) == (None,) * 4


def test_a_rule_may_speak_of_either_name_of_a_tensor() -> None:
    target = Target(name="t", format="gguf", type="Q4_0", rules=({"pattern": "ffn_down", "type": "Q8_0"},))
    assert target.rule_for("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight") == target.rules[0]
    assert target.rule_for("model.layers.0.mlp.down_proj.weight") is None


# What is refused, where, and with which way out.

NVFP4_BY_KL = "compressed-tensors, scheme: NVFP4, activation_observer: kl"

# (what to replace, with what, what the problem contains)
# fmt: off
CASES = [
    ("name: small", "nome: small", "1:1: key 'nome' is not known. Did you mean 'name'?"),
    ("name: small", "name: a/b", "1:7: name 'a/b' cannot be a name. "),
    ("name: small", "name: report.html", "1:7: name 'report.html' is the name of a file of the run. "),
    ("name: small", "name: small\nname: big", "2:1: key 'name' is already on line 1. "),
    ("  int8: {f", "  Q8-0: {f", "9:3: target 'Q8-0' differs from 'q8-0' only in case. "),
    ("name: small", "name:", "1:6: name is empty. "),
    ("format: gguf,", "format: GGUF,", "8:18: target 'q8-0': format 'GGUF' is not known. Did you mean 'gguf'?"),
    ("type: Q8_0", "type: q8_0", "8:30: target 'q8-0': gguf cannot store type 'q8_0'; it stores F32, F16, BF16, Q8_0"),
    ("type: Q8_0", "type: q4_k_m", "Did you mean 'Q4_K_M'?"),
    ("type: Q8_0", "type: INT8", "MXFP4, NVFP4, Q3_K, Q4_K, Q5_K. Choose one, or format: parquet."),
    ("type: Q8_0, ", "", "8:3: target 'q8-0': gguf needs type. Add type with one of: F32, "),
    ("scheme: INT8", "type: INT8", "9:33: target 'int8': parquet takes scheme, not type. Write scheme: INT8."),
    ("scheme: INT8", "type: Q4_K_M", "9:33: target 'int8': parquet cannot store type 'Q4_K_M'; it stores INT8, INT7, "),
    ("scheme: INT8", "scheme: INT8, type: Q8_0", "9:47: target 'int8': parquet takes scheme, and type is given too. "),
    ("type: Q8_0", "type: Q8_0, group_size: 32", "8:48: target 'q8-0': group_size has no effect with gguf"),
    ("type: Q8_0", "type: Q8_0, method: [smoothquant, rtn]", "8:45: target 'q8-0': method 'smoothquant' does not work"),
    ("type: Q8_0", "type: Q8_0, imatrix: yes", "8:45: target 'q8-0': imatrix 'yes' is not true or false. Write true"),
    ("type: Q8_0", "type: Q8_0, imatrix: nothing.gguf", "8:45: target 'q8-0': there is no file '"),
    ("scheme: INT8", "scheme: INT8, imatrix: text.txt", "9:50: target 'int8': an imatrix file names tensors as GGUF d"),
    ("scheme: INT8", "scheme: INT8, search: thorough", "9:49: target 'int8': search is for gguf, and has no effect w"),
    ("scheme: INT8", "scheme: INT8, split_size: 2G", "target 'int8': split_size is for gguf, and has no effect with "),
    ("type: Q8_0", "type: Q8_0, search: through", "8:44: target 'q8-0': search 'through' is not known. Did you mea"),
    ("type: Q8_0", "type: Q8_0, output_type: q6_k", "output_type 'q6_k' is not known. Did you mean 'Q6_K'?"),
    ("type: Q8_0", "type: Q8_0, embedding_type: Q4_K_M", "embedding_type 'Q4_K_M' is not known. Did you mean 'Q4_K'?"),
    ("type: Q8_0", "type: F16, pure: true", "8:41: target 'q8-0': pure has no effect with type F16, which is no mix"),
    ("type: Q8_0", "type: Q8_0, fallback: refused", "fallback 'refused' is not known. Did you mean 'refuse'?"),
    ("type: Q8_0", "type: Q8_0, split_tensors: 0", "split_tensors '0' should be greater than or equal to 1"),
    ("type: Q8_0", "type: Q8_0, split_size: 2GB", "split_size '2GB' is not a size. Write a whole number and K, M or"),
    ("type: Q8_0", "type: Q8_0, split_size: 0G", "8:48: target 'q8-0': split_size '0G' is not a size. "),
    ("type: Q8_0", "type: Q8_0, split_size: 2G, split_tensors: 4", "split_size and split_tensors are both given. Remo"),
    ("type: Q8_0", "type: Q8_0, metadata: {General.Name: x}", "metadata General.Name is not a metadata key. "),
    ("type: Q8_0", "type: Q8_0, metadata: {general.alignment: 64}", "metadata general.alignment is written from what"),
    ("type: Q8_0", "type: Q8_0, metadata: {a.b: yes}", "8:52: target 'q8-0': metadata a.b 'yes' can be read in two wa"),
    ("type: Q8_0", "type: Q8_0, metadata: {a.b: [1]}", "8:52: target 'q8-0': metadata a.b takes one value, not a list"),
    ("type: Q8_0", "type: Q8_0, metadata: all", "8:46: target 'q8-0': metadata "),
    ("type: Q8_0", "type: Q8_0, bits_per_weight: 4.5", "8:36: target 'q8-0': the search that bits_per_weight asks for"),
    ("type: Q8_0", "type: Q8_0, propagate: quantized", "8:47: target 'q8-0': propagate quantized has no effect"),
    ("type: Q8_0", "type: Q8_0, propagate: quantised", "propagate 'quantised' is not known. Did you mean 'quantized'?"),
    ("output: F16", "output: Q4_K_M", "Q4_K_M is a mixture for whole files"),
    ("output: F16", "output: q6_k", "gguf cannot store rule type 'q6_k'. Did you mean 'Q6_K'?"),
    ("output: F16", "\"(\": F16", "8:44: target 'q8-0': rule pattern '(' is not a regular expression: "),
    ("embed: F16", "embed: W8A8", "parquet cannot store rule type 'W8A8'. Choose one of: INT8, INT7"),
    ("scheme: INT8", "scheme: INT8, group_size: 0", "9:53: target 'int8': group_size '0' should be greater than or eq"),
    ("scheme: INT8", "scheme: INT8, group_size: 1e2", "9:53: target 'int8': group_size 1e2 is text to YAML 1.1. Write"),
    ("scheme: INT8", "scheme: INT8, group_size: 1:30", "9:53: target 'int8': group_size '1:30' is not a whole number."),
    ("scheme: INT8", "scheme: INT8, granularity: grup", "granularity 'grup' is not known. Did you mean 'group'?"),
    ("scheme: INT8", "scheme: INT8, granularity: group", "scheme INT8 has no group size of its own. Add group_size"),
    ("scheme: INT8", "scheme: INT8, granularity: tensor, group_size: 8", "group_size is given, but granularity is ten"),
    ("scheme: INT8", "scheme: INT8, activation_observer: mse", "'int8': activation_observer has no effect where no "),
    ("scheme: INT8", "scheme: INT8, activation_observer: best", "activation_observer 'best' is not known. "),
    ("parquet, scheme: INT8", NVFP4_BY_KL, "activation_observer kl weighs codes of one scale, and NVFP4 has one a gr"),
    ("scheme: INT8", "scheme: INT8, kv_cache: FP8", "parquet has no place for scales of keys and values. Remove kv_c"),
    ("scheme: INT8", "scheme: INT8, kv_cache: fp8", "kv_cache 'fp8' is not known. Did you mean 'FP8'?"),
    ("scheme: INT8", "scheme: INT8, damping: 0.1", "9:50: target 'int8': damping has no effect without gptq. "),
    ("scheme: INT8", "scheme: INT8, smoothing_strength: 1", "9:61: target 'int8': smoothing_strength has no effect wi"),
    ("scheme: INT8", "scheme: INT8, observer: MinMax", "observer 'MinMax' is not known. Did you mean 'minmax'?"),
    ("scheme: INT8", "scheme: INT4, method: hqq", "9:49: target 'int8': hqq moves offsets, and scheme INT4 has none. "),
    ("scheme: INT8", "scheme: INT4, method: hqq", "Choose scheme INT4_OFFSET, INT3_OFFSET, INT2_OFFSET, INT4_DOUBLE"),
    ("[smoothquant, gptq]", "hqq", "method 'hqq' does not work with compressed-tensors. Use smoothquant, awq, rot"),
    ("type: Q8_0", "type: Q8_0, method: hqq", "method 'hqq' does not work with gguf. Use rotation, reorder, rtn, gpt"),
    ("scheme: INT8", "scheme: SEQ2, granularity: tensor", "where a row shares a scale, or a group of its columns. Wri"),
    ("scheme: INT8", "scheme: E4M3, granularity: block", "where a row or all of a tensor shares a scale. Write granul"),
    ("scheme: INT8", "scheme: KMEANS4, observer: minmax", "observer has no effect with scheme KMEANS4, which fixes it"),
    ("scheme: INT8", "scheme: MXFP4, group_size: 64", "group_size has no effect with scheme MXFP4, which fixes it"),
    ("scheme: W8A8", "scheme: W4A16\n    symmetric: false", "Write scheme: W4A16_ASYM, and remove symmetric."),
    ("[smoothquant, gptq]", "[gptq, smoothquant]", "13:13: target 'w8a8': method has smoothquant after the rounder gp"),
    ("[smoothquant, gptq]", "[smoothquant, rtn, gptq]", "13:13: target 'w8a8': method has 2 rounders (rtn, gptq). "),
    ("[smoothquant, gptq]", "[]", "13:13: target 'w8a8': method has no rounder"),
    ("[smoothquant, gptq]", "[smothquant, gptq]", "13:14: target 'w8a8': method 1 'smothquant' is not known. Did you "),
    ("smoothing_strength: 0.5", "smoothing_strength: 1.5", "14:25: target 'w8a8': smoothing_strength '1.5' should be "),
    ("damping: 1e-2", "damping: '0.1'", "15:14: target 'w8a8': damping '0.1' is not a number. Write it without quotes"),
    ("damping: 1e-2", "dampening: 1e-2", "15:5: target 'w8a8': key 'dampening' is not known. Did you mean 'damping'?"),
    ("sequences: 8, length: 64}\neval", "sequences: 0, length: 64}\neval", "16:41: calibration: sequences '0' should "),
    ("length: 64}\neval", "length: 010}\neval", "16:52: calibration: length 010 is 8 to YAML 1.1, written in octal. W"),
    ("length: 64}\neval", "length: 8}\neval", "16:52: calibration: length '8' should be greater than or equal to 16"),
    ("text: builtin", "text: file:nothing.txt", "16:21: calibration: there is no file '"),
    ("text: builtin", "text: hub:org/texts@main#body", "17:20: evaluation: text 'hub:org/texts@main#body' is what cal"),
    ("#body", "#", "17:20: evaluation: text 'hub:org/texts@main#' has nothing after #. "),
    ("folder:model", "folder:modle", "3:13: model 1: there is no folder '"),
    ("folder:model", "./model", "3:13: model 1: source './model' has no known form. Did you mean 'folder:./model'?"),
    ("source: folder:model", "source:folder:model", "3:5: model 1: models wants keys and values here. Put a space aft"),
    ("hub:org/name@0123456", "org/name", "4:13: model 2: source 'org/name' has no known form. Did you mean 'hub:org/n"),
    ("hub:org/name@0123456", "hub:name", "4:13: model 2: source 'name' is not a repository. Write owner/name"),
    ("hub:org/name@0123456", "hub:org/name@", "4:13: model 2: source 'org/name@' has nothing after @. "),
    ("hub:org/name@0123456", "hub:org/name@a..b", "4:13: model 2: source 'a..b' is not a revision. "),
    ("hub:org/name@0123456", "folder:./model", "is also the name of"),
    ("[int8, q8-0]", "[int88, q8-0]", "5:15: model 2: there is no target 'int88'. Did you mean 'int8'?"),
    ("[int8, q8-0]", "[int8, int8]", "5:21: model 2: target 'int8' is listed twice. "),
    ("[int8, q8-0]", "[q8-0]", "6:17: model 2: overrides name 'int8', which is no target of this model. "),
    ("[int8, q8-0]", "{add: {int8: {format: gguf, type: F16}}}", "target 'int8' is defined under targets: as well. "),
    ("group_size: 64", "group_size: -64", "6:36: target 'int8': group_size '-64' should be greater than or equal to 1"),
    ("group_size: 64", "format: gguf", "6:24: model 2: overrides cannot change the format. "),
    ("group_size: 64", "scheme: W8A8", "6:32: target 'int8': parquet cannot store scheme 'W8A8'; it stores INT8, INT7"),
    ("{model: model, ", "{model: modle, ", "20:13: exclude 1: there is no model 'modle'. Did you mean 'model'?"),
    ("{model: model, ", "{model: name, ", "20:5: exclude 1: no job fits, so nothing is left out. "),
    ("{model: model, target: w8a8}", "{}", "20:5: exclude 1: neither a model nor a target is named. "),
    ("{model: model, target: w8a8}", "{model: model}", "3:5: model 1: no target is left for this model. "),
    ("{model: model, target: w8a8}", "{target: int8}\n  - {target: q8-0}", "4:5: model 2: no target is left for this "),
    ("{name}/{model}-{target}", "{name}/{model}", "18:38: publish: 2 jobs would go to 'small/model': model/q8-0, mode"),
    ("{name}/{model}-{target}", "../{model}-{target}", "publish: repo '../{model}-{target}' is not a repository name."),
    ("{name}/{model}-{target}", "/{model}-{target}", "is not a repository name. "),
    ("{name}/{model}-{target}", "{modle}-{target}", "repo has '{modle}', which nothing fills in. Did you mean 'model'"),
    ("{name}/{model}-{target}", "{model.__class__}-{target}", "repo has '{model.__class__}', which nothing fills in. "),
    ("{name}/{model}-{target}", "{model-{target}", "repo '{model-{target}' has "),
    ("hub: folder:out/hub", "hub: hugging", "18:16: publish: hub 'hugging' has no known form. Write folder:path or hf"),
    ("private: true", "branch: q4", "publish: branch has no effect with a folder as hub. Remove branch, or wri"),
    ("private: true", "pull_request: true", "publish: pull_request has no effect with a folder as hub. "),
    ("private: true", "collection: Ours", "publish: collection has no effect with a folder as hub. "),
    ("private: true", "branch: '../{target}'", "publish: branch '../{target}' is not a branch. Write letters,"),
    ("private: true", "branch: refs/pr/1", "publish: branch 'refs/pr/1' is not a branch. "),
    ("private: true", "branch: '{target}.lock'", "publish: branch '{target}.lock' is not a branch. "),
    ("private: true", "branch: main", "publish: branch main is where artifacts go without it. Remove branch."),
    ("private: true", "branch: '{tarket}'", "publish: branch has '{tarket}', which nothing fills in. Did you mean 'ta"),
    ("private: true", f"collection: {'a' * 121}", "is not a title. Write one line of at most 120 characters."),
    ("private: true", "replace: yes", "publish: replace 'yes' is not true or false. Write true, without quotes."),
    ("hub: folder:out/hub, repo: \"{name}/{model}-{target}\"", "hub: hf, pull_request: true, branch: q4", "publish: b"),
    ("hub: folder:out/hub, repo: \"{name}/{model}-{target}\"", "hub: hf, repo: \"Org/{model}\"", "its source 'hub:org"),
    ("private: true", "private: on", "publish: private 'on' is not true or false. Write true, without quotes."),
]
# fmt: on


@pytest.mark.parametrize(
    ("old", "new", "expected"), CASES, ids=[f"{index}-{case[1]}" for index, case in enumerate(CASES)]
)
def test_a_mistake_is_found_placed_and_explained(folder: Path, old: str, new: str, expected: str) -> None:
    text = changed(old, new)
    found = problems(folder, text)
    assert any(expected in line for line in found), found


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(folder: Path) -> None:
    wrong = [case for case in CASES if case[0] in ("name: small", "embed: F16", "damping: 1e-2", "private: true")]
    text = GOOD
    for old, new, _ in {case[0]: case for case in wrong}.values():
        text = changed(old, new, text)
    found = problems(folder, text)
    assert [int(line.split(":")[1]) for line in found] == [1, 9, 15, 18]


def test_a_problem_of_a_target_is_said_once_and_not_for_every_override(folder: Path) -> None:
    assert len(problems(folder, changed("scheme: INT8", "scheme: INT8, observer: best"))) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "m.yaml:1:1: the manifest is empty. "),
        ("# nothing\n", "m.yaml:1:1: the manifest is empty. "),
        ("- a\n", "m.yaml:1:1: the file does not hold keys and values. "),
        ("name: a\n\tmodels: b", "m.yaml:2:1: a tab stands where YAML wants spaces. "),
        (b"name: gr\xfc\xdfe", "m.yaml:1:9: the text is not UTF-8. "),
        ("name: a\n---\nname: b\n", "m.yaml:2:1: a second document starts. "),
        ("name: !!python/object/apply:os.system [ls]", "m.yaml:1:7: the tag 'tag:yaml.org,2002:python/object/apply:o"),
        ("name: !x y", "m.yaml:1:7: the tag '!x' is not allowed. "),
        ("name: &a [*a]", "m.yaml:1:11: alias 'a' has no finished anchor before it. "),
        ("name: " + "[" * 2000, "nested more than 20 deep. "),
        ("{" * 2000, "m.yaml:1:22: lists and mappings are nested more than 20 deep. "),
        ("name: [a", "m.yaml:1:9: this is not valid YAML: "),
        ('name: "\\UFFFFFFFF"', "m.yaml:1:1: this or the next value is not valid YAML: "),
        ('name: "a\\0b"', "m.yaml:1:7: name 'a\\x00b' is too long or not printable. "),
        ('name: "\\uD800"', "m.yaml:1:7: name '\\ud800' is too long or not printable. "),
        ("name: a\x07b", "m.yaml:1:8: the character '\\x07' is not allowed. "),
        ("name: a\nmodels: []\ntargets: {}", "m.yaml:3:10: targets is empty. "),
        ("name: a\nmodels: []\ntargets: {}", "m.yaml:2:9: models wants a list here. "),
        ("name: a", "m.yaml:1:1: models is missing. Add models:."),
        ("? [a]\n: b", "m.yaml:1:3: a list or mapping stands where a key is wanted. "),
        ("#" * (1 << 20) + "\n", "m.yaml:1:1: the file is larger than 1 MiB. "),
    ],
)
def test_what_is_not_a_manifest_is_refused(folder: Path, content: str | bytes, expected: str) -> None:
    found = problems(folder, content)
    assert any(expected in line for line in found), found


def test_an_alias_bomb_is_refused_before_it_grows(folder: Path) -> None:
    rows = ["a0: &a0 [" + ",".join("x" * 10) + "]"]
    rows += [f"a{n}: &a{n} [" + ",".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 10)]
    assert "values once aliases are followed" in problems(folder, "\n".join(rows))[0]


@pytest.mark.parametrize("name", ["nothing.yaml", "model"])
def test_a_path_that_is_not_a_file_is_one_clear_line(folder: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=r":1:1: (there is no such file|this is a folder)\. "):
        load(folder / name)


# No input, however mutilated, gives anything but a manifest or problems with their places.

YAML = ["no", "~", "1e3", "010", "[", "]", "{", "}", ":", "- ", "&a ", "*a", "<<: *a", "!!str ", "\t", "\n", '"', "'"]
ODD = ["#", "|", "folder:", "hub:", "@", "0", "-1", "9" * 30, "\\U00110000", "\\0", "é", "\u2028", "%YAML 1.1", ".."]
OURS = ["gguf", "parquet", "null", "targets: ", "add: ", "remove: ", "rules: ", "name: ", "format: ", "{model}"]
WORDS = st.sampled_from([*YAML, *ODD, *OURS, *TRANSFORMS, *ROUNDERS])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_gives_only_problems_with_places(folder: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([GOOD, QUICKSTART]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.one_of(WORDS, st.text(max_size=4))) + text[end:]
    try:
        manifest = read(folder, text.encode("utf-8", "surrogatepass"))
    except ManifestError as error:
        assert error.problems
        assert all(LINE.fullmatch(line) for line in error.problems), error.problems
    else:
        assert manifest.jobs()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(allow_nan=True), WORDS, st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_field_gives_only_problems_with_places(folder: Path, data: st.DataObject) -> None:
    document = yaml.safe_load(GOOD)
    places = [(document, key) for key in document] + [(document["models"][1], key) for key in keys_of(Manifest)]
    for part in [*document["targets"].values(), *document["models"], document["calibration"], document["publish"]]:
        places += [(part, key) for key in [*part, *keys_of(Target)]]
    part, key = data.draw(st.sampled_from(places))
    part[key] = data.draw(VALUES)
    try:
        read(folder, yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))
    except ManifestError as error:
        assert error.problems
        assert all(LINE.fullmatch(line) for line in error.problems), error.problems


def test_a_key_of_several_lines_is_told_in_one(folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"metadata 'a\\nb' is empty"):
        read(folder, changed("type: Q8_0", 'type: Q8_0, metadata: {"a\\nb": }'))


# The schema for editors and the documentation.


def test_the_schema_in_the_repository_is_up_to_date() -> None:
    written = (ROOT / "manifests" / "schema.json").read_text(encoding="utf-8")
    assert written == json_schema(), "write converter.manifest.json_schema() to manifests/schema.json"


@pytest.mark.parametrize("part", [Manifest, Target, Calibration, Evaluation, Publish])
def test_the_keys_that_are_read_are_those_of_the_schema(part: type[BaseModel]) -> None:
    assert keys_of(part) == tuple(part.model_json_schema()["properties"])


def test_the_schema_accepts_good_manifests_and_refuses_mistakes() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in (GOOD, QUICKSTART):
        jsonschema.validate(yaml.safe_load(text.replace("1e-2", "0.01")), schema)
    nulls = changed("group_size: 64", "group_size: null, observer: null").replace("1e-2", "0.01")
    jsonschema.validate(yaml.safe_load(nulls), schema)
    for old, new in [
        ("scheme: INT8", "scheme: W8A8"),
        ("scheme: INT8", "type: INT8"),
        ("type: Q8_0, ", ""),
        ("format: gguf", "format: onnx"),
        ("damping: 1e-2", "dampening: 0.01"),
        ("group_size: 64", "group_sise: 64"),
        ("length: 64}\neval", "length: 8}\neval"),
        ("[smoothquant, gptq]", "[smothquant, gptq]"),
    ]:
        text = changed(old, new).replace("1e-2", "0.01")
        assert list(jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(text))), f"{new} must be refused"


def test_formats_of_the_fields_are_those_of_the_table() -> None:
    assert get_args(Target.model_fields["format"].annotation) == tuple(STORES)


def test_the_documentation_names_every_key_and_value_and_its_example_loads(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    schema = json.loads(json_schema())
    keys = set(schema["properties"]).union(*(part["properties"] for part in schema["$defs"].values()))
    assert not {key for key in keys if f"`{key}`" not in text}
    assert not {name for names in (*STORES.values(), TRANSFORMS, ROUNDERS) for name in names if name not in text}
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    manifest = read(tmp_path, text.partition("```yaml\n")[2].partition("```")[0])
    assert all(f"`{job.key}`" in text for job in manifest.jobs()) and len(manifest.jobs()) == 4
