"""What travels with an artifact: its origin, checksums and signature; and `hubmill verify`, which looks at them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from model_signing import verifying

from command import Command, hubmill
from converter.hub_publish import HuggingFaceHub
from converter.provenance import read_statement
from converter.publish import Destination
from hub_server import WRITER, HubServer, hub_server
from jobs.convert import convert
from jobs.verify import verify
from signed_run import TARGETS, read_run, write_keys, write_signed
from small_run import write_manifest
from test_run import Quiet

__all__ = ["hub_server", "hubmill"]  # fixtures


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a signed run in out/small, published to hub/."""
    folder = tmp_path_factory.mktemp("signed")
    assert convert(write_signed(folder), Quiet()).exit_code == 0
    return folder


def artifact_of(place: Path, target: str = "q8-0") -> Path:
    return place / "out" / "small" / "model" / target


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """An artifact by itself, under another name, as whoever downloaded it has it."""
    return Path(shutil.copytree(artifact_of(place), tmp_path / "elsewhere"))


def found(folder: Path, key: Path | None = None) -> list[str]:
    return verify(str(folder), folder.parent / "out", key).problems


# Provenance


@pytest.mark.parametrize("target", TARGETS)
def test_provenance_is_a_statement_as_in_toto_and_slsa_define_it(place: Path, target: str) -> None:
    """Their own message types take every field, the statement passes their own check."""
    content = json.loads((artifact_of(place, target) / "provenance.json").read_text())
    json_format.ParseDict(content["predicate"], provenance_pb2.Provenance())
    statement = json_format.ParseDict(content, statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    for dependency in content["predicate"]["buildDefinition"]["resolvedDependencies"]:
        assert dependency.keys() & {"uri", "digest", "content"}, "SLSA asks for one of them"


@pytest.mark.parametrize("target", TARGETS)
def test_provenance_is_about_every_other_file_and_says_what_they_were_made_of(place: Path, target: str) -> None:
    folder = artifact_of(place, target)
    content = json.loads((folder / "provenance.json").read_text())
    there = {path.name for path in folder.iterdir()}
    assert {one["name"] for one in content["subject"]} == there - {"provenance.json", "model.sig"}
    definition = content["predicate"]["buildDefinition"]
    made_of = {one["name"]: one["digest"] for one in definition["resolvedDependencies"]}
    assert {"folder:model", "config.json", "model.safetensors", "tokenizer.json", "evaluation rows"} <= set(made_of)
    assert definition["externalParameters"]["target"]["format"] == TARGETS[target].split(": ")[1].split(",")[0]
    versions = content["predicate"]["runDetails"]["builder"]["version"]
    assert {"hubmill", "torch", "numba", "python"} <= set(versions)
    read = read_statement((folder / "provenance.json").read_bytes())
    assert read is not None and read.source == "folder:model" and read.format in str(definition)


def test_provenance_holds_nothing_of_the_machine_or_the_moment(place: Path) -> None:
    """So that the same work gives the same bytes anywhere; that it does, tests/test_run.py compares."""
    text = (artifact_of(place) / "provenance.json").read_text()
    for word in (str(place), socket.gethostname(), "key.pem", "startedOn", "finishedOn", "invocationId"):
        assert word not in text


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 99_999, b'{"predicate": 1}', b"null"])
def test_what_is_no_statement_of_ours_is_none(data: bytes) -> None:
    assert read_statement(data) is None


# Signatures


def test_signature_is_what_the_library_itself_accepts(place: Path) -> None:
    for target in TARGETS:
        folder = artifact_of(place, target)
        config = verifying.Config().use_elliptic_key_verifier(public_key=place / "key.public.pem")
        config.verify(folder, folder / "model.sig")


def test_a_second_run_signs_nothing_anew_and_one_without_sign_leaves_no_signature(tmp_path: Path) -> None:
    targets = {"int8": TARGETS["int8"]}
    convert(write_signed(tmp_path, targets), Quiet())
    signature = artifact_of(tmp_path, "int8") / "model.sig"
    before = signature.read_bytes()
    assert convert(read_run(tmp_path), Quiet()).tasks_run == 0 and signature.read_bytes() == before
    write_manifest(tmp_path, targets, extra="publish: {hub: folder:hub}")
    assert convert(read_run(tmp_path), Quiet()).exit_code == 0 and not signature.exists()
    assert verify(str(tmp_path / "out" / "small"), tmp_path).problems == []


