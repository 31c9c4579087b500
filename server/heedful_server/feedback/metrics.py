"""Metrics of the feedback log.

Owns their names, labels and buckets. Numbers are handed in; what can be read off the store is read
when the metrics are scraped. `observe_group` runs in the store's writer thread, everything else on
the event loop.
"""

from collections.abc import Callable, Mapping

from heedful_store import GroupReport
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_COMMIT_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class FeedbackMetrics:
    """What the log of answers and judgements does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.events = Counter(
            "heedful_feedback_events",
            "Feedback events by kind, trust tier of the rater and receipt status.",
            ("kind", "tier", "status"),
            registry=registry,
        )
        self.refused = Counter(
            "heedful_feedback_refused",
            "Feedback events that were not accepted, by reason.",
            ("reason",),
            registry=registry,
        )
        self._make_log_metrics(registry)
        self._make_store_metrics(registry)
        # Looking a child up by its labels costs more than counting, and feedback is the hot path.
        self._event_children: dict[tuple[str, str, str], Counter] = {}

    def _make_log_metrics(self, registry: CollectorRegistry) -> None:
        self.completions = Counter(
            "heedful_completions_logged",
            "Completions that reached the log, by what is kept of them.",
            ("consent",),
            registry=registry,
        )
        self.unlogged = Counter(
            "heedful_completions_unlogged",
            "Completions that did not reach the log and cannot be rated, by reason.",
            ("reason",),
            registry=registry,
        )
        self.states = Gauge(
            "heedful_feedback_log_events",
            "Feedback events of the log by state: current, not_current (replaced or withdrawn), "
            "pending (its completion is not visible yet), dead (it never was), erased.",
            ("state",),
            registry=registry,
        )
        self.backlog = Gauge(
            "heedful_feedback_backlog",
            "Current feedback events that no training run has read.",
            registry=registry,
        )
        self.pruned = Counter(
            "heedful_completions_pruned",
            "Completions whose content was removed by retention.",
            registry=registry,
        )
        self.free_bytes = Gauge(
            "heedful_store_free_bytes", "Free space where the store lies.", registry=registry
        )

    def _make_store_metrics(self, registry: CollectorRegistry) -> None:
        self._commit = Histogram(
            "heedful_store_commit_seconds",
            "One transaction of the store, from its begin until it is durable.",
            buckets=_COMMIT_S,
            registry=registry,
        )
        self._group = Histogram(
            "heedful_store_group_items",
            "Writes that one transaction made durable.",
            buckets=_ITEMS,
            registry=registry,
        )
        self._failures = Counter(
            "heedful_store_failures",
            "Transactions that failed, by what failed.",
            ("kind",),
            registry=registry,
        )
        self.queue = Gauge(
            "heedful_store_queue_items", "Writes that wait for the store.", registry=registry
        )
        self.up = Gauge("heedful_store_up", "Whether the store accepts writes.", registry=registry)

    def watch_store(self, queued_items: Callable[[], int], is_alive: Callable[[], bool]) -> None:
        """Read these two whenever the metrics are scraped."""
        self.queue.set_function(queued_items)
        self.up.set_function(is_alive)

    def count_event(self, kind: str, tier: str, status: str) -> None:
        """Count one accepted event."""
        labels = (kind, tier, status)
        child = self._event_children.get(labels)
        if child is None:
            child = self._event_children[labels] = self.events.labels(*labels)
        child.inc()

    def observe_group(self, report: GroupReport) -> None:
        """Record what one transaction of the store did."""
        if report.failure is not None:
            self._failures.labels(report.failure.__name__).inc()
            return
        self._commit.observe(report.commit_s)
        self._group.observe(report.items)

    def set_states(self, counts: Mapping[str, int]) -> None:
        """Show how many events of the log are in which state."""
        for state, count in counts.items():
            self.states.labels(state).set(count)
