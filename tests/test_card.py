"""The model card: what it inherits, what it says, and that names from strangers stay names."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from converter.compare import card
from converter.compare.card import card_text
from converter.containers.parquet import Parquet
from converter.manifest import Calibration, Evaluation, Rule, Target
from converter.schemes import METHODS, SCHEMES, STORES, TRANSFORMS
from converter.source import Snapshot, open_folder
from measured_rows import HOSTILE, Page, row_of
from tiny_models import round_to_nearest, write_state_dict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
license: apache-2.0
language: [en, no]
tags: [tiny]
pipeline_tag: text-generation
---
# small
"""
BOMB = "a: &a [x, x, x, x]\n" + "".join(f"k{n}: [*a,*a,*a,*a,*a]\n" for n in range(2400))  # 58 kB, 60,000 values
BODY_TAGS = {"h1", "h2", "p", "a", "code", "pre", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def snapshot_of(folder: Path, readme: str | None = README, source: str = "hub:org/small", **changes: Any) -> Snapshot:
    if readme is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    fields: dict[str, Any] = {
        "source": source,
        "repo": source.rpartition(":")[2],
        "commit": COMMIT,
        "config": {},
        "tensors": {},
        "files": {"README.md": 1},
        "folder": folder,
    }
    return Snapshot(**(fields | changes))


def target_of(format: str, scheme: str, **fields: Any) -> Target:
    key = "scheme" if format in SCHEMES else "type"
    return Target(name="t", format=format, **{key: scheme}, **fields).with_defaults()


def made(
    folder: Path,
    row: Mapping[str, Any] | None = None,
    repo: str = "me/small-q8",
    readme: str | None = README,
    **changes: Any,
) -> str:
    row = row or row_of("q8-0", "gguf", "Q8_0", 8.5, 0.001)
    target = target_of(row["format"], row["scheme"], methods=tuple(row["method"]))
    return card_text(row, snapshot_of(folder, readme, **changes), target, repo, Calibration(), Evaluation())


def front_of(text: str) -> dict[str, Any]:
    """The front matter as a YAML reader sees it: from the first line to the next line of three dashes."""
    assert text.startswith("---\n")
    found = yaml.safe_load(text[4 : text.index("\n---\n", 4)])
    assert isinstance(found, dict)
    return found


def body_of(text: str) -> Page:
    """The body as a Markdown reader with raw HTML allowed, as hubs have it, would render it."""
    markdown = text[text.index("\n---\n", 4) + 5 :]
    return Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def test_hub_learns_what_it_is_made_of_and_under_which_licence(tmp_path: Path) -> None:
    assert front_of(made(tmp_path)) == {
        "base_model": "org/small",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "no"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "quantized", "q8_0", "tiny"],
        "quantized_by": "hubmill",
    }


def test_model_in_a_folder_names_no_base_model_and_no_folder(tmp_path: Path) -> None:
    text = made(tmp_path, source=f"folder:{tmp_path}/small", repo="small-q8")
    front = front_of(text)
    assert "base_model" not in front
    assert (front["model_name"], front["base_model_relation"]) == ("small", "quantized")
    assert str(tmp_path) not in text


@pytest.mark.parametrize("format", STORES)
def test_every_format_has_its_tag_and_a_way_to_load_it(format: str, tmp_path: Path) -> None:
    text = made(tmp_path, row_of("t", format, STORES[format][-1], 8.0, 0.1))
    assert front_of(text)["tags"][:2] == [format, "quantized"]
    snippets = re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)
    assert snippets
    assert any("me/small-q8" in snippet or "model.parquet" in snippet for snippet in snippets)


@pytest.mark.parametrize(("format", "said"), [("gguf", "--revision gguf/q8"), ("gptq", 'revision="gguf/q8"')])
def test_artifact_on_a_branch_is_loaded_from_there(format: str, said: str, tmp_path: Path) -> None:
    row = row_of("t", format, STORES[format][-1], 8.0, 0.1)
    assert said in made(tmp_path, row, repo="me/small@gguf/q8")
    assert "revision" not in made(tmp_path, row, repo="me/small")


def test_every_method_is_explained() -> None:
    assert set(card.METHODS) == {name for names in METHODS.values() for name in names}
    assert set(card.LOADING) == set(STORES)


def test_card_says_original_and_artifact_side_by_side(tmp_path: Path) -> None:
    cells = body_of(made(tmp_path)).text
    for pair in ("16.0 MB 8.50 MB", "16.0 8.50", "20.0 20.0 (+0.10 %)", "0 0.00100", "0 0.00900", "100.0 % 99.9 %"):
        assert pair in cells
    assert "4,080 predicted tokens" in cells and "1.88×" in cells and COMMIT in cells


def test_model_that_could_not_be_run_gets_a_card_without_its_outputs(tmp_path: Path) -> None:
    row = row_of("int8", "parquet", "INT8", 8.1, None)
    del row["source"]["perplexity"], row["source"]["tokens"]
    text = body_of(made(tmp_path, row)).text
    assert "could not be run" in text and "cosine of the weights" in text and "perplexity" not in text