def test_key_is_named_in_no_file_of_the_run(place: Path) -> None:
    secret = (place / "key.pem").read_bytes().splitlines()[1]
    for path in (place / "out").rglob("*"):
        if path.is_file():
            assert b"key.pem" not in path.read_bytes() and secret not in path.read_bytes(), path


# Verification


def test_run_artifact_and_published_artifact_are_whole(place: Path, copy: Path, hubmill: Command) -> None:
    key = place / "key.public.pem"
    for folder in (place / "out" / "small", copy, place / "hub" / "model-int8"):
        answer = hubmill("verify", folder, "--key", key)
        assert answer.code == 0 and "every file is there and whole" in answer.output, answer
    data = json.loads(hubmill("verify", copy, "--json").output)
    assert data["problems"] == [] and data["artifacts"] == 1 and data["files"] == 2
    assert "--key PUBLIC.pem checks by whom" in data["notes"][0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def weights(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda folder: flip(weights(folder)), r".gguf: is not what was written. Fetch it again"),
    "cut short": (lambda folder: os.truncate(weights(folder), 5000), ".gguf: is not what was written. Fetch it"),
    "weights gone": (lambda folder: weights(folder).unlink(), ".gguf: is missing. Fetch it again"),
    "card gone": (lambda folder: (folder / "README.md").unlink(), "README.md: is missing. Fetch it again"),
    "card changed": (lambda folder: flip(folder / "README.md"), "README.md: is not what was written"),
    "file added": (lambda folder: (folder / "extra.py").write_text("import os"), "extra.py: is there but was not made"),
    "list damaged": (lambda folder: os.truncate(folder / "provenance.json", 99), "is no statement of hubmill, or was"),
    "signature damaged": (lambda folder: os.truncate(folder / "model.sig", 99), "model.sig: the signature is damaged"),
    "signature gone": (lambda folder: (folder / "model.sig").unlink(), "is not signed. Ask who published it"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_told_with_its_remedy(place: Path, copy: Path, name: str, hubmill: Command) -> None:
    damage, what = DAMAGES[name]
    damage(copy)
    answer = hubmill("verify", copy, "--key", place / "key.public.pem")
    assert answer.code == 1 and what in answer.output, answer


def test_file_names_of_strangers_do_not_speak_to_the_terminal(copy: Path, hubmill: Command) -> None:
    (copy / "x\x1b]0;owned\x07.py").write_text("")
    answer = hubmill("verify", copy)
    assert answer.code == 1 and "is there but was not made" in answer.output and "\x1b" not in answer.output


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the artifact's own list anew, as somebody does who means to deceive."""
    path = folder / "provenance.json"
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


def test_a_list_that_was_written_anew_is_told_by_the_signature_alone(place: Path, copy: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["predicate"]["buildDefinition"]["externalParameters"]["source"] = "hub:meta/original"

    forge(copy, change)
    assert found(copy) == []
    (problem,) = found(copy, place / "key.public.pem")
    assert "are not those that were signed" in problem


def test_signature_of_another_key_is_told(copy: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    (problem,) = found(copy, other)
    assert "the signature is of another key" in problem


@pytest.mark.parametrize("name", ["../key.pem", "/etc/passwd", "a\\..\\b"])
def test_a_list_cannot_lead_out_of_its_folder(copy: Path, name: str) -> None:
    forge(copy, lambda content: content["subject"].append({"name": name, "digest": {"sha256": "0" * 64}}))
    (problem,) = found(copy)
    assert "could lead out of" in problem


def test_files_that_agree_with_their_list_but_are_no_model_are_told_by_the_reader(copy: Path) -> None:
    def change(content: dict[str, Any]) -> None:

        path = weights(copy)
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:8] + struct.pack("<Q", 1 << 60) + data[16:])
        for one in content["subject"]:
            if one["name"] == path.name:
                one["digest"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    forge(copy, change)
    (problem,) = found(copy)
    assert ".gguf" in problem


@pytest.mark.parametrize("name", ["tensors.parquet", "manifest.lock.yaml", "comparison.parquet"])
def test_damage_beside_the_artifacts_of_a_run_is_told(place: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(place / "out" / "small", tmp_path / "small", ignore=shutil.ignore_patterns(".work")))
    assert found(run) == []
    (run / name).write_bytes(b"rubbish: [")
    assert any(name in problem for problem in found(run))
    (run / name).unlink()
    assert any(f"{name}: is missing. Run hubmill convert again." in problem for problem in found(run)) or (
        name == "manifest.lock.yaml"
    )


def test_what_has_no_list_cannot_be_verified(tmp_path: Path, copy: Path, hubmill: Command) -> None:
    (copy / "provenance.json").unlink()
    answer = hubmill("verify", copy)
    assert answer.code == 3 and "nothing says what should be there" in answer.errors
    assert hubmill("verify", tmp_path / "nowhere").code == 3
    assert hubmill("verify", copy, "--key", tmp_path / "nowhere.pem").code == 2


# On a hub


@pytest.fixture
def published(hub_server: HubServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub that has the GGUF artifact as a model and the Parquet one as a data set, and that is the default one."""
    template = f"{hub_server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for target, kind in (("q8-0", "model"), ("int8", "dataset")):
        folder = artifact_of(place, target)
        files = {
            one["name"]: one["digest"]["sha256"]
            for one in json.loads((folder / "provenance.json").read_text())["subject"]
        }

        files |= {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("provenance.json", "model.sig")
        }
        hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
        hub.publish(Destination(hub="hf", repo=f"owner/{target}", kind=kind), folder, files, "m")  # type: ignore[arg-type]
    hub_server.log.clear()
    return hub_server


def test_artifact_on_a_hub_is_whole_and_a_second_look_downloads_nothing(
    published: HubServer, place: Path, tmp_path: Path
) -> None:
    for name, kind in (("q8-0", "model"), ("int8", "dataset"), ("datasets", "dataset")):
        source = f"hub:owner/{name}" if name != "datasets" else "hub:datasets/owner/int8"
        looked = verify(source, tmp_path, place / "key.public.pem")
        assert looked.problems == [] and looked.artifacts == 1
        assert looked.notes[0].startswith(f"{kind} owner/")
    published.log.clear()
    assert verify("hub:owner/q8-0", tmp_path).problems == []
    assert not published.requests("GET", "/resolve/")


def test_what_a_hub_lists_wrong_is_told_before_anything_is_downloaded(published: HubServer, tmp_path: Path) -> None:
    place = published.repos["models", "owner/q8-0"]
    files = place.commits[place.head]
    name = next(name for name in files if name.endswith(".gguf"))
    good = place.head
    place.commit(files | {name: files[name][:-1] + b"!", "more.txt": b"x"})
    looked = verify("hub:owner/q8-0", tmp_path)
    assert len(looked.problems) == 2 and f"{name} is not what was written" in looked.problems[0]
    assert "not downloaded" in looked.notes[1] and not published.requests("GET", rf"/resolve/.*{name}")
    assert verify(f"hub:owner/q8-0@{good}", tmp_path).problems == []


def test_card_that_was_edited_on_a_hub_is_told(published: HubServer, tmp_path: Path) -> None:
    """The hub has git's sha1 of small files only, so these are fetched and compared."""
    place = published.repos["models", "owner/q8-0"]
    place.commit(place.commits[place.head] | {"README.md": b"# mine now"})
    (problem,) = verify("hub:owner/q8-0", tmp_path).problems
    assert "README.md: is not what was written" in problem


def test_repo_that_is_none_of_ours_or_not_there_cannot_be_verified(
    published: HubServer, tmp_path: Path, hubmill: Command
) -> None:
    published.add("owner/model", {"model.safetensors": b"x"})
    answer = hubmill("verify", "hub:owner/model", "--out", tmp_path)
    assert answer.code == 3 and "there is no provenance.json" in answer.errors
    answer = hubmill("verify", "hub:owner/nothing", "--out", tmp_path)
    assert answer.code == 3 and "shows no owner/nothing" in answer.errors
