"""Signatures of artifacts by a key of one's own, with OpenSSF's model-signing: an extra, and its door.

The signature, model.sig, is a Sigstore bundle over the sha256 of every other file, provenance.json among them; whoever
has the public key can check it without any network. The alternative, keyless signing with Sigstore, asks a person to
log in and writes to a public log, which a batch by night cannot and an internal hub may not.

The bundle of one key and the same files differs from one signing to the next: ECDSA draws a random number.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from converter.errors import SourceError, UnsupportedError

FILE = "model.sig"
PASSWORD = "HUBMILL_KEY_PASSWORD"  # in the environment, for a key that is encrypted
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that model-signing takes
MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem, and its public half: openssl ec -pubout"
INSTALL = "Install it: pip install 'hubmill[sign]'"


def fingerprint(key: Path, where: str) -> str:
    """The sha256 (hex) of a private key's public half, as signatures name it; finds out that the key can sign.

    Raises UnsupportedError, whose text holds nothing of the key.
    """
    _library(where)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), _password())
    except OSError as error:
        raise UnsupportedError(where, f"the key cannot be read: {error.strerror}", "Mend publish.sign.key") from None
    except TypeError:  # a password for a key that has none, or none for one that has
        what = "the key is not encrypted" if _password() else "the key is encrypted"
        remedy = f"Unset {PASSWORD}" if _password() else f"Set {PASSWORD} to its password"
        raise UnsupportedError(where, what, remedy) from None
    except ValueError:
        what = f"the key is no private key in PEM, or {PASSWORD} is not its password"
        raise UnsupportedError(where, what, f"Make one: {MAKE}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise UnsupportedError(where, f"the key is of none of the curves {', '.join(CURVES)}", f"Make one: {MAKE}")
    public = private.public_key().public_bytes(
        encoding=serialization.Encoding.PEM, format=serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(public).hexdigest()


def sign(folder: Path, key: Path, where: str) -> None:
    """Sign every file of a folder; the signature lies beside them. Raises UnsupportedError."""
    signing, hashing = _library(where)[0], _library(where)[2]
    config = signing.Config().use_elliptic_key_signer(private_key=key, password=_password())
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[FILE]))
    try:
        config.sign(folder, folder / FILE)
    except (OSError, ValueError) as error:
        what = f"it could not be signed ({type(error).__name__})"
        raise UnsupportedError(where, what, "Look at the disk, then run it again") from None


def check_signature(folder: Path, public_key: Path) -> str:
    """Why the signature in a folder is not one of this key over these files; empty when it is.

    Hidden files are left out: a hub adds its own. Raises SourceError when the key cannot be read, and UnsupportedError
    without the library.
    """
    _, verifying, hashing = _library("--key")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError):  # the last for a key of another kind, model-signing 1.1
        what = f"{public_key} is no public key of the curves {', '.join(CURVES)} in PEM"
        raise SourceError("--key", what, "Take it from the private one: openssl ec -pubout") from None
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    # Not as the signature says: what it leaves out would be left out here.
    config.set_hashing_config(
        hashing.Config().set_ignored_paths(paths=[FILE, *hidden]).set_allow_symlinks(True)  # as in the hub's cache
    )
    try:
        config.verify(folder, folder / FILE)
    except Exception as error:  # a damaged bundle fails in many ways, in several libraries
        if "Key mismatch" in str(error):
            return "the signature is of another key"
        if "Signature mismatch" in str(error):
            return f"the files are not those that were signed: {' '.join(str(error).split())[:300]}"
        return f"the signature is damaged, or of another key ({type(error).__name__})"
    return ""


def _password() -> bytes | None:
    password = os.environ.get(PASSWORD)
    return password.encode() if password else None


def _library(where: str) -> tuple[Any, Any, Any]:
    """Its modules for signing, verifying, hashing; here and not above, because it is an extra and takes a second."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        what = f"model-signing is not installed, or not all of it ({error.name})"
        raise UnsupportedError(where, what, INSTALL) from None
    return signing, verifying, hashing
