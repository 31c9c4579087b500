"""Errors, retries, deadlines and cancellation: what a caller can rely on when things go wrong."""

import asyncio
import math
import socket
import time

import grpc
import heedful
import pytest
from heedful import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    HeedfulError,
    InvalidRequest,
    NotConnected,
    QueueFull,
    ServerFault,
    Unavailable,
)
from heedful.errors import error_from_rpc
from heedful.transport import retry_delay_s

Code = grpc.StatusCode


@pytest.fixture
async def client(server):
    async with AsyncClient(server.target, timeout_s=10) as client:
        yield client


async def read_all(stream):
    return [delta async for delta in stream]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, heedful.InvalidRequest),
        (Code.NOT_FOUND, heedful.NotFound),
        (Code.ALREADY_EXISTS, heedful.AlreadyExists),
        (Code.FAILED_PRECONDITION, heedful.FailedPrecondition),
        (Code.UNAUTHENTICATED, heedful.Unauthenticated),
        (Code.PERMISSION_DENIED, heedful.PermissionDenied),
        (Code.RESOURCE_EXHAUSTED, heedful.QueueFull),
        (Code.UNIMPLEMENTED, heedful.Unimplemented),
        (Code.DEADLINE_EXCEEDED, heedful.DeadlineExceeded),
        (Code.UNAVAILABLE, heedful.Unavailable),
        (Code.INTERNAL, heedful.ServerFault),
        (Code.DATA_LOSS, heedful.ServerFault),
        (Code.CANCELLED, heedful.Cancelled),
    ],
)
async def test_each_status_has_its_error_and_is_not_retried(client, script, refusal, code, kind):
    script.refusals = [refusal(code, "what is wrong", reason="WHY")]
    with pytest.raises(HeedfulError) as caught:
        await client.generate("x")
    assert type(caught.value) is kind
    assert caught.value.message == "what is wrong"
    assert caught.value.reason == "WHY"
    assert caught.value.request_id == "req-1"
    assert script.attempts == 1


async def test_an_invalid_request_names_the_field(client, script, refusal):
    script.refusals = [refusal(Code.INVALID_ARGUMENT, "too hot", field="sampling.temperature")]
    with pytest.raises(InvalidRequest) as caught:
        await client.generate("x", temperature=1000)
    assert caught.value.field == "sampling.temperature"
    assert caught.value.violations[0].description == "too hot"


def test_garbled_details_do_not_hide_the_status():
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    rpc_error = grpc.aio.AioRpcError(Code.NOT_FOUND, grpc.aio.Metadata(), trailing, "no such")
    error = error_from_rpc(rpc_error)
    assert isinstance(error, heedful.NotFound)
    assert error.message == "no such"


async def test_a_full_queue_is_retried_after_the_time_the_server_names(client, script, refusal):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "full", retry_after_s=0.2)] * 2
    started_s = time.monotonic()
    generation = await client.generate("x")
    assert generation.text == "x"
    assert script.attempts == 3
    assert time.monotonic() - started_s >= 0.4


async def test_a_full_queue_without_a_time_is_not_retried(client, script, refusal):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "quota")]
    with pytest.raises(QueueFull) as caught:
        await client.generate("x")
    assert caught.value.retry_after_s is None
    assert script.attempts == 1


async def test_attempts_are_bounded(server, script, refusal):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "full", retry_after_s=0.01)] * 10
    async with AsyncClient(server.target, max_attempts=3) as client:
        with pytest.raises(QueueFull):
            await client.generate("x")
    assert script.attempts == 3


async def test_a_retry_that_cannot_fit_the_deadline_is_not_waited_for(client, script, refusal):
    script.refusals = [refusal(Code.RESOURCE_EXHAUSTED, "full", retry_after_s=60)]
    started_s = time.monotonic()
    with pytest.raises(QueueFull) as caught:
        await client.generate("x", timeout_s=5)
    assert time.monotonic() - started_s < 2
    assert caught.value.retry_after_s == 60


@pytest.mark.parametrize("reason", ["ENGINE_UNAVAILABLE", ""])
async def test_a_unary_generation_that_may_have_begun_is_not_retried(
    client, script, refusal, reason
):
    script.refusals = [refusal(Code.UNAVAILABLE, "engine died", reason=reason)]
    with pytest.raises(Unavailable):
        await client.generate("x")
    assert script.attempts == 1


async def test_a_refusal_while_draining_is_retried(client, script, refusal):
    script.refusals = [refusal(Code.UNAVAILABLE, "draining", reason="DRAINING")]
    assert (await client.generate("x")).text == "x"
    assert script.attempts == 2


async def test_unavailable_with_a_time_is_retried(client, script, refusal):
    script.refusals = [refusal(Code.UNAVAILABLE, "loading", retry_after_s=0.01)]
    assert (await client.generate("x")).text == "x"
    assert script.attempts == 2


async def test_a_stream_is_retried_before_its_head(client, script, refusal):
    script.refusals = [refusal(Code.UNAVAILABLE, "loading")]
    deltas = await read_all(client.stream("abc"))
    assert "".join(delta.text for delta in deltas) == "abc"
    assert script.attempts == 2


@pytest.mark.parametrize("num_messages", [1, 2])
async def test_a_stream_that_has_begun_is_never_retried(client, script, refusal, num_messages):
    broken = refusal(Code.UNAVAILABLE, "engine died", retry_after_s=0.01)
    script.refuse_after_messages = (num_messages, broken)
    stream = client.stream("abcd")
    with pytest.raises(Unavailable):
        await read_all(stream)
    assert script.attempts == 1
    completion = stream.generation.completions[0]
    assert completion.text == "ab" * (num_messages - 1)
    assert completion.finish_reason is None
    assert completion.completion_token == "token-0"


