"""Tokens that let just the receiver of an answer judge it, now or weeks later.

Owns their form, `v1.<key id>.<sealed claims>`, and their verification. Claims are sealed with
AES-SIV: the synthetic IV is a keyed MAC over everything, and since the claims cannot be read, a
token of a blind candidate gives nothing away about its policy. Nothing is stored and nothing is
looked up. Event loop.
"""

import base64
import binascii
import time
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from heedful_server.errors import StartupError
from heedful_server.feedback import token_keys

_VERSION = "v1"
_MAX_CHARS = 1024
_DAY_S = 86_400

TokenKind = Literal["completion", "comparison"]


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """What a token says about the answer, or the comparison, that it came with."""

    kind: TokenKind
    id: str
    tenant: str
    project: str
    end_user: str
    policy_version: str  # empty for a comparison
    expires_at_s: int


class BadToken(Exception):  # noqa: N818 - says the condition
    """The text is no token of this server, or one that has expired; str() says which."""


class Tokens:
    """Signs and verifies with the keys of one file."""

    def __init__(self, path: Path, lifetime_days: int) -> None:
        """Read the keys, or make them; raises StartupError as token_keys.load does."""
        self._path = path
        self._lifetime_s = lifetime_days * _DAY_S
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Claims).decode
        self._ciphers: dict[str, AESSIV] = {}
        self._signing_kid = ""
        self._read_at_mtime_ns = 0
        self.refresh()

    def refresh(self) -> None:
        """Take up the keys of the file where it has changed."""
        keys = token_keys.load(self._path)
        self._ciphers = {key.kid: AESSIV(key.secret) for key in keys}
        self._signing_kid = keys[-1].kid
        self._read_at_mtime_ns = self._mtime_ns()

    def sign(
        self,
        kind: TokenKind,
        id: str,
        *,
        tenant: str,
        project: str,
        end_user: str,
        policy_version: str = "",
    ) -> str:
        """Return a token for a completion or a comparison."""
        expires_at_s = int(time.time()) + self._lifetime_s
        claims = Claims(kind, id, tenant, project, end_user, policy_version, expires_at_s)
        kid = self._signing_kid
        sealed = self._ciphers[kid].encrypt(self._encode(claims), [_header(kid)])
        return f"{_VERSION}.{kid}.{base64.urlsafe_b64encode(sealed).decode().rstrip('=')}"

    def verify(self, token: str) -> Claims:
        """Return the claims of a genuine token that has not expired; raise BadToken otherwise."""
        version, _, rest = token[:_MAX_CHARS].partition(".")
        kid, _, text = rest.partition(".")
        cipher = self._ciphers.get(kid) or self._newer_cipher(kid)
        if version != _VERSION or cipher is None:
            raise BadToken("is not a token of this server")
        try:
            sealed = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
            claims = self._decode(cipher.decrypt(sealed, [_header(kid)]))
        except (InvalidTag, ValueError, binascii.Error, msgspec.MsgspecError):
            raise BadToken("is not a token of this server") from None
        if claims.expires_at_s <= time.time():
            raise BadToken("has expired")
        return claims

    def _newer_cipher(self, kid: str) -> AESSIV | None:
        """Look for a key that was added since the file was read."""
        if self._mtime_ns() == self._read_at_mtime_ns:
            return None
        try:
            self.refresh()
        except StartupError:
            return None
        return self._ciphers.get(kid)

    def _mtime_ns(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


def _header(kid: str) -> bytes:
    return f"{_VERSION}.{kid}".encode()
