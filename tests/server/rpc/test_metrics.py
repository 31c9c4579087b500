"""Metrics: names, what counts in them, and the engine's figures across its restarts."""

import httpx
import pytest
from heedful_proto.v1 import inference_pb2 as pb
from heedful_server.metrics import EngineMetrics, Metrics
from heedful_server.protocol import EngineInfo, EngineStats
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families


def request(n: int = 1, **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=pb.Prompt(text="abc"), n=n, sampling=pb.SamplingParams(**sampling)
    )


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=f"http://{server.http_address}") as client:
        yield client


async def test_served_metrics_have_the_names_that_dashboards_use(http, stub):
    await stub.Generate(request(max_tokens=2))
    text = (await http.get("/metrics")).text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert names >= {
        "heedful_num_requests_running",
        "heedful_num_requests_waiting",
        "heedful_kv_cache_usage_ratio",
        "heedful_prefix_cache_queries",
        "heedful_prefix_cache_hits",
        "heedful_num_preemptions",
        "heedful_prompt_tokens",
        "heedful_generation_tokens",
        "heedful_time_to_first_token_seconds",
        "heedful_inter_token_latency_seconds",
        "heedful_e2e_request_latency_seconds",
        "heedful_request_queue_time_seconds",
        "heedful_request_prefill_time_seconds",
        "heedful_request_decode_time_seconds",
        "heedful_request_success",
        "heedful_request_params_n",
        "heedful_request_params_max_tokens",
        "heedful_request_prompt_tokens",
        "heedful_request_generation_tokens",
        "heedful_rpc_started",
        "heedful_rpc_handled",
        "heedful_requests_rejected",
        "heedful_engine_restarts",
        "heedful_engine_up",
        "heedful_iteration_tokens",
        "heedful_build_info",
        "heedful_model_info",
    }
    assert all(name.startswith("heedful_") for name in names)


async def test_latency_buckets_begin_at_a_millisecond(http, stub):
    text = (await http.get("/metrics")).text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert f'heedful_{name}_seconds_bucket{{le="0.001"}}' in text


async def test_one_request_counts_where_it_should(server, stub):
    await stub.Generate(request(n=2, max_tokens=5))
    value = server.metrics.registry.get_sample_value
    assert value("heedful_time_to_first_token_seconds_count") == 1
    assert value("heedful_e2e_request_latency_seconds_count") == 1
    assert value("heedful_inter_token_latency_seconds_count") == 2 * 4
    assert value("heedful_request_success_total", {"finished_reason": "length"}) == 2
    assert value("heedful_request_generation_tokens_sum") == 10
    assert value("heedful_request_prompt_tokens_sum") == 3
    assert value("heedful_request_params_n_sum") == 2
    assert value("heedful_request_params_max_tokens_sum") == 5
    method = "/heedful.v1.InferenceService/Generate"
    assert value("heedful_rpc_started_total", {"method": method}) == 1
    assert value("heedful_rpc_handled_total", {"method": method, "code": "OK"}) == 1
    assert value("heedful_generation_tokens_total") == 10
    assert value("heedful_kv_cache_usage_ratio") == 0.25


async def test_model_is_described(server):
    labels = {
        "base_model": "byte-model",
        "quantization": "none",
        "kernel_path": "toy",
        "device": "cpu",
    }
    assert server.metrics.registry.get_sample_value("heedful_model_info", labels) == 1
    assert server.metrics.registry.get_sample_value("heedful_engine_up") == 1


def test_counters_of_the_engine_outlive_its_restart():
    metrics = EngineMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    metrics.take(EngineStats(steps=10, generation_tokens=100, kernel_fallbacks={"a": 2}))
    metrics.take(EngineStats())
    later = {"a": 1, "nf4_matmul:columns": 5}
    metrics.take(EngineStats(steps=1, generation_tokens=7, kernel_fallbacks=later))
    value = registry.get_sample_value
    assert value("heedful_generation_tokens_total") == 107
    name = "heedful_kernel_fallbacks_total"
    assert value(name, {"kernel": "decoder", "reason": "a"}) == 3
    assert value(name, {"kernel": "nf4_matmul", "reason": "columns"}) == 5


def test_steps_are_compared_with_the_memory_s_bandwidth():
    metrics = EngineMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    value = registry.get_sample_value
    # Before the engine has said how fast the memory is there is nothing to compare with.
    metrics.take(EngineStats(steps=1, step_tokens=1, step_s=0.5, step_bytes=10))
    assert value("heedful_step_bandwidth_ratio_count") == 0
    metrics.info = EngineInfo(
        base_model="m",
        architecture="llama",
        quantization="nf4",
        kernel_path="triton",
        device="cuda",
        vocab_size=9,
        context_tokens=9,
        num_blocks=1,
        block_size=1,
        weight_bytes=10,
        kv_cache_bytes=1,
        hidden_size=1,
        num_layers=1,
        memory_bytes_per_s=100.0,
    )
    metrics.take(EngineStats(steps=2, step_tokens=1, step_s=0.5, step_bytes=20))
    metrics.take(EngineStats(steps=2))
    assert value("heedful_step_bandwidth_ratio_sum") == pytest.approx(0.4)
    assert value("heedful_step_bandwidth_ratio_count") == 1
    assert value("heedful_memory_bandwidth_bytes_per_second") == 100.0


def test_adapters_say_how_much_room_they_take():
    metrics = EngineMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    metrics.take(EngineStats(num_adapters=2, num_adapter_slots=8, adapter_bytes=4096))
    assert registry.get_sample_value("heedful_adapter_slots") == 8
    assert registry.get_sample_value("heedful_adapter_slots_used") == 2
    assert registry.get_sample_value("heedful_adapter_bytes") == 4096


def test_steps_are_counted_by_their_tokens():
    metrics = EngineMetrics()
    registry = CollectorRegistry()
    registry.register(metrics)
    metrics.take(EngineStats(steps=1, step_tokens=30, step_s=0.004))
    metrics.take(EngineStats(steps=1))
    assert registry.get_sample_value("heedful_iteration_tokens_sum") == 30
    assert registry.get_sample_value("heedful_step_time_seconds_count") == 1


def test_two_servers_in_one_process_share_nothing():
    first, second = Metrics(), Metrics()
    first.rejects.labels("queue_full").inc()
    labels = {"reason": "queue_full"}
    assert second.registry.get_sample_value("heedful_requests_rejected_total", labels) is None