@pytest.mark.parametrize("call", ["score", "tokenize", "detokenize"])
async def test_pure_calls_are_retried(client, script, refusal, call):
    script.refusals = [refusal(Code.UNAVAILABLE, "restarting")] * 2
    argument = {"score": [("p", "c")], "tokenize": "a", "detokenize": [97]}[call]
    await getattr(client, call)(argument)
    assert script.attempts == 3


def test_delays_grow_are_jittered_and_bounded():
    error = NotConnected("down")
    delays = [[retry_delay_s(error, idx, False) for _ in range(50)] for idx in range(10)]
    assert 0.05 <= min(delays[0]) < max(delays[0]) <= 0.1
    assert min(delays[3]) >= 0.4
    assert max(delays[9]) <= 5.0
    assert retry_delay_s(ServerFault("bug"), 0, True) is None


async def test_nothing_at_the_target_is_not_connected_and_quick(server):
    server.stop()
    async with AsyncClient(server.target) as client:
        started_s = time.monotonic()
        with pytest.raises(NotConnected, match=server.target):
            await client.generate("x")
        with pytest.raises(NotConnected):
            await client.stream("x").head()
    assert time.monotonic() - started_s < 5


async def test_a_call_meets_a_server_that_starts_meanwhile(server, script):
    server.stop()
    async with AsyncClient(server.target, max_attempts=20) as client:
        call = asyncio.create_task(client.generate("x"))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)
        assert (await call).text == "x"
    assert script.attempts == 1


async def test_a_client_outlives_a_restart_of_the_server(server, client):
    await client.generate("x")
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    assert (await client.generate("y")).text == "y"


async def test_the_deadline_ends_a_call_and_reaches_the_server(client, script, eventually):
    script.delay_s = 30
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout_s=0.2)
    assert time.monotonic() - started_s < 2
    assert await asyncio.to_thread(eventually, script.cancelled.is_set)


async def test_the_deadline_ends_a_stream_and_keeps_what_came(client, script):
    script.delay_s = 0.1
    prompt = "abcdefgh" * 10
    stream = client.stream(prompt, timeout_s=1.5)
    with pytest.raises(DeadlineExceeded):
        await read_all(stream)
    text = stream.generation.text
    assert text
    assert prompt.startswith(text)
    assert text != prompt


async def test_the_deadline_holds_for_connecting_too():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        async with AsyncClient(target) as client:
            with pytest.raises(DeadlineExceeded, match=target):
                await client.generate("x", timeout_s=0.3)


async def test_an_infinite_timeout_is_no_deadline(client):
    assert (await client.generate("x", timeout_s=math.inf)).text == "x"


async def test_cancelling_the_task_reaches_the_server(client, script, eventually):
    script.delay_s = 30
    task = asyncio.create_task(client.generate("x"))
    assert await asyncio.to_thread(eventually, lambda: script.attempts == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(eventually, script.cancelled.is_set)


async def test_leaving_the_loop_early_cancels_the_stream(client, script, eventually):
    script.delay_s = 0.05
    stream = client.stream("a" * 1000)
    async for _ in stream:
        break
    assert await asyncio.to_thread(eventually, script.cancelled.is_set)
    completion = stream.generation.completions[0]
    assert completion.text == "aa"
    assert completion.finish_reason is heedful.FinishReason.CANCELLED


async def test_cancel_from_another_task_ends_the_iteration_quietly(client, script, eventually):
    script.delay_s = 0.05
    stream = client.stream("a" * 1000)
    await stream.head()
    reader = asyncio.create_task(read_all(stream))
    await asyncio.sleep(0.2)
    stream.cancel()
    assert len(await reader) >= 1
    assert await asyncio.to_thread(eventually, script.cancelled.is_set)


async def test_a_timeout_around_the_loop_is_not_swallowed(client, script, eventually):
    script.delay_s = 0.05
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await read_all(client.stream("a" * 1000))
    assert await asyncio.to_thread(eventually, script.cancelled.is_set)


async def test_a_finished_stream_is_not_marked_cancelled_by_leaving_it(client):
    async with client.stream("abc") as stream:
        await read_all(stream)
    assert stream.generation.completions[0].finish_reason is heedful.FinishReason.STOP


async def test_wait_ready_waits_while_the_server_loads(client, server):
    server.set_ready(False)
    waiting = asyncio.create_task(client.wait_ready(10))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await asyncio.to_thread(server.set_ready, True)
    await waiting


async def test_wait_ready_gives_up_in_time(client, server):
    server.set_ready(False)
    with pytest.raises(Unavailable, match="not ready") as caught:
        await client.wait_ready(0.5)
    assert not isinstance(caught.value, NotConnected)


async def test_wait_ready_needs_less_patience_where_nothing_answers(server):
    server.stop()
    async with AsyncClient(server.target) as client:
        started_s = time.monotonic()
        with pytest.raises(NotConnected):
            await client.wait_ready(60, connect_timeout_s=0.5)
    assert time.monotonic() - started_s < 5


async def test_closing_ends_calls_in_flight(server, script, eventually):
    script.delay_s = 30
    client = AsyncClient(server.target)
    task = asyncio.create_task(client.generate("x"))
    assert await asyncio.to_thread(eventually, lambda: script.attempts == 1)
    await client.close()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await task
