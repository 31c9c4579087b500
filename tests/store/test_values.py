"""Identifiers, blobs, failpoints, and the list of public names."""

import time
import uuid

import heedful_store
import pytest
from heedful_store import Failpoints, is_uuid7, uuid7
from heedful_store.blobs import pack_float32, pack_int32, unpack_float32, unpack_int32
from heedful_store.errors import Invalid, StoreError, StoreFull
from heedful_store.failpoints import FailpointError
from hypothesis import given
from hypothesis import strategies as st

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.integers(0, 2**48 - 1))
def test_a_uuid7_carries_its_time(time_ms: int) -> None:
    text = uuid7(time_ms)
    parsed = uuid.UUID(text)
    assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, text)
    assert parsed.int >> 80 == time_ms
    assert is_uuid7(text)
    assert uuid7(time_ms) != text


@pytest.mark.parametrize("bad", ["", "x", str(uuid.uuid4()), uuid7().upper(), uuid7() + "\n"])
def test_other_text_is_no_uuid7(bad: str) -> None:
    assert not is_uuid7(bad)


@given(st.lists(INT32) | st.lists(INT32, min_size=1, max_size=3).map(lambda some: some * 999))
def test_token_ids_survive_packing(ids: list[int]) -> None:
    assert list(unpack_int32(pack_int32(ids))) == ids


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_numbers_survive_packing(numbers: list[float]) -> None:
    assert list(unpack_float32(pack_float32(numbers))) == numbers


def test_repetitive_blobs_are_compressed_and_others_not_inflated() -> None:
    assert len(pack_int32([7] * 10_000)) < 1000
    assert len(pack_int32([7] * 10)) == 41


def test_ids_outside_int32_are_refused() -> None:
    with pytest.raises(OverflowError):
        pack_int32([2**31])


def test_a_failpoint_acts_at_its_hit_and_only_then() -> None:
    traps = Failpoints.from_environment({"HEEDFUL_FAILPOINTS": "a=2:raise, b=*:sleep_20"})
    traps.hit("a")
    with pytest.raises(FailpointError, match="a"):
        traps.hit("a")
    traps.hit("a")
    started_s = time.monotonic()
    traps.hit("b")
    traps.hit("b")
    traps.hit("unknown")
    assert 0.04 <= time.monotonic() - started_s < 5


@pytest.mark.parametrize("bad", ["a", "a=1", "a=x:kill", "a=1:explode", "=1:kill", "a=1:sleep_x"])
def test_a_wrong_failpoint_is_an_error_at_start(bad: str) -> None:
    with pytest.raises(ValueError, match="expected name"):
        Failpoints(bad)


def test_errors_say_what_happened() -> None:
    assert str(StoreFull()) == "The disk of the store is full; nothing was stored."
    assert str(StoreFull("5 bytes")).endswith("stored. 5 bytes")
    error = Invalid("tags", "too many")
    assert (error.field, error.reason) == ("tags", "too many")
    assert isinstance(error, StoreError)


def test_every_public_name_exists_once() -> None:
    assert sorted(heedful_store.__all__) == sorted(set(heedful_store.__all__))
    for name in heedful_store.__all__:
        assert getattr(heedful_store, name) is not None
