"""Folders as models: the digest that stands for a commit, links, and names of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converter import folder as folder_module
from converter.errors import SourceError
from converter.folder import check_path
from converter.source import open_folder

WEIGHTS = {"b.weight": torch.arange(12.0).reshape(3, 4).bfloat16(), "a.bias": torch.tensor([1.0, 2.0])}


def test_commit_of_a_folder_follows_every_byte_and_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    commits = [open_folder(tmp_path, "test").commit, open_folder(tmp_path, "test").commit]
    assert commits[0] == commits[1] and len(commits[0]) == 40
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x").write_text("hidden")
    assert open_folder(tmp_path, "test").commit == commits[0]
    (tmp_path / "config.json").write_text("{ }")
    commits.append(open_folder(tmp_path, "test").commit)
    (tmp_path / "config.json").rename(tmp_path / "conf.json")
    commits.append(open_folder(tmp_path, "test").commit)
    assert len(set(commits)) == 3


def test_commit_of_a_large_file_follows_header_samples_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "WHOLE_LIMIT_BYTES", 1000)
    monkeypatch.setattr(folder_module, "SAMPLE_BYTES", 16)
    save_file({"w": torch.zeros(4096)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    first = open_folder(tmp_path, "test").commit
    assert open_folder(tmp_path, "test").commit == first
    data = bytearray(path.read_bytes())
    data[-1] = 63  # inside the last sample
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = open_folder(tmp_path, "test").commit
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert len({first, second, open_folder(tmp_path, "test").commit}) == 3


def test_links_are_followed_inside_and_refused_outside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file(WEIGHTS, folder / "sub" / "real.safetensors")
    (folder / "model.safetensors").symlink_to("sub/real.safetensors")
    assert open_folder(folder, "test").read("a.bias").tolist() == [1.0, 2.0]
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(SourceError, match=r"'tokenizer\.json' is a link to a place outside"):
        open_folder(folder, "test")
    (folder / "tokenizer.json").unlink()
    (folder / "more").symlink_to("..")
    with pytest.raises(SourceError, match="'more' is a link to a place outside"):
        open_folder(folder, "test")


def test_snapshot_folder_of_a_hugging_face_cache_is_a_model(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / ("0" * 40)
    for folder in (snapshot, model / "blobs", tmp_path / "blobs"):
        folder.mkdir(parents=True)
    save_file(WEIGHTS, tmp_path / "blobs" / "shared")
    (model / "blobs" / "abc").symlink_to("../../blobs/shared")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert open_folder(snapshot, "test").read("a.bias").tolist() == [1.0, 2.0]
    (model / "blobs" / "abc").unlink()
    with pytest.raises(SourceError, match="a link to nothing"):
        open_folder(snapshot, "test")


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a\\b", "a\0", "C:a", ".", "a//b", "a/", "./a", "a\nb"])
def test_unsafe_file_names_are_refused(path: str) -> None:
    with pytest.raises(SourceError, match="could lead out"):
        check_path(path, "test")


@pytest.mark.parametrize("path", ["a", "a/b.json", "a..b", "模型.safetensors", "with space", "model:1"])
def test_odd_but_safe_file_names_pass(path: str) -> None:
    check_path(path, "test")
