"""A small run whose artifacts are signed, and the keys for it, for tests of what travels with an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from converter import manifest as manifests
from jobs.convert import Run
from small_run import write_manifest, write_model

TARGETS = {
    "q8-0": "{format: gguf, type: Q8_0}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, group_size: 32}",
    "int8": "{format: parquet, scheme: INT8}",
}


def write_keys(folder: Path, name: str = "key", password: bytes | None = None) -> tuple[Path, Path]:
    """A fresh pair of keys: the files of the private and of the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    private.write_bytes(key.private_bytes(pem, form, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def write_signed(folder: Path, targets: Mapping[str, str] = TARGETS) -> Run:
    """A model, keys and a manifest that signs, in `folder`; returns the run, which goes to folder/out."""
    write_model(folder / "model")
    write_keys(folder)
    write_manifest(folder, targets, extra="publish: {hub: folder:hub, sign: {key: key.pem}}")
    return read_run(folder)


def read_run(folder: Path) -> Run:
    return Run(manifest=manifests.load(folder / "small.yaml"), out=folder / "out", executor="inprocess")
