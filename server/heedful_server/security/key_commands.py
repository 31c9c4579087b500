"""Making, listing and revoking API keys from the command line.

Owns what those commands read and write in the store, which they open themselves, also while a
server has it open, and how keys are printed. It decides nothing about what keys permit. Runs in
the process of the command. A secret is printed when its key is made, and nowhere else.
"""

import json
import time
from datetime import UTC, datetime
from typing import Any

from heedful_store import (
    KEY_SCOPES,
    SCOPE_NAME_RULE,
    ApiKey,
    NewKey,
    Scope,
    Store,
    StoreError,
    is_scope_name,
)
from heedful_store.schema import api_keys
from sqlalchemy import select

from heedful_server.config import ServerConfig
from heedful_server.errors import InvalidConfig, StartupError
from heedful_server.feedback.opening import open_store

_DAY_MS = 24 * 60 * 60 * 1000
_HEADINGS = ("KEY", "PREFIX", "TENANT", "PROJECT", "SCOPES", "CREATED", "STATE", "NAME")


def create(
    config: ServerConfig, scope: Scope, name: str, scopes: list[str], expires_days: int | None
) -> NewKey:
    """Make a key; an empty project opens every project of the tenant.

    Raises:
        InvalidConfig: no scope is given, or one that does not exist, or a name that cannot be one.
        StartupError: the store cannot be opened or written.
    """
    if not scopes or not KEY_SCOPES.issuperset(scopes):
        raise InvalidConfig(f"--scope: must be one or more of {', '.join(sorted(KEY_SCOPES))}")
    if not is_scope_name(scope.tenant):
        raise InvalidConfig(f"--tenant: must be {SCOPE_NAME_RULE}")
    if scope.project and not is_scope_name(scope.project):
        raise InvalidConfig(f"--project: must be {SCOPE_NAME_RULE}")
    expires_at_ms = None
    if expires_days is not None:
        expires_at_ms = int(time.time() * 1000) + expires_days * _DAY_MS
    with open_store(config) as store:
        try:
            return store.create_key(scope, name, scopes, expires_at_ms).result()
        except StoreError as error:
            raise StartupError(f"no key was made: {error}") from None


def find(config: ServerConfig, tenant: str | None) -> list[ApiKey]:
    """Return the keys of a tenant, or all, revoked ones too; raises StartupError."""
    with open_store(config) as store:
        tenants = _tenants(store) if tenant is None else [tenant]
        return [key for name in tenants for key in store.list_keys(name)]


def revoke(config: ServerConfig, key_id: str) -> ApiKey:
    """Make a key invalid for good; raises StartupError, also where there is no such key."""
    with open_store(config) as store:
        mine = select(api_keys.c.tenant).where(api_keys.c.key_id == key_id)
        with store.read() as connection:
            tenant = connection.execute(mine).scalar()
        if tenant is None:
            raise StartupError(f"there is no key {key_id!r}; `keys list` shows the ids")
        try:
            return store.revoke_key(tenant, key_id).result()
        except StoreError as error:
            raise StartupError(f"the key was not revoked: {error}") from None


def as_json(key: ApiKey) -> dict[str, Any]:
    """Return a key as JSON holds it, without its secret; times are ms since 1970 or null."""
    return {
        "key_id": key.key_id,
        "prefix": key.prefix,
        "tenant": key.scope.tenant,
        "project": key.scope.project or None,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created_at_ms": key.created_at_ms,
        "expires_at_ms": key.expires_at_ms,
        "revoked_at_ms": key.revoked_at_ms,
    }


def created_text(made: NewKey, as_object: bool) -> str:
    """Return what is printed of a new key: its secret, or all of it as JSON."""
    return json.dumps(as_json(made.key) | {"secret": made.secret}) if as_object else made.secret


def listed_text(keys: list[ApiKey], as_object: bool) -> str:
    """Return a table of keys, or a JSON array."""
    if as_object:
        return json.dumps([as_json(key) for key in keys])
    rows = [_HEADINGS, *map(_row, keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(key: ApiKey) -> tuple[str, ...]:
    state = "valid"
    if key.expires_at_ms is not None and key.expires_at_ms <= time.time() * 1000:
        state = "expired"
    if key.revoked_at_ms is not None:
        state = "revoked"
    day = datetime.fromtimestamp(key.created_at_ms / 1000, UTC).date().isoformat()
    scopes, project = ",".join(sorted(key.scopes)), key.scope.project or "*"
    return key.key_id, key.prefix, key.scope.tenant, project, scopes, day, state, key.name


def _tenants(store: Store) -> list[str]:
    query = select(api_keys.c.tenant).distinct().order_by(api_keys.c.tenant)
    with store.read() as connection:
        return list(connection.scalars(query))
