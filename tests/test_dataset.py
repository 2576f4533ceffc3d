"""Text from data sets on a hub, over real HTTP: which files are fetched, what is read, how it fails."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from converter.dataset import AHEAD, Split, documents, pin, read_column
from converter.errors import SourceError
from hub_server import READER, HubServer, hub_server

__all__ = ["hub_server"]  # a fixture

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def parquet(values: Sequence[object], column: str = "text", rows: int = 1000, kind: pa.DataType | None = None) -> bytes:
    """A Parquet file of this column between two others, in row groups of `rows`."""
    table = pa.table(
        {"id": range(len(values)), column: pa.array(values, kind), "url": [f"u{n}" for n in range(len(values))]}
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows)
    return file.getvalue()


def json_lines(*entries: object) -> bytes:
    return "\n".join(json.dumps(entry) for entry in entries).encode()


def chat(messages: list[dict[str, Any]]) -> str:
    return "".join(f"<{one['role']}>{one['content']}" for one in messages)


def words(text: str) -> int:
    return len(text.split())


def read(hub: HubServer, cache: Path, text: str, wanted: int = 1, split: Split = "calibration") -> list[str]:
    return documents(text, split, cache, chat, words, wanted, endpoint=hub.url)


def fetched(hub: HubServer) -> list[str]:
    return [entry.path.rpartition("/")[2] for entry in hub.requests("GET", "/resolve/")]


def test_only_as_many_files_are_fetched_as_hold_the_tokens(hub_server: HubServer, tmp_path: Path) -> None:
    names = [f"data/train-{n:05d}.parquet" for n in range(4)]
    files = {name: parquet([f"{name} {n}" for n in range(10)]) for name in reversed(names)}
    hub_server.add("org/set", files, kind="datasets")
    found = read(hub_server, tmp_path, "hub:org/set@main#text", wanted=21)
    assert found == [f"{name} {n}" for name in names[:2] for n in range(10)]
    assert fetched(hub_server) == ["train-00000.parquet", "train-00001.parquet"]


def test_reading_ends_within_a_file_that_holds_far_more(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("org/set", {"a.parquet": parquet([f"w{n}" for n in range(1000)], rows=7)}, kind="datasets")
    assert read(hub_server, tmp_path, "hub:org/set#text", wanted=50) == [f"w{n}" for n in range(AHEAD * 50)]


def test_a_text_shorter_than_wanted_is_given_whole(hub_server: HubServer, tmp_path: Path) -> None:
    files = {"b.parquet": parquet(["three"]), "a.parquet": parquet(["one", "two"], rows=1)}
    hub_server.add("org/set", files, kind="datasets")
    assert read(hub_server, tmp_path, "hub:org/set#text", wanted=1000) == ["one", "two", "three"]


def test_a_pinned_text_stays_the_same_and_needs_no_hub_once_it_is_there(hub_server: HubServer, tmp_path: Path) -> None:
    commit = hub_server.add("org/set", {"a.parquet": parquet(["old"])}, kind="datasets")
    pinned = pin("hub:org/set@main#text", tmp_path, "test", endpoint=hub_server.url)
    assert pinned == f"hub:org/set@{commit}#text"
    hub_server.add("org/set", {"a.parquet": parquet(["new"])}, kind="datasets")
    assert read(hub_server, tmp_path, "hub:org/set@main#text") == ["new"]
    assert read(hub_server, tmp_path, pinned) == ["old"]
    asked = len(hub_server.log)
    assert read(hub_server, tmp_path, pinned) == ["old"]
    assert pin(pinned, tmp_path, "test", endpoint=hub_server.url) == pinned
    assert len(hub_server.log) == asked


def test_a_damaged_listing_is_asked_for_again(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("org/set", {"a.parquet": parquet(["text"])}, kind="datasets")
    pinned = pin("hub:org/set@main#text", tmp_path, "test", endpoint=hub_server.url)
    for damage in ("", "[]", '{"sizes": {}}'):
        next(tmp_path.rglob(".listing.json")).write_text(damage)
        assert read(hub_server, tmp_path, pinned) == ["text"]


def test_what_is_no_data_set_is_not_pinned(tmp_path: Path) -> None:
    for text in ("builtin", "file:/text.txt"):
        assert pin(text, tmp_path, "test", endpoint="http://127.0.0.1:9") == text


@pytest.mark.parametrize(
    ("names", "calibration", "evaluation"),
    [
        (["data/test-0.parquet", "data/train-0.parquet", "data/validation-0.parquet"], "data/train", "data/test"),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "default/train", "default/validation"),
        (["train_sft.parquet", "test_sft.parquet", "contest.parquet"], "train_sft", "test_sft"),
        (["0000.parquet", "latest.parquet"], "0000", "0000"),
    ],
)
def test_each_use_reads_its_own_split(
    hub_server: HubServer, tmp_path: Path, names: list[str], calibration: str, evaluation: str
) -> None:
    hub_server.add("org/set", {name: parquet([name]) for name in names}, kind="datasets")
    splits: tuple[tuple[Split, str], ...] = (("calibration", calibration), ("evaluation", evaluation))
    for split, expected in splits:
        first, *rest = read(hub_server, tmp_path, "hub:org/set", wanted=1, split=split)
        assert (first.startswith(expected), rest) == (True, [])


def test_every_kind_of_text_column_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path.write_bytes(parquet(["one", None, " \n", "two\u2028"], kind=kind))
        assert list(read_column(path, "text", chat, "a")) == ["one", "two\u2028"]


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    def template(messages: list[dict[str, Any]]) -> str:
        assert all(None not in message.values() for message in messages), "a template tests whether a field is there"
        return chat(messages)

    talks = [TALK, [], None, [TALK[0] | {"name": "Ada"}]]
    (tmp_path / "a.parquet").write_bytes(parquet(talks, column="messages"))
    (tmp_path / "a.jsonl").write_bytes(json_lines(*({"messages": talk} for talk in talks)))
    for name in ("a.parquet", "a.jsonl"):
        found = list(read_column(tmp_path / name, "messages", template, "a"))
        assert found == ["<user>hi<assistant>hello", "<user>hi"]


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    def template(messages: list[dict[str, Any]]) -> str:
        raise ValueError("roles must alternate")

    (tmp_path / "a.parquet").write_bytes(parquet([[], TALK], column="messages"))
    with pytest.raises(SourceError, match=r"a row 2: the chat template refuses .*roles must alternate"):
        list(read_column(tmp_path / "a.parquet", "messages", template, "a"))


def test_json_lines_are_read_plain_and_packed(hub_server: HubServer, tmp_path: Path) -> None:
    lines = json_lines({"text": "one", "n": 1}, {"n": 2}, {"text": None}) + b"\n\n" + json_lines({"text": "two"})
    files = {"a.jsonl": lines, "b.json.gz": gzip.compress(lines), "c.JSONL.gz": gzip.compress(lines), "info.json": b"{"}
    hub_server.add("org/set", files, kind="datasets")
    assert read(hub_server, tmp_path, "hub:org/set#text", wanted=100) == ["one", "two"] * 3


def test_parquet_is_preferred_to_other_files_of_the_same_rows(hub_server: HubServer, tmp_path: Path) -> None:
    files = {"a.jsonl": json_lines({"text": "lines"}), "b.parquet": parquet(["columns"]), "README.md": b"# set"}
    hub_server.add("org/set", files, kind="datasets")
    assert read(hub_server, tmp_path, "hub:org/set#text", wanted=100) == ["columns"]


def test_a_missing_column_is_told_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(["x"], column="content"))
    (tmp_path / "a.jsonl").write_bytes(json_lines({"id": 1, "content": "x"}))
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(SourceError, match=r"no column 'contents'; there is .*content.*Did you mean #content\?"):
            list(read_column(tmp_path / name, "contents", chat, "a"))
    with pytest.raises(SourceError, match=r"no column 'text'; there is content, url\. Name one of them after the #"):
        list(read_column(tmp_path / "a.parquet", "text", chat, "a"))


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.parquet", parquet([1, 2]), "holds 'int64', and strings, or lists of messages"),
        ("a.parquet", parquet([["a"], ["b"]]), "holds 'list<.*string>', and strings"),
        ("a.parquet", parquet([[{"from": "human", "value": "hi"}]]), "holds 'list<.*struct<from.*, and strings"),
        ("a.parquet", parquet(["x"])[:-20], "the file cannot be read"),
        ("a.parquet", b"", "the file cannot be read"),
        ("a.parquet", parquet([b"caf\xe9"], kind=pa.binary()), "holds 'binary'"),
        ("a.jsonl", json_lines({"text": "x"}, {"text": 1}), "line 2: the value is of type int"),
        ("a.jsonl", json_lines({"text": [{"role": "user"}]}), "line 1: a message lacks role or content"),
        ("a.jsonl", json_lines({"text": [1]}), "line 1: a message lacks role or content"),
        ("a.jsonl", json_lines({"text": "x"}) + b"\n{", "line 2 is not JSON"),
        ("a.jsonl", b'{"text": ' + 100_000 * b"[", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "line 1 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("a.jsonl", json_lines({"text": "\ud800"}), "line 1: the text is not Unicode"),
        ("a.jsonl.gz", gzip.compress(1000 * json_lines({"text": "x"}), mtime=0)[:-12], "the file cannot be read"),
        ("a.jsonl.gz", b"no gzip", "the file cannot be read"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=f"^set: {name}.*{what}"):
        list(read_column(tmp_path / name, "text", chat, f"set: {name}"))


def test_data_sets_that_cannot_be_read_say_why(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("org/files", {"README.md": b"# no data", "a.csv": b"a"}, kind="datasets")
    hub_server.add("org/empty", {"a.parquet": parquet([" ", None])}, kind="datasets")
    hub_server.add("org/model", {"config.json": b"{}"})
    hub_server.add("org/gated", {"a.parquet": parquet(["x"])}, kind="datasets", gated=True)
    hub_server.add("org/up", {"x/../../a.parquet": parquet(["x"])}, kind="datasets")
    for text, what in (
        ("hub:org/files@main#c", r"no file that ends in .parquet, .*Try .*hub:org/files@refs/convert/parquet#c"),
        ("hub:org/empty@main#text", "there is no text in column 'text'"),
        ("hub:org/model@main#text", "shows no datasets/org/model"),
        ("hub:org/files@v9#text", "datasets/org/files has no such revision"),
        ("hub:org/up@main#text", "could lead out"),
    ):
        with pytest.raises(SourceError, match=rf"^calibration text org/.*{what}"):
            read(hub_server, tmp_path, text)
    with pytest.raises(SourceError, match=rf"Accept its terms at {hub_server.url}/datasets/org/gated"):
        documents("hub:org/gated", "calibration", tmp_path, chat, words, 1, endpoint=hub_server.url, token=READER)


def test_a_file_that_was_cut_is_read_whole(hub_server: HubServer, tmp_path: Path) -> None:
    data = parquet([f"{n:09d}" for n in range(20_000)])
    hub_server.add("org/set", {"a.parquet": data}, kind="datasets")
    hub_server.fail("GET", r"/resolve/", cut_after=len(data) // 2)
    assert len(read(hub_server, tmp_path, "hub:org/set#text", wanted=20_000)) == 20_000