def test_settings_of_the_method_are_told(tmp_path: Path) -> None:
    row = row_of("w8", "compressed-tensors", "W4A16", 4.5, 0.1, method=["smoothquant", "gptq"])
    rules = (Rule(pattern="lm_head|embed", type="BF16"),)
    target = target_of("compressed-tensors", "W4A16", methods=("smoothquant", "gptq")).model_copy(
        update={"rules": rules}
    )
    calibration = Calibration(text="file:/home/someone/prose.txt", sequences=64, length=128)
    text = card_text(row, snapshot_of(tmp_path), target, "", calibration)
    said = body_of(text).text
    for words in ("SmoothQuant", "GPTQ", "group of 128 input columns", "lm_head|embed as BF16", "prose.txt"):
        assert words in said
    assert "64 rows of 128 tokens" in said and "someone" not in text


def test_what_made_a_gguf_file_is_told(tmp_path: Path) -> None:
    row = row_of("q4", "gguf", "Q4_K_M", 4.5, 0.1)
    target = target_of(
        "gguf", "Q4_K_M", search="thorough", imatrix="/far/away/mine.gguf", output_type="Q8_0", embedding_type="Q5_K"
    )
    said = body_of(card_text(row, snapshot_of(tmp_path), target, "", Calibration())).text
    for words in ("thorough", "mine.gguf", "output head: Q8_0", "embedding: Q5_K"):
        assert words in said
    assert "far/away" not in said and "calibration:" not in said, "nothing was calibrated"


def test_plain_rounding_claims_no_calibration(tmp_path: Path) -> None:
    assert "- calibration" not in made(tmp_path)
    assert "smoothquant" in TRANSFORMS


def test_all_checksums_but_the_cards_own_are_listed(tmp_path: Path) -> None:
    files = [{"path": name, "bytes": 5, "sha256": "cd" * 32} for name in ("a|b.gguf", "c`d.json", "README.md")]
    page = body_of(made(tmp_path, row_of("q", "gguf", "Q8_0", 8.5, 0.1, files=files)))
    assert page.text.count("cd" * 32) == 2
    assert "a|b.gguf 5 cd" in page.text and "c`d.json 5 cd" in page.text


def test_what_was_not_as_asked_is_listed_by_reason(tmp_path: Path) -> None:
    notes = {f"layers.{block}.up": "row length 100: Q8_0 in place of Q4_K" for block in range(12)}
    text = body_of(made(tmp_path, row_of("q", "gguf", "Q4_K_M", 5.0, 0.1, notes=notes))).text
    assert "Not as asked" in text
    assert "row length 100: Q8_0 in place of Q4_K: layers.0.up" in text and "and 4 more" in text


def test_what_readers_do_otherwise_is_told_once_for_the_artifact(tmp_path: Path) -> None:
    warnings = ["readers let a token see | all", "tokens are left out: <picture>"]
    text = body_of(made(tmp_path, row_of("q", "gguf", "Q8_0", 8.5, 0.1, warnings=warnings))).text
    assert "What readers do otherwise" in text and "see | all." in text and "<picture>." in text
    assert "otherwise" not in body_of(made(tmp_path, row_of("q", "gguf", "Q8_0", 8.5, 0.1))).text


def test_norwegian_stays_norwegian_and_one_language_stays_one(tmp_path: Path) -> None:
    assert front_of(made(tmp_path, readme="---\nlanguage: no\n---\n"))["language"] == "no"


def test_data_sets_of_the_original_are_named(tmp_path: Path) -> None:
    readme = "---\ndatasets: [org/one, 'C:\\x', [a], org/two]\n---\n"
    assert front_of(made(tmp_path, readme=readme))["datasets"] == ["org/one", "org/two"]


def test_licence_text_is_found_from_the_artifact(tmp_path: Path) -> None:
    readme = "---\nlicense: other\nlicense_name: mine-1\nlicense_link: LICENSE\n---\n"
    files = {"README.md": 1, "LICENSE": 9}
    away = front_of(made(tmp_path, readme=readme, files=files))
    assert away["license_link"] == f"https://huggingface.co/org/small/blob/{COMMIT}/LICENSE"
    assert (away["license"], away["license_name"]) == ("other", "mine-1")
    travelled = [{"path": "LICENSE", "bytes": 9, "sha256": "ab" * 32}]
    here = made(tmp_path, row_of("i", "parquet", "INT8", 8.0, 0.1, files=travelled), readme=readme, files=files)
    assert front_of(here)["license_link"] == "LICENSE"
    script = readme.replace("LICENSE", "javascript:alert(1)")
    assert "license_link" not in front_of(made(tmp_path, readme=script))


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        (None, "names no licence"),
        ("# only a title\n", "names no licence"),
        ("---\nlicense: Ask me first!\n---\n", "Ask me first!"),
        ("---\nlicense: [apache-2.0\n---\n", "could not be read"),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", "could not be read"),
        (f"---\n{BOMB}---\n", "could not be read"),
        (f"---\nlicense: mit\n{'#' * 70_000}\n---\n", "could not be read"),
    ],
)
def test_front_matter_that_does_not_help_is_said_to_be_so(readme: str | None, said: str, tmp_path: Path) -> None:
    text = made(tmp_path, readme=readme)
    assert said in body_of(text).text
    assert "license" not in front_of(text)


