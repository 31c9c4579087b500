"""The synchronous client: the same answers and errors as the asynchronous one, from any thread."""

import inspect
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import heedful
import pytest
from heedful import AsyncClient, Client, FinishReason


@pytest.fixture
def client(server):
    with Client(server.target, timeout_s=10) as client:
        yield client


def public_methods(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_methods():
    assert public_methods(Client) == public_methods(AsyncClient)


def test_both_clients_take_the_same_arguments():
    for name in public_methods(Client) | {"__init__"}:
        expected = inspect.signature(getattr(AsyncClient, name)).parameters
        assert list(inspect.signature(getattr(Client, name)).parameters) == list(expected), name


def test_methods_keep_name_and_docstring():
    assert Client.generate.__name__ == "generate"
    assert "whole completions" in Client.generate.__doc__


async def test_answers_equal_those_of_the_asynchronous_client(server):
    with Client(server.target) as client:
        async with AsyncClient(server.target) as core:
            options = {"n": 2, "seed": 3, "logprobs": True}
            assert client.generate("ab", **options) == await core.generate("ab", **options)
            stream, core_stream = client.stream("ab", **options), core.stream("ab", **options)
            assert list(stream) == [delta async for delta in core_stream]
            assert stream.generation == core_stream.generation
            assert client.score([("p", "c")]) == await core.score([("p", "c")])
            assert client.tokenize("ab") == await core.tokenize("ab")
            assert client.detokenize([97]) == await core.detokenize([97])
            assert client.list_models() == await core.list_models()
            assert client.health() == await core.health()


def test_errors_are_the_same(client, script, refusal):
    script.refusals = [refusal(grpc.StatusCode.INVALID_ARGUMENT, "no", field="n")]
    with pytest.raises(heedful.InvalidRequest) as caught:
        client.generate("x")
    assert caught.value.field == "n"


def test_texts_and_head(client):
    stream = client.stream("hello")
    assert stream.head().policy_version == "base"
    assert "".join(stream.texts()) == "hello"


def test_many_threads_share_one_client(client):
    with ThreadPoolExecutor(8) as pool:
        texts = [f"call {i}" for i in range(32)]
        assert list(pool.map(lambda text: client.generate(text).text, texts)) == texts


def test_leaving_the_loop_early_cancels_on_the_server(client, script, eventually):
    script.delay_s = 0.05
    stream = client.stream("a" * 1000)
    for _ in stream:
        break
    assert eventually(script.cancelled.is_set)
    assert stream.generation.completions[0].finish_reason is FinishReason.CANCELLED


def test_leaving_the_with_block_cancels_on_the_server(client, script, eventually):
    script.delay_s = 0.05
    with client.stream("a" * 1000) as stream:
        stream.head()
    assert eventually(script.cancelled.is_set)


def test_interrupting_a_wait_cancels_on_the_server(server, script, eventually):
    script.delay_s = 30
    program = (
        "import heedful, os, signal, sys, threading\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with heedful.Client(sys.argv[1]) as client:\n"
        "    try:\n"
        "        client.generate('x')\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
        "    print(client.tokenize('ab').token_ids)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.target], capture_output=True, text=True, timeout=20
    )
    assert done.stdout == "interrupted\n(97, 98)\n"
    assert done.stderr == ""
    assert eventually(script.cancelled.is_set)


def test_a_client_that_nobody_closes_lets_the_program_end_quietly(server):
    program = "import heedful, sys; print(heedful.Client(sys.argv[1]).generate('hi').text)"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program, server.target],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("hi\n", "", 0)


def test_closing_ends_the_thread_and_may_be_repeated(server):
    before = threading.active_count()
    client = Client(server.target)
    client.generate("x")
    client.close()
    client.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")


def test_closing_in_the_middle_of_a_stream_leaves_nothing_behind(server, script, eventually):
    script.delay_s = 0.05
    with Client(server.target) as client:
        stream = client.stream("a" * 1000)
        next(iter(stream))
    assert eventually(script.cancelled.is_set)
    stream.cancel()


def test_the_quickstart_runs(server):
    quickstart = Path(__file__).parents[2] / "examples" / "quickstart.py"
    program = quickstart.read_text(encoding="utf-8").replace(
        "Client()", f"Client({server.target!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "What is the capital of France?\n"
    assert done.stderr == ""


def test_a_client_collected_on_its_own_thread_does_not_hang(server, eventually):
    client = Client(server.target)
    client.generate("x")
    thread = next(item for item in threading.enumerate() if item.name == "heedful-client")
    # The cyclic garbage collector may run on the client's own loop; this does what it would do.
    run_on_loop, last_reference = client._thread.call, [client]
    del client
    run_on_loop(last_reference.clear)
    assert eventually(lambda: not thread.is_alive())
