"""The load generator: the arithmetic by hand, and the load against the small server."""

from datetime import UTC, datetime

import grpc
import pytest
from heedful import NotConnected
from heedful.bench import BenchConfig, bench, run_bench
from heedful.bench_report import Trace, percentiles_ms, report
from heedful_proto.v1 import inference_pb2 as pb


def test_percentiles_are_nearest_ranks_in_milliseconds():
    found = percentiles_ms([i / 1000 for i in range(100, -1, -1)])
    assert (found.p50, found.p90, found.p99, found.max) == (50, 90, 99, 100)
    assert found.mean == pytest.approx(50)
    assert percentiles_ms([]) is None
    assert percentiles_ms([0.002]).p99 == 2


def make_trace(start_s: float, arrivals: list[tuple[float, int]], prompt_tokens: int) -> Trace:
    trace = Trace(start_s=start_s, end_s=arrivals[-1][0])
    trace.times_s = [start_s + 0.001, *(time_s for time_s, _ in arrivals)]
    trace.counts = [0, *(tokens for _, tokens in arrivals)]
    tokens = sum(tokens for _, tokens in arrivals)
    trace.usage = pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens)
    return trace


def test_figures_of_two_requests_worked_by_hand():
    traces = [
        make_trace(0.0, [(0.1, 1), (0.3, 4), (0.4, 1)], prompt_tokens=10),
        make_trace(0.0, [(0.2, 1), (0.7, 5)], prompt_tokens=10),
        Trace(start_s=0.0, error="UNAVAILABLE"),
    ]
    config = BenchConfig(concurrency=2)
    found = report(config, traces, started=datetime.now(UTC), wall_s=0.8, client_cpu_share=0.1)
    assert (found.num_ok, found.errors) == (2, {"UNAVAILABLE": 1})
    assert (found.prompt_tokens, found.output_tokens) == (20, 12)
    assert found.output_tokens_per_s == pytest.approx(12 / 0.8)
    assert found.total_tokens_per_s == pytest.approx(32 / 0.8)
    # (4 + 1) tokens in 0.3 s and 5 tokens in 0.5 s, two streams at a time.
    assert found.decode_tokens_per_s == pytest.approx(2 * 10 / 0.8)
    # The head, one millisecond after the start, holds no token and is not a first token.
    assert found.ttft_ms.max == pytest.approx(200)
    assert found.ttft_ms.mean == pytest.approx(150)
    # Gaps of 0.2, 0.1 and 0.5 s between messages.
    assert found.inter_message_ms.mean == pytest.approx(800 / 3)
    # By token: four of 50 ms, one of 100 ms, five of 100 ms.
    assert found.inter_token_ms.mean == pytest.approx((4 * 50 + 6 * 100) / 10)
    assert found.inter_token_ms.max == pytest.approx(100)
    assert found.tokens_per_message == pytest.approx(12 / 5)


def test_a_run_in_which_everything_failed_has_no_times():
    traces = [Trace(start_s=0.0, error="INTERNAL")]
    found = report(
        BenchConfig(), traces, started=datetime.now(UTC), wall_s=1.0, client_cpu_share=0.0
    )
    assert found.num_ok == 0
    assert found.ttft_ms is None
    assert found.decode_tokens_per_s is None
    assert found.served_by == {}


def test_the_load_is_what_was_asked_for(server, script):
    config = BenchConfig(
        target=server.target,
        concurrency=3,
        num_requests=7,
        num_warmup=2,
        prompt_tokens=10,
        output_tokens=6,
    )
    found = bench(config)
    assert (found.num_ok, found.errors) == (7, {})
    assert (found.prompt_tokens, found.output_tokens) == (70, 42)
    assert found.tokens_per_message == 2
    assert found.served_by == {
        "base_model": "Echo-1",
        "policy_version": "base",
        "quantization": "q4_1",
    }
    assert len(script.requests) == 9
    assert all(request.sampling.ignore_eos for request in script.requests)
    prompts = [tuple(request.prompt.token_ids.ids) for request in script.requests]
    assert len(set(prompts)) == 9
    assert all(len(prompt) == 10 for prompt in prompts)


def test_the_same_seed_makes_the_same_prompts(server, script):
    config = BenchConfig(target=server.target, num_requests=3, num_warmup=0, output_tokens=1)
    bench(config)
    bench(config)
    prompts = [request.prompt for request in script.requests]
    assert prompts[:3] == prompts[3:]


async def test_concurrency_is_held_and_never_passed(server, script):
    script.delay_s = 0.05
    config = BenchConfig(
        target=server.target, concurrency=4, num_requests=8, num_warmup=0, output_tokens=4
    )
    found = await run_bench(config)
    # Two rounds of four, each of two messages 50 ms apart.
    assert found.wall_s >= 0.2
    assert found.inter_message_ms.p50 >= 45
    assert script.max_in_flight == 4


def test_a_duration_ends_the_load(server, script):
    script.delay_s = 0.02
    config = BenchConfig(
        target=server.target, concurrency=2, duration_s=0.3, output_tokens=2, streaming=False
    )
    found = bench(config)
    assert 0.3 <= found.wall_s < 5.0
    # Two at a time, none shorter than 20 ms.
    assert 2 <= found.num_ok <= 32
    assert found.ttft_ms is None
    assert found.request_ms.p50 >= 20


def test_a_fixed_text_is_sent_as_one_user_message(server, script):
    bench(BenchConfig(target=server.target, text="hi", num_requests=1, output_tokens=3))
    assert script.requests[0].prompt.chat.messages[0].content == "hi"


def test_failures_are_counted_by_status_and_nowhere_else(server, script, refusal):
    config = BenchConfig(target=server.target, num_requests=4, num_warmup=0, text="hi")
    # Not retried either: a refusal is a result here.
    script.refusals = [refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.01)]
    found = bench(config)
    assert found.errors == {"RESOURCE_EXHAUSTED": 1}
    assert found.num_ok == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"num_requests": 0},
        {"output_tokens": 0},
        {"duration_s": 0.0},
        {"num_requests": 1, "duration_s": 1.0},
    ],
)
def test_a_load_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"positive|not both"):
        bench(BenchConfig(**wrong))


def test_no_server_is_an_error_and_not_a_figure(server):
    server.stop()
    with pytest.raises(NotConnected):
        bench(BenchConfig(target=server.target))