def test_hostile_words_reach_neither_front_matter_nor_page(tmp_path: Path) -> None:
    readme = yaml.safe_dump(
        {
            "license": HOSTILE,
            "license_name": HOSTILE,
            "license_link": f"https://x/{HOSTILE}",
            "language": [HOSTILE, "en"],
            "tags": [HOSTILE, "ok"],
            "pipeline_tag": HOSTILE,
        }
    )
    row = row_of("q", "gguf", "Q8_0", 8.5, 0.1, model=HOSTILE, notes={HOSTILE: HOSTILE}, method=["rtn", HOSTILE])
    row["files"] = [{"path": f"{HOSTILE}.gguf", "bytes": 5, "sha256": "ab" * 32}]
    snapshot = snapshot_of(tmp_path, f"---\n{readme}---\n", source=f"hub:{HOSTILE}", repo=HOSTILE, commit=HOSTILE)
    text = card_text(row, snapshot, target_of("gguf", "Q8_0"), HOSTILE, Calibration(text="file:<b>x</b>.txt"))
    front = front_of(text)
    assert front["language"] == "en" and front["tags"] == ["gguf", "quantized", "q8_0", "ok"]
    assert not {"license", "license_link", "pipeline_tag", "base_model"} & set(front)
    page = body_of(text)
    assert page.tags <= BODY_TAGS
    assert page.attributes("href") == []
    assert page.text.count("<script>alert(1)</script>") >= 4


WORDS = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    [HOSTILE, "---", "- x", "1. x", "a\n---\nb: c"]
)


@settings(deadline=None, max_examples=60)
@given(name=WORDS, licence=WORDS, note=WORDS, file=WORDS)
def test_no_words_at_all_add_a_key_or_an_element(
    name: str, licence: str, note: str, file: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    readme = "---\n" + yaml.safe_dump({"license_name": licence}, allow_unicode=True) + "---\n"
    row = row_of("q", "gguf", "Q8_0", 8.5, 0.1, model=name, notes={file: note})
    row["files"] = [{"path": f"{file}.gguf", "bytes": 5, "sha256": "ab" * 32}]
    text = made(folder, row, readme=readme, source=f"folder:{name}")
    allowed = {"model_name", "base_model_relation", "library_name", "tags", "quantized_by", "license_name"}
    assert set(front_of(text)) <= allowed
    page = body_of(text)
    assert page.tags <= BODY_TAGS
    assert len([tag for tag, _ in page.elements if tag in ("h1", "h2")]) == 6
    assert page.attributes("href") == []


@pytest.mark.parametrize("text", ["a_b*c*", "<b>&amp;", "[x](y)", "- x", "12. x", "# x", "`x`", "a|b", "~~x~~", "$x$"])
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(card.plain(text)))
    assert page.text == text
    assert page.tags == {"p"}


def test_python_snippets_are_python_and_shell_names_are_quoted(tmp_path: Path) -> None:
    encoder = [{"path": name, "bytes": 5, "sha256": "ab" * 32} for name in ("modules.json", "model.safetensors")]
    for scheme, files in (("W4A16", []), ("W4A16", encoder), ("W8A8", encoder)):
        text = made(tmp_path, row_of("w", "compressed-tensors", scheme, 4.5, 0.1, files=files))
        assert ("SentenceTransformer(" in text) == bool(files)
        assert ("dequantize=True" in text) == (scheme == "W8A8")
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(snippet)
    files = [{"path": "a b; rm -rf.gguf", "bytes": 5, "sha256": "ab" * 32}]
    (shell,) = re.findall(
        r"```sh\n(.*?)```", made(tmp_path, row_of("q", "gguf", "Q8_0", 8.5, 0.1, files=files)), re.DOTALL
    )
    assert "a b; rm -rf.gguf" in shlex.split(shell)


def test_snippets_for_parquet_run_on_a_real_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state_dict(tmp_path / "model", {"a.weight": torch.randn(16, 32), "b": torch.randn(5)})
    snapshot = open_folder(tmp_path / "model", "test")
    target = target_of("parquet", "INT8")
    plan = Parquet().plan(snapshot, None, target)
    (tmp_path / "out").mkdir()
    Parquet().write(plan, snapshot, None, target, round_to_nearest(plan, snapshot), tmp_path / "out")
    text = made(tmp_path / "readme", row_of("int8", "parquet", "INT8", 8.1, None))
    (query,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    assert duckdb.sql(query).fetchall() == [("a.weight", "int8", 512, 512), ("b", "fp32", 5, 20)]
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["weight"].shape == (16, 32)
