"""How long the store's word about a key is believed, and where a call carries its key."""

from pathlib import Path

import pytest
from heedful_server.errors import Unauthenticated
from heedful_server.identity import LOCAL_CALLER
from heedful_server.security.keyring import CACHE_S, Keyring, key_in
from heedful_store import Scope, Store, StoreClosed


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class CountingStore(Store):
    """A store that counts how often a key is looked up."""

    num_lookups = 0

    def verify_key(self, text):
        self.num_lookups += 1
        return super().verify_key(text)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path):
    with CountingStore(f"sqlite:///{tmp_path / 'heedful.db'}") as store:
        yield store


def header(secret: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {secret}")]


async def test_key_is_looked_up_once_within_the_time(store, clock):
    made = await store.create_key(Scope("acme", "app"), "", ["generate"])
    keyring = Keyring(store, "always", clock=clock)
    for _ in range(3):
        who = await keyring.caller_of(header(made.secret))
    assert (who.tenant, who.project, who.key_id) == ("acme", "app", made.key.key_id)
    assert store.num_lookups == 1
    clock.now_s += CACHE_S
    await keyring.caller_of(header(made.secret))
    assert store.num_lookups == 2


async def test_revocation_takes_effect_when_the_time_is_over(store, clock):
    made = await store.create_key(Scope("acme", ""), "", ["generate"])
    keyring = Keyring(store, "always", clock=clock)
    assert (await keyring.caller_of(header(made.secret))).project is None
    await store.revoke_key("acme", made.key.key_id)
    clock.now_s += CACHE_S - 0.01
    await keyring.caller_of(header(made.secret))
    clock.now_s += 0.02
    with pytest.raises(Unauthenticated):
        await keyring.caller_of(header(made.secret))


async def test_oldest_keys_are_forgotten(store, clock):
    secrets = [
        (await store.create_key(Scope("acme", ""), "", ["generate"])).secret for _ in range(3)
    ]
    keyring = Keyring(store, "always", clock=clock, max_cached=2)
    for secret in secrets:
        await keyring.caller_of(header(secret))
    await keyring.caller_of(header(secrets[2]))
    assert store.num_lookups == 3
    await keyring.caller_of(header(secrets[0]))
    assert store.num_lookups == 4


async def test_text_that_cannot_be_a_key_costs_no_lookup(store, clock):
    keyring = Keyring(store, "always", clock=clock)
    for text in ("", "hk_", "hk_xyz_abc", "hk_00_%", "hk_00_" + "a" * 10_000, "sk-0"):
        with pytest.raises(Unauthenticated):
            await keyring.caller_of(header(text))
    assert store.num_lookups == 0


async def test_known_key_works_while_the_store_cannot_be_read(store, clock, monkeypatch):
    made = await store.create_key(Scope("acme", ""), "", ["generate"])
    keyring = Keyring(store, "always", clock=clock)
    await keyring.caller_of(header(made.secret))

    def fail(text: str) -> None:
        raise StoreClosed

    monkeypatch.setattr(store, "verify_key", fail)
    clock.now_s += 10 * CACHE_S
    assert (await keyring.caller_of(header(made.secret))).tenant == "acme"
    with pytest.raises(StoreClosed):
        await keyring.caller_of(header("hk_00_other"))


async def test_first_key_is_noticed_when_the_time_is_over(store, clock):
    keyring = Keyring(store, "once_one_exists", clock=clock)
    assert await keyring.caller_of([]) is LOCAL_CALLER
    await store.create_key(Scope("acme", ""), "", ["generate"])
    clock.now_s += CACHE_S
    with pytest.raises(Unauthenticated):
        await keyring.caller_of([])
    never = Keyring(store, "never", clock=clock)
    clock.now_s += CACHE_S
    assert await never.caller_of([]) is LOCAL_CALLER


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ([], None),
        ([("authorization", "Bearer a")], "a"),
        ([("authorization", "bearer  a ")], "a"),
        ([("authorization", "Basic a")], ""),
        ([("x-api-key", "a")], "a"),
        ([("key-bin", b"a"), ("user-agent", "x")], None),
    ],
)
def test_key_is_found_where_it_may_be(metadata, key):
    assert key_in(metadata) == key
