"""Keys that cannot sign are found in the plan, and nothing of a key is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from converter.errors import ManifestError, SourceError, UnsupportedError
from converter.manifest import load
from converter.signing import check_signature, fingerprint, sign
from jobs.prepare import prepare
from jobs.store import Store
from signed_run import write_keys
from small_run import write_manifest, write_model


def test_fingerprint_is_the_one_that_signatures_name_and_a_password_opens_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path, password=b"open sesame")
    monkeypatch.setenv("HUBMILL_KEY_PASSWORD", "open sesame")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("content")
    sign(tmp_path / "model", private, "test")
    assert fingerprint(private, "test") in (tmp_path / "model" / "model.sig").read_text()
    monkeypatch.delenv("HUBMILL_KEY_PASSWORD")
    assert check_signature(tmp_path / "model", public) == ""


def bad_key(folder: Path, kind: str) -> Path:
    path = folder / "bad.pem"
    if kind == "encrypted":
        write_keys(folder, "bad", password=b"sesame")
    elif kind == "garbage":
        path.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0IHNlY3JldA==\n-----END PRIVATE KEY-----\n")
    elif kind == "public":
        return write_keys(folder, "bad")[1]
    elif kind != "missing":
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = ec.generate_private_key(ec.SECP256K1())
        if kind == "rsa":
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return path


@pytest.mark.parametrize(
    ("kind", "password", "what"),
    [
        ("missing", "", "cannot be read: No such file"),
        ("encrypted", "", "the key is encrypted. Set HUBMILL_KEY_PASSWORD"),
        ("encrypted", "wrong", "is no private key in PEM, or HUBMILL_KEY_PASSWORD is not its password"),
        ("garbage", "", "is no private key in PEM"),
        ("public", "", "is no private key in PEM"),
        ("rsa", "", "is of none of the curves secp256r1"),
        ("another curve", "", "is of none of the curves secp256r1"),
        ("rsa", "needless", "the key is not encrypted. Unset HUBMILL_KEY_PASSWORD"),
    ],
)
def test_key_that_cannot_sign_is_told_without_a_word_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, password: str, what: str
) -> None:
    path = bad_key(tmp_path, kind)
    if password:
        monkeypatch.setenv("HUBMILL_KEY_PASSWORD", password)
    with pytest.raises(UnsupportedError) as caught:
        fingerprint(path, "test")
    assert what in str(caught.value) and caught.value.__cause__ is None
    lines = path.read_text().splitlines()[1:-1] if path.exists() else []
    assert not any(line in repr(caught.value) for line in lines)
    assert not password or password not in repr(caught.value)


def test_plan_refuses_a_key_that_cannot_sign_and_the_manifest_one_that_is_not_there(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "key.pem").write_text("no key")
    targets = {"int8": "{format: parquet, scheme: INT8}"}
    path = write_manifest(tmp_path, targets, extra="publish: {hub: folder:hub, sign: {key: key.pem}}")
    manifest = load(path)
    prepared = prepare(manifest, manifest.jobs(), Store(run=tmp_path / "out"), 1, "cpu")
    assert "publish.sign: the key is no private key" in prepared.problems["model/int8"]
    (tmp_path / "key.pem").unlink()
    with pytest.raises(ManifestError, match="publish sign: there is no file"):
        load(path)


def test_public_key_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(SourceError, match="is no public key"):
        check_signature(tmp_path, tmp_path / "key.pem")
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(rsa_key.public_bytes(serialization.Encoding.PEM, form))
    with pytest.raises(SourceError, match="is no public key"):
        check_signature(tmp_path, tmp_path / "key.pem")
