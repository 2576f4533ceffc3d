"""The hub that is a folder: what it shows at each moment, and what it never touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.errors import PublishError
from converter.publish import Destination, FolderHub
from hub_server import artifact, contents


def to(repo: str) -> Destination:
    return Destination(hub="folder:hub", repo=repo, kind="model")


@pytest.mark.parametrize("repo", ["../out", "/abs", ".commits/x", "a/../b", "a/.hidden"])
def test_folder_hub_keeps_to_its_folder(tmp_path: Path, repo: str) -> None:
    files = artifact(tmp_path / "artifact", README_dot_md=b"# card")
    with pytest.raises(PublishError):
        FolderHub(root=tmp_path / "hub").publish(to(repo), tmp_path / "artifact", files, "m")
    assert not (tmp_path / "out").exists()


def test_folder_hub_replaces_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    files = artifact(tmp_path / "artifact", README_dot_md=b"# card")
    hub = FolderHub(root=tmp_path / "hub")
    artifact(tmp_path / "hub/model", precious_dot_txt=b"mine")
    with pytest.raises(PublishError, match="is there and is no artifact"):
        hub.publish(to("model"), tmp_path / "artifact", files, "m")
    assert contents(tmp_path / "hub/model") == {"precious.txt": b"mine"}
    hub.publish(to("other"), tmp_path / "artifact", files, "m")
    with pytest.raises(PublishError, match="is there and is no artifact"):
        hub.publish(to("other/inside"), tmp_path / "artifact", files, "m")


def test_folder_hub_shows_the_old_artifact_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FolderHub(root=tmp_path / "hub")
    files = artifact(tmp_path / "old", a_dot_bin=b"old", b_dot_bin=b"old")
    hub.publish(to("model"), tmp_path / "old", files, "m")
    files = artifact(tmp_path / "new", a_dot_bin=b"new", b_dot_bin=b"new")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converter.publish.swap_link", die)
    with pytest.raises(KeyboardInterrupt):
        hub.publish(to("model"), tmp_path / "new", files, "m")
    assert contents(tmp_path / "hub/model") == {"a.bin": b"old", "b.bin": b"old"}
    monkeypatch.undo()
    assert hub.publish(to("model"), tmp_path / "new", files, "m").changed
    assert contents(tmp_path / "hub/model") == {"a.bin": b"new", "b.bin": b"new"}
    assert [path.name for path in (tmp_path / "hub/.incoming").iterdir()] == ["model.lock"]


def test_folder_hub_mends_a_version_that_lost_a_file(tmp_path: Path) -> None:
    hub = FolderHub(root=tmp_path / "hub")
    files = artifact(tmp_path / "artifact", a_dot_bin=b"a", b_dot_bin=b"b")
    hub.publish(to("model"), tmp_path / "artifact", files, "m")
    (tmp_path / "hub/model/a.bin").unlink()
    assert hub.publish(to("model"), tmp_path / "artifact", files, "m").changed
    assert contents(tmp_path / "hub/model") == contents(tmp_path / "artifact")


def test_folder_hub_keeps_one_version_before_the_current(tmp_path: Path) -> None:
    hub = FolderHub(root=tmp_path / "hub")
    for number in range(4):
        files = artifact(tmp_path / "artifact", a_dot_bin=b"%d" % number)
        hub.publish(to("owner/model"), tmp_path / "artifact", files, "m")
    versions = sorted((path / "a.bin").read_bytes() for path in (tmp_path / "hub/.commits/owner%2Fmodel").iterdir())
    assert versions == [b"2", b"3"]


def test_folder_hub_in_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    (problem,) = FolderHub(root=tmp_path / "hub").problems([to("model")])
    assert "cannot be written" in str(problem)
