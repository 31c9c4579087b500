"""The secret keys behind completion tokens, in one private file.

Owns the file `token_keys.json`: made at the first start, readable by its owner only, replaced as a
whole. The newest key signs; older ones verify until every token that they signed has expired. It
does not know what is signed. Any thread; processes that share the directory share the keys.
"""

import contextlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from heedful_server.errors import StartupError

FILE_NAME = "token_keys.json"
# AES-SIV takes two keys of 256 bits.
_KEY_BYTES = 64
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class TokenKey:
    """One key and its name in tokens."""

    kid: str
    secret: bytes
    created_at_s: int


def load(path: Path) -> tuple[TokenKey, ...]:
    """Return the keys, oldest first; make the file with one key where there is none.

    Raises:
        StartupError: the file cannot be read, or is not what this module writes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise StartupError(f"cannot read the token keys {path}: {error.strerror}") from None
    try:
        keys = tuple(
            TokenKey(str(item["kid"]), bytes.fromhex(item["secret"]), int(item["created_at_s"]))
            for item in json.loads(text)["keys"]
        )
    except (ValueError, KeyError, TypeError):
        raise StartupError(f"{path} does not hold token keys") from None
    if not keys or any(len(key.secret) != _KEY_BYTES for key in keys):
        raise StartupError(f"{path} does not hold token keys")
    return keys


def rotate(path: Path, token_days: int) -> TokenKey:
    """Add a key that signs from now on, and drop those whose tokens have all expired.

    A running server takes the new key up within a minute. Raises StartupError as load does.
    """
    keys = load(path)
    now_s = int(time.time())
    # A key stopped signing when its successor was made.
    ended_at_s = [*(key.created_at_s for key in keys[1:]), now_s]
    lifetime_s = token_days * _DAY_S
    kept = [key for key, end_s in zip(keys, ended_at_s, strict=True) if end_s + lifetime_s > now_s]
    new = _new_key()
    _write_aside(path, [*kept, new]).replace(path)
    return new


def _create(path: Path) -> tuple[TokenKey, ...]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_aside(path, [_new_key()])
        try:
            # Unlike a rename, a link fails where another process that starts now was faster.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    except OSError as error:
        raise StartupError(f"cannot make the token keys {path}: {error.strerror}") from None
    return load(path)


def _new_key() -> TokenKey:
    return TokenKey(secrets.token_hex(4), secrets.token_bytes(_KEY_BYTES), int(time.time()))


def _write_aside(path: Path, keys: list[TokenKey]) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(_to_json(keys))
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _to_json(keys: list[TokenKey]) -> str:
    items = [
        {"kid": key.kid, "secret": key.secret.hex(), "created_at_s": key.created_at_s}
        for key in keys
    ]
    return json.dumps({"keys": items}, indent=1) + "\n"
