"""Words of strangers are shown and do nothing: in the report, in a card, on a terminal."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from command import Command, hubmill
from converter import progress
from converter.compare import card
from converter.compare.report import report_html
from converter.containers.gguf import header
from converter.progress import Bars, Event, JsonLines, print_error, print_json, print_line, print_table
from measured_rows import Page, comparison_of, row_of, rows
from test_card import BODY_TAGS, body_of, front_of, made
from test_report import blocks_of, tensors_of

__all__ = ["hubmill"]  # a fixture

# What each would do where it is taken at its word.
WORDS: Mapping[str, str] = {
    "script": "<script>alert(1)</script>",
    "end of a script": "</script><script>alert(1)</script>",
    "end of a style": "</style><img src=x onerror=alert(1)>",
    "end of a comment": "--><svg onload=alert(1)>",
    "end of an attribute": '" onmouseover="alert(1)',
    "end of another attribute": "' onfocus='alert(1)' autofocus='",
    "entity": "&lt;b&gt;&#x3C;script&#x3E;alert(1)&#x3C;/script&#x3E;",
    "template": "{{ 7 * 7 }}{% raw %}{# #}",
    "link": "[click](javascript:alert(1))",
    "picture": "![x](https://evil.example/pixel.png)",
    "address in brackets": "<https://evil.example>",
    "bare address": "https://evil.example/x",
    "bare host": "www.evil.example",
    "reference": '[x]: https://evil.example "t"',
    "code": "`` ` ``` x",
    "cell": "a | b \\| c",
    "heading": "# x\n## y",
    "underline": "x\n===",
    "rule": "\n---\nlicense: evil\n---\n",
    "key": "x\nlicense: evil",
    "yaml": "!!python/object/apply:os.system [id]",
    "quotes": '"\'\\" : { [ # &a *a',
    "line separator": "a\u2028license: evil\u0085b: c",
    "right to left": "\u202etxt.exe\u2066",
    "colours": "\x1b[31mred\x1b[0m",
    "title of the window": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x1b\\\\",
    "controls of eight bits": "\x9b2J\x9d0;owned\x9c",
    "bell and back": "pass\x08\x08\x08\x08fail\x07\r",
    "markup": "[bold red]x[/bold red][link=https://evil.example]y[/link]",
    "end of markup": "x[/] [/bold] \\[x]\\",
    "emoji": ":pile_of_poo:",
    "half a character": "a\ud800b",
}
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SGR = re.compile(r"\x1b\[[0-9;?]*[mKAHJhl]")  # colours and moves, which rich itself makes of what it shows


def visible(words: str) -> str:
    return " ".join("".join(mark if mark.isprintable() else " " for mark in words).split())


@pytest.mark.parametrize("kind", WORDS)
def test_a_report_shows_words_and_obeys_none(kind: str) -> None:
    words = WORDS[kind]
    artifacts = [row | {"model": words} for row in rows()]
    artifacts[0] |= {"target": words, "scheme": words, "method": [words], "notes": {words: words}, "warnings": [words]}
    artifacts[-1] |= {"error": words, "format": words}
    done = tuple(row["target"] for row in artifacts if row["status"] == "done")
    tensors = [tensor | {"name": words, "type": words, "note": words} for tensor in tensors_of(words, done)]
    found = comparison_of(artifacts, words) | {"name": words}
    found["sources"][0] |= {"repo": words, "commit": words}
    found["texts"]["evaluation"]["text"] = f"hub:{words}"
    text = report_html(found, tensors, blocks_of(words, done))
    page, plain = Page(text), Page(report_html(comparison_of(rows()), [], {}))
    assert len(page.scripts) == len(plain.scripts) == 1 and page.scripts == plain.scripts
    assert page.crossed == [] and page.open == []
    assert page.tags.isdisjoint({"img", "iframe", "object", "embed", "base", "form", "link", "b"})
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert page.attributes("src") == []
    assert visible(words)[:20] in page.text
    text.encode("utf-8")


@pytest.mark.parametrize("kind", WORDS)
def test_a_card_shows_words_and_obeys_none(kind: str, tmp_path: Path) -> None:
    words = WORDS[kind]
    row = row_of("q", "gguf", "Q8_0", 8.5, 0.1, model=words, notes={words: words}, warnings=[words])
    row["files"] = [{"path": f"{words}.gguf", "bytes": 5, "sha256": "ab" * 32}]
    quoted = json.dumps(words.replace("\ud800", "?"))
    readme = f"---\nlicense: {quoted}\nlicense_name: {quoted}\nlanguage: [{quoted}]\ntags: [{quoted}, ok]\n---\n"
    text = made(tmp_path, row, readme=readme, source=f"hub:{words}", repo=words, commit=words)
    front = front_of(text)
    allowed = {"model_name", "base_model_relation", "library_name", "tags", "quantized_by", "license_name", "license"}
    assert set(front) <= {*allowed, "language"}, front
    assert front.get("license") != "evil" and front["tags"][-1] == "ok"
    page = body_of(text)
    assert page.tags <= BODY_TAGS
    assert len([tag for tag, _ in page.elements if tag in ("h1", "h2")]) == 7
    assert page.attributes("href") == [] and page.attributes("src") == []
    assert visible(words)[:20] in page.text


@pytest.mark.parametrize("kind", WORDS)
def test_plain_text_shows_every_word_and_gives_no_address_to_link(kind: str) -> None:
    text = card.plain(WORDS[kind])
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))
    assert page.tags <= {"p"} and page.text == visible(WORDS[kind])
    assert not re.search(r"https?://|www\.", text), "GitHub's dialect makes a link of a bare address"


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_nothing_by_words(
    kind: str, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = WORDS[kind]
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=400, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda **settings: console)
    print_table(words, [words, "b"], [[words, words]])
    bars = Bars(console)
    for state in ("start", "failed", "note"):
        bars.show(Event(task=words, subject=words, state=state, title=words, note=words, fraction=0.5))  # type: ignore[arg-type]
    bars.close()
    print_line(words)
    print_error(words)
    JsonLines().show(Event(task=words, subject=words, state="note", note=words))
    print_json({words: words})
    captured = capsys.readouterr()
    for text in (SGR.sub("", file.getvalue()), captured.out, captured.err):
        assert not OBEYED.search(text.replace("\r", "") if terminal else text), repr(text)
    assert "\x1b]" not in file.getvalue(), "nor a link"
    if kind in ("markup", "end of markup", "emoji", "link"):
        assert file.getvalue().count(words) >= 4, "what looks like markup is shown as it is"
    lines = captured.out.rstrip("\n").split("\n")
    assert json.loads("\n".join(lines[-3:])) == {words: words}, "and JSON says exactly what it was"


def test_a_plan_of_a_hostile_model_says_nothing_to_the_terminal(tmp_path: Path, hubmill: Command) -> None:
    names = [f"blk.0.{words}.weight" for kind, words in WORDS.items() if kind != "half a character"]
    placed = header.place([(name, (32, 32), "F32") for name in names])
    fields = {
        "general.architecture": header.string(WORDS["colours"]),
        "general.name": header.string(WORDS["clipboard"]),
    }
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.gguf").write_bytes(header.compose(fields, placed) + bytes(header.file_size(b"", placed)))
    (model / "README.md").write_text(f"---\nlicense: {json.dumps(WORDS['title of the window'])}\n---\n")
    manifest = tmp_path / "m.yaml"
    manifest.write_text("name: m\nmodels: [{source: folder:model}]\ntargets: {q: {format: gguf, type: Q8_0}}\n")
    for arguments in (("plan", model), ("plan", manifest), ("plan", manifest, "--json")):
        answer = hubmill(*arguments, *(() if arguments[1] == model else ("--out", tmp_path / "out")))
        assert not OBEYED.search(answer.output + answer.errors), arguments
