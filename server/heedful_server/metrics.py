"""Every metric of the server process, as one object made by whoever builds the server.

Owns names, labels and buckets, on a registry of its own. It knows nothing of gRPC or of the
engine's socket: callers hand in numbers. The engine's figures are kept as its last report and
turned into metrics when they are scraped, so a step costs little. Runs on the server's event
loop.
"""

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heedful_server.deployment.metrics import LoopMetrics
from heedful_server.feedback.metrics import FeedbackMetrics
from heedful_server.protocol import EngineInfo, EngineStats, Finish

# From 1 ms, because a small model on a fast machine answers in single milliseconds.
_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
_LATENCY_S = (*_SHORT_S, 2.0, 5.0, 10.0)
_REQUEST_S = (*_SHORT_S, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 900.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """All metrics and the registry that holds them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineMetrics()
        self.registry.register(self.engine)
        self.feedback = FeedbackMetrics(self.registry)
        self.loop = LoopMetrics(self.registry)
        self._make_latency_metrics()
        self._make_size_metrics()
        self._make_rpc_metrics()
        build_info = self._gauge("heedful_build_info", "Version of the server.", ("version",))
        build_info.labels(version("heedful")).set(1)

    def _make_latency_metrics(self) -> None:
        self.time_to_first_token = self._histogram(
            "heedful_time_to_first_token_seconds", "Call received to first token.", _REQUEST_S
        )
        self.inter_token_latency = self._histogram(
            "heedful_inter_token_latency_seconds", "Between tokens of a completion.", _LATENCY_S
        )
        self.e2e_request_latency = self._histogram(
            "heedful_e2e_request_latency_seconds", "Call received to last token.", _REQUEST_S
        )
        self.queue_time = self._histogram(
            "heedful_request_queue_time_seconds", "Submitted to first scheduled.", _REQUEST_S
        )
        self.prefill_time = self._histogram(
            "heedful_request_prefill_time_seconds", "First scheduled to first token.", _REQUEST_S
        )
        self.decode_time = self._histogram(
            "heedful_request_decode_time_seconds", "First token to last token.", _REQUEST_S
        )

    def _make_size_metrics(self) -> None:
        self.prompt_tokens = self._histogram(
            "heedful_request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS
        )
        self.generation_tokens = self._histogram(
            "heedful_request_generation_tokens", "Tokens of a completion.", _TOKENS
        )
        self.params_n = self._histogram(
            "heedful_request_params_n", "Completions asked for.", (1, 2, 4, 8, 16)
        )
        self.params_max_tokens = self._histogram(
            "heedful_request_params_max_tokens", "Most tokens asked for.", _TOKENS
        )

    def _make_rpc_metrics(self) -> None:
        self.request_success = self._counter(
            "heedful_request_success", "Completions by how they ended.", ("finished_reason",)
        )
        self.rejects = self._counter(
            "heedful_requests_rejected", "Calls that were not answered, by reason.", ("reason",)
        )
        self.rpc_started = self._counter(
            "heedful_rpc_started", "Calls received, by method.", ("method",)
        )
        self.rpc_handled = self._counter(
            "heedful_rpc_handled", "Calls ended, by method and status.", ("method", "code")
        )
        self.sequences_in_flight = self._gauge(
            "heedful_sequences_in_flight", "Sequences admitted and not ended yet.", ()
        )

    def observe_finish(self, finish: Finish) -> None:
        """Record how one completion ended."""
        self.request_success.labels(finish.reason).inc()
        self.generation_tokens.observe(finish.completion_tokens)
        self.queue_time.observe(finish.queue_s)
        self.prefill_time.observe(finish.prefill_s)
        self.decode_time.observe(finish.decode_s)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)


class EngineMetrics(Collector):
    """The engine's figures: the last report, turned into metrics at each scrape."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.info: EngineInfo | None = None
        self.up = False
        self.num_restarts = 0
        self._past = EngineStats()
        self._iteration_tokens = Histogram(
            "heedful_iteration_tokens", "Tokens of a step.", buckets=_STEP_TOKENS, registry=None
        )
        self._step_time = Histogram(
            "heedful_step_time_seconds", "Time of a step.", buckets=_LATENCY_S, registry=None
        )
        self._step_bandwidth = Histogram(
            "heedful_step_bandwidth_ratio",
            "Bytes of weights and cache that a step must read, each once, over its time and the "
            "copy bandwidth measured at start-up; above 1 where caches hold them, low for prompts.",
            buckets=_SHARES,
            registry=None,
        )

    def take(self, stats: EngineStats) -> None:
        """Keep a report of the engine; a report with fewer steps comes from a new child."""
        if stats.steps < self.stats.steps:
            self._past = _add(self._past, self.stats)
        self.stats = stats
        if stats.step_tokens:
            self._iteration_tokens.observe(stats.step_tokens)
            self._step_time.observe(stats.step_s)
            bytes_per_s = 0.0 if self.info is None else self.info.memory_bytes_per_s
            if stats.step_bytes and bytes_per_s and stats.step_s:
                self._step_bandwidth.observe(stats.step_bytes / stats.step_s / bytes_per_s)

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without values, as registering asks for."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's metrics."""
        stats, total = self.stats, _add(self._past, self.stats)
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield _gauge("heedful_engine_up", "Whether the engine serves.", self.up)
        yield _gauge("heedful_num_requests_running", "Sequences being run.", stats.num_running)
        yield _gauge("heedful_num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        yield _gauge("heedful_kv_cache_usage_ratio", "Share of KV blocks in use.", used)
        yield _gauge("heedful_kv_cache_blocks", "KV blocks.", stats.num_blocks)
        yield _gauge(
            "heedful_prefix_cache_blocks", "KV blocks kept for reuse.", stats.num_cached_blocks
        )
        yield _counter("heedful_engine_restarts", "Engine restarts.", self.num_restarts)
        yield _counter("heedful_num_preemptions", "Sequences preempted.", total.preemptions)
        yield _counter(
            "heedful_prefix_cache_queries", "Prompt tokens looked up.", total.prefix_cache_queries
        )
        yield _counter(
            "heedful_prefix_cache_hits", "Prompt tokens found cached.", total.prefix_cache_hits
        )
        yield _counter("heedful_prompt_tokens", "Prompt tokens processed.", total.prompt_tokens)
        yield _counter("heedful_generation_tokens", "Tokens sampled.", total.generation_tokens)
        yield self._fallbacks(total)
        yield from self._adapters(total)
        yield self._model_info()
        yield from self._iteration_tokens.collect()
        yield from self._step_time.collect()
        yield from self._step_bandwidth.collect()
        yield _gauge(
            "heedful_memory_bandwidth_bytes_per_second",
            "What a copy reads and writes on the engine's device, measured at start-up.",
            0.0 if self.info is None else self.info.memory_bytes_per_s,
        )

    def _fallbacks(self, total: EngineStats) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "heedful_kernel_fallbacks",
            'Calls of a slower path, by kernel and reason; kernel is "decoder" where all are.',
            labels=["kernel", "reason"],
        )
        for name, count in total.kernel_fallbacks.items():
            kernel, _, reason = name.rpartition(":")
            family.add_metric([kernel or "decoder", reason], count)
        return family

    def _adapters(self, total: EngineStats) -> Iterator[Metric]:
        stats = self.stats
        yield _gauge("heedful_adapter_slots_used", "Adapters in slots.", stats.num_adapters)
        yield _gauge("heedful_adapter_slots", "Slots for adapters.", stats.num_adapter_slots)
        yield _gauge("heedful_adapter_bytes", "Bytes of loaded adapters.", stats.adapter_bytes)
        requests = GaugeMetricFamily(
            "heedful_lora_requests_info",
            "Unfinished requests of each adapter that is loaded.",
            labels=["adapter"],
        )
        for adapter_id, count in self.stats.adapter_requests.items():
            requests.add_metric([adapter_id[:12]], count)
        loads = CounterMetricFamily(
            "heedful_adapter_loads", "Loads of adapters by outcome.", labels=["outcome"]
        )
        for outcome, count in total.adapter_loads.items():
            loads.add_metric([outcome], count)
        yield from (requests, loads)
        seconds = total.adapter_load_s
        yield _counter("heedful_adapter_load_seconds", "Time spent loading adapters.", seconds)

    def _model_info(self) -> GaugeMetricFamily:
        labels = ["base_model", "quantization", "kernel_path", "device"]
        family = GaugeMetricFamily("heedful_model_info", "What is served.", labels=labels)
        if self.info is not None:
            info = self.info
            values = [info.base_model, info.quantization, info.kernel_path, info.device]
            family.add_metric(values, 1)
        return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _add(past: EngineStats, now: EngineStats) -> EngineStats:
    """Return the counters of both; the other fields are left at zero."""
    return EngineStats(
        preemptions=past.preemptions + now.preemptions,
        prefix_cache_queries=past.prefix_cache_queries + now.prefix_cache_queries,
        prefix_cache_hits=past.prefix_cache_hits + now.prefix_cache_hits,
        prompt_tokens=past.prompt_tokens + now.prompt_tokens,
        generation_tokens=past.generation_tokens + now.generation_tokens,
        steps=past.steps + now.steps,
        kernel_fallbacks=_add_each(past.kernel_fallbacks, now.kernel_fallbacks),
        adapter_loads=_add_each(past.adapter_loads, now.adapter_loads),
        adapter_load_s=past.adapter_load_s + now.adapter_load_s,
    )


def _add_each(past: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: past.get(name, 0) + now.get(name, 0) for name in sorted(past.keys() | now.keys())}
