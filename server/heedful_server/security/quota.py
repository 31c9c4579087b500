"""How much each tenant may ask for.

Owns the buckets: one for calls that compute, one for tokens, one for judgements, for each tenant.
A bucket fills at its rate, holds `burst_s` seconds of it, and starts full. What is larger than a
bucket is let through when the bucket is full, and paid off afterwards. It knows nothing of gRPC and
nothing of what is computed. Runs on the event loop; tenants come from keys in the store, so there
are no more buckets than tenants with keys.
"""

import time
from collections.abc import Callable

from heedful_server.errors import QuotaExceeded
from heedful_server.setting_groups import QuotaSettings


class TokenBucket:
    """A level that rises at a steady rate up to the capacity; it can be in debt."""

    def __init__(self, rate_per_s: float, capacity: float, clock: Callable[[], float]) -> None:
        assert rate_per_s > 0
        assert capacity > 0
        self._rate_per_s = rate_per_s
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._at_s = clock()

    def take(self, amount: float) -> float:
        """Take an amount; return 0, or the seconds after which it can be taken and take nothing."""
        self._fill()
        missing = min(amount, self._capacity) - self._level
        if missing > 0:
            return missing / self._rate_per_s
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Return a part of what was taken."""
        self._fill()
        self._level = min(self._capacity, self._level + amount)

    def _fill(self) -> None:
        now_s = self._clock()
        gained = (now_s - self._at_s) * self._rate_per_s
        self._level = min(self._capacity, self._level + gained)
        self._at_s = now_s


class Quota:
    """One kind of thing, with a bucket for each tenant; a rate of 0 sets no limit."""

    def __init__(
        self, what: str, rate_per_s: float, burst_s: float, clock: Callable[[], float]
    ) -> None:
        self._what = what
        self._rate_per_s = rate_per_s
        # Whatever the rate, one call fits.
        self._capacity = max(1.0, rate_per_s * burst_s)
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, tenant: str, amount: float = 1.0) -> None:
        """Count an amount against a tenant; raises QuotaExceeded with the time to wait."""
        if not self._rate_per_s:
            return
        if tenant not in self._buckets:
            bucket = TokenBucket(self._rate_per_s, self._capacity, self._clock)
            self._buckets[tenant] = bucket
        wait_s = self._buckets[tenant].take(amount)
        if wait_s > 0:
            raise QuotaExceeded(
                f"the quota is {self._rate_per_s:g} {self._what} a second; retry in {wait_s:.3g} s",
                wait_s,
            )

    def give_back(self, tenant: str, amount: float) -> None:
        """Return a part of what a tenant took."""
        if tenant in self._buckets:
            self._buckets[tenant].give_back(amount)


class Quotas:
    """The three kinds of quota of a server."""

    def __init__(
        self, settings: QuotaSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        burst_s = settings.burst_s
        self.requests = Quota("requests", settings.requests_per_s, burst_s, clock)
        self.tokens = Quota("tokens", settings.tokens_per_s, burst_s, clock)
        self.feedback = Quota("judgements", settings.feedback_per_s, burst_s, clock)
