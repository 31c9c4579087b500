"""API keys: made once, stored as a keyed hash, verified in constant time.

Owns the form ``hk_<prefix>_<secret>`` and the table of keys. It does not decide what a scope
permits; the server does. Writes run in the writer's thread, reads anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from heedful_store.errors import Invalid, NotFound
from heedful_store.ids import now_ms, uuid7
from heedful_store.records import Scope
from heedful_store.schema import api_keys

KEY_SCOPES = frozenset(
    {"generate", "feedback:own", "feedback:any", "train", "deploy", "admin", "erase"}
)
_PREFIX_BYTES, _SALT_BYTES, _SECRET_BYTES = 6, 16, 32


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    key_id: str  # UUIDv7
    prefix: str  # public part of the key, for people to tell keys apart
    scope: Scope  # what it opens
    name: str  # given by its maker
    scopes: frozenset[str]  # subset of KEY_SCOPES
    created_at_ms: int  # server clock
    expires_at_ms: int | None  # None: never
    revoked_at_ms: int | None  # None: valid


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; ``secret`` is shown here and nowhere else."""

    key: ApiKey
    secret: str  # "hk_<prefix>_<secret>"


def create(
    connection: Connection,
    scope: Scope,
    name: str,
    scopes: Iterable[str],
    expires_at_ms: int | None = None,
) -> NewKey:
    """Make a key; raise Invalid for a scope that does not exist."""
    wanted = frozenset(scopes)
    if unknown := wanted - KEY_SCOPES:
        raise Invalid("scopes", f"unknown: {', '.join(sorted(unknown))}")
    prefix = secrets.token_hex(_PREFIX_BYTES)
    text = f"hk_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    salt = secrets.token_bytes(_SALT_BYTES)
    key = ApiKey(uuid7(), prefix, scope, name, wanted, now_ms(), expires_at_ms, None)
    connection.execute(
        insert(api_keys).values(
            key_id=key.key_id,
            prefix=prefix,
            salt=salt,
            secret_hash=_hash(salt, text),
            tenant=scope.tenant,
            project=scope.project,
            name=name,
            scopes=json.dumps(sorted(wanted)),
            created_at_ms=key.created_at_ms,
            expires_at_ms=expires_at_ms,
        )
    )
    return NewKey(key, text)


def verify(connection: Connection, text: str) -> ApiKey | None:
    """Return the key that ``text`` is, or None when it is unknown, revoked or expired."""
    parts = text.split("_", 2)
    prefix = parts[1] if len(parts) == 3 and parts[0] == "hk" else ""
    row = connection.execute(select(api_keys).where(api_keys.c.prefix == prefix)).first()
    # An unknown prefix costs the same hash, so that time does not tell which prefixes exist.
    salt, expected = (bytes(_SALT_BYTES), b"") if row is None else (row.salt, row.secret_hash)
    matches = hmac.compare_digest(_hash(salt, text), expected)
    if row is None or not matches or row.revoked_at_ms is not None:
        return None
    if row.expires_at_ms is not None and row.expires_at_ms <= now_ms():
        return None
    return _from_row(row)


def find(connection: Connection, tenant: str, project: str | None = None) -> list[ApiKey]:
    """Return the keys of a tenant, or of one of its projects, oldest first, revoked ones too."""
    query = select(api_keys).where(api_keys.c.tenant == tenant).order_by(api_keys.c.key_id)
    if project is not None:
        query = query.where(api_keys.c.project == project)
    return [_from_row(row) for row in connection.execute(query)]


def revoke(connection: Connection, tenant: str, key_id: str) -> ApiKey:
    """Make a key invalid for good; raise NotFound, also for another tenant's."""
    mine = and_(api_keys.c.key_id == key_id, api_keys.c.tenant == tenant)
    connection.execute(
        update(api_keys)
        .where(mine, api_keys.c.revoked_at_ms.is_(None))
        .values(revoked_at_ms=now_ms())
    )
    row = connection.execute(select(api_keys).where(mine)).first()
    if row is None:
        raise NotFound(f"key {key_id}")
    return _from_row(row)


def _hash(salt: bytes, text: str) -> bytes:
    # The secret holds 256 random bits, so a slow password hash would add nothing.
    return hmac.digest(salt, text.encode(), hashlib.sha256)


def _from_row(row: Row[Any]) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        prefix=row.prefix,
        scope=Scope(row.tenant, row.project),
        name=row.name,
        scopes=frozenset(json.loads(row.scopes)),
        created_at_ms=row.created_at_ms,
        expires_at_ms=row.expires_at_ms,
        revoked_at_ms=row.revoked_at_ms,
    )
