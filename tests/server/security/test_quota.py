"""Buckets against any order of calls and any clock; and what a refusal promises."""

import pytest
from heedful_server.errors import QuotaExceeded
from heedful_server.security.quota import Quotas, TokenBucket
from heedful_server.setting_groups import QuotaSettings
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


amounts = st.floats(0.01, 200)
waits_s = st.floats(0, 20)


@given(st.floats(0.1, 50), st.floats(1, 100), st.lists(st.tuples(waits_s, amounts)))
def test_no_more_passes_than_rate_and_capacity_allow(rate_per_s, capacity, calls):
    clock = Clock()
    bucket = TokenBucket(rate_per_s, capacity, clock)
    passed = 0.0
    for wait_s, amount in calls:
        clock.now_s += wait_s
        if bucket.take(amount) == 0:
            # Before this one, which may be larger than the bucket, all was within the allowance.
            allowed = capacity + rate_per_s * (clock.now_s - 50.0)
            assert passed + min(amount, capacity) <= allowed * (1 + 1e-9) + 1e-6
            passed += amount


@given(st.floats(0.1, 50), st.floats(1, 100), st.lists(amounts, min_size=1), amounts)
def test_retry_after_the_time_that_was_told_passes_and_not_before(
    rate_per_s, capacity, earlier, amount
):
    clock = Clock()
    bucket = TokenBucket(rate_per_s, capacity, clock)
    for taken in earlier:
        bucket.take(taken)
    wait_s = bucket.take(amount)
    assert wait_s >= 0
    if wait_s > 1e-3:
        clock.now_s += wait_s / 2
        assert bucket.take(amount) > 0
        clock.now_s += wait_s / 2 + 1e-6
        assert bucket.take(amount) == 0


@given(st.floats(1, 100), st.lists(st.tuples(amounts, st.floats(0, 1))))
def test_what_is_given_back_never_makes_more_than_a_full_bucket(capacity, calls):
    bucket = TokenBucket(1.0, capacity, Clock())
    for amount, share in calls:
        if bucket.take(amount) == 0:
            bucket.give_back(amount * share)
    bucket.give_back(1e6)
    assert bucket.take(capacity) == 0
    assert bucket.take(1.0) == pytest.approx(min(1.0, capacity))


def test_tenants_do_not_share_and_kinds_do_not_either():
    clock = Clock()
    quotas = Quotas(QuotaSettings(requests_per_s=0.5, feedback_per_s=2, burst_s=2), clock)
    quotas.requests.take("a")
    with pytest.raises(QuotaExceeded, match=r"0\.5 requests a second") as caught:
        quotas.requests.take("a")
    assert caught.value.retry_after_s == pytest.approx(2.0)
    quotas.requests.take("b")
    quotas.feedback.take("a", 4)
    clock.now_s += 2.0
    quotas.requests.take("a")


def test_rate_of_zero_sets_no_limit():
    quotas = Quotas(QuotaSettings(), Clock())
    for _ in range(1000):
        quotas.tokens.take("a", 1e9)
    quotas.tokens.give_back("a", 5)
