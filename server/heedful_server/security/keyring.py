"""Turns the key that a call carries into its caller.

Owns when keys are needed, where a call carries its key, and how long what the store said of a key
is believed: a revoked key stops working within CACHE_S, and a first key on a server that was open
closes it within CACHE_S. Calls that run by then run on. While the store cannot be read, what it
said last still holds, so that its failure does not end generation. Runs on the event loop; the
store is read in worker threads. Keys appear in no message and no log line.
"""

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import structlog
from heedful_store import ApiKey, Store, StoreError
from heedful_store.schema import api_keys
from sqlalchemy import select

from heedful_server.errors import Unauthenticated
from heedful_server.identity import LOCAL_CALLER, Caller

log = structlog.get_logger(__name__)

CACHE_S: Final = 5.0
_MAX_CACHED = 4096
_KEY = re.compile(r"hk_[0-9a-f]{1,64}_[A-Za-z0-9_\-]{1,256}")
# One wording for keys that never were, are revoked, or have expired.
_UNKNOWN = "the API key is not valid"
_MISSING = "this server needs an API key: send it as 'authorization: Bearer hk_…'"

KeyRule = Literal["never", "once_one_exists", "always"]


@dataclass(frozen=True, slots=True)
class _Checked:
    caller: Caller | None  # None: not valid
    at_s: float  # by the monotonic clock


class Keyring:
    """Remembers for a short time which keys the store knows."""

    def __init__(
        self,
        store: Store,
        rule: KeyRule,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_cached: int = _MAX_CACHED,
    ) -> None:
        """Read whether there are keys; raises StoreError."""
        self._store = store
        self._clock = clock
        self._max_cached = max_cached
        # Under digests, so that no secret of a caller stays in memory for longer than its call.
        self._checked: OrderedDict[bytes, _Checked] = OrderedDict()
        self._may_close = rule == "once_one_exists"
        has_keys = rule != "never" and _has_keys(store)
        self._is_closed = rule == "always" or has_keys
        if self._is_closed and not has_keys:
            log.warning("nobody can call: make a key with `heedful-server keys create`")
        self._asked_at_s = clock()

    @property
    def is_closed(self) -> bool:
        """Whether calls need a key, as far as is known."""
        return self._is_closed

    async def caller_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return who calls, by the metadata or headers (names in lower case) of a call.

        Raises:
            Unauthenticated: a key is needed, and there is none or it is not valid.
            StoreError: the key is new to this process and the store cannot be read.
        """
        if not self._is_closed:
            await self._look_for_first_key()
        if not self._is_closed:
            return LOCAL_CALLER
        key = key_in(metadata)
        if key is None:
            raise Unauthenticated(_MISSING)
        found = await self._check(key) if _KEY.fullmatch(key) else None
        if found is None:
            raise Unauthenticated(_UNKNOWN)
        return found

    async def _look_for_first_key(self) -> None:
        now_s = self._clock()
        if not self._may_close or now_s - self._asked_at_s < CACHE_S:
            return
        # Before the wait, so that of many calls one asks.
        self._asked_at_s = now_s
        try:
            self._is_closed = await asyncio.to_thread(_has_keys, self._store)
        except StoreError as error:
            log.warning("cannot see whether there are API keys", reason=str(error))

    async def _check(self, key: str) -> Caller | None:
        digest = hashlib.sha256(key.encode()).digest()
        known = self._checked.get(digest)
        now_s = self._clock()
        if known is not None and now_s - known.at_s < CACHE_S:
            self._checked.move_to_end(digest)
            return known.caller
        try:
            found = await asyncio.to_thread(self._store.verify_key, key)
        except StoreError as error:
            if known is None:
                raise
            log.warning("cannot check an API key again", reason=str(error))
            return known.caller
        # The time before the read: what changes during it is seen no later than promised.
        self._checked[digest] = _Checked(None if found is None else _caller(found), now_s)
        self._checked.move_to_end(digest)
        while len(self._checked) > self._max_cached:
            self._checked.popitem(last=False)
        return self._checked[digest].caller


def key_in(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the key that metadata or headers carry, None where there is none."""
    for name, value in metadata:
        if not isinstance(value, str):
            continue
        if name == "x-api-key":
            return value.strip()
        if name == "authorization":
            kind, _, key = value.strip().partition(" ")
            return key.strip() if kind.lower() == "bearer" else ""
    return None


def _caller(key: ApiKey) -> Caller:
    return Caller(
        tenant=key.scope.tenant,
        key_id=key.key_id,
        scopes=key.scopes,
        # The store has no NULL here: an empty project is a key for the whole tenant.
        project=key.scope.project or None,
    )


def _has_keys(store: Store) -> bool:
    # Revoked keys count: taking the last one away must not open the server.
    with store.read() as connection:
        return connection.execute(select(api_keys.c.key_id).limit(1)).first() is not None
