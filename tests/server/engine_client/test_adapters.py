"""Adapters through a real child: swaps under load, what a crash takes away, who waits for what."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from heedful_server.engine_client.adapters import AdapterTable
from heedful_server.engine_client.client import EngineClient, EngineState
from heedful_server.errors import EngineRequestError, EngineUnavailable
from heedful_server.protocol import (
    AdapterLoaded,
    AdapterUnloaded,
    EngineConfig,
    SamplingParams,
    Score,
    ScoreItem,
    Submit,
    UnloadAdapter,
)

IDS = list(b"heedful")


@pytest.fixture(scope="module")
def adapter_dirs(tiny_model_dir: Path, save_adapter: Callable[..., Path]) -> list[Path]:
    return [save_adapter(tiny_model_dir, seed=i, heads=2) for i in range(3)]


@pytest.fixture
async def engine(tiny_model_dir: Path) -> AsyncIterator[EngineClient]:
    config = EngineConfig(
        str(tiny_model_dir), "int4", device="cpu", num_threads=1, max_adapters=2, log_level="error"
    )
    states: list[EngineState] = []
    client = EngineClient(config, on_state=states.append, on_stats=lambda stats: None)
    await client.start()
    await client.wait_ready()
    yield client
    await client.stop()


async def answer(
    engine: EngineClient, request_id: str, policy: str, max_tokens: int = 8
) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    stream = engine.submit(Submit(request_id, IDS, 1, sampling, policy=policy))
    tokens: list[int] = []
    try:
        while True:
            for delta in await stream.next():
                tokens += delta.token_ids
    except StopAsyncIteration:
        return tokens


async def test_swaps_under_load_fail_no_request_and_change_no_answer(
    engine: EngineClient, adapter_dirs: list[Path]
) -> None:
    await engine.load_adapter("0", str(adapter_dirs[0]), "policy")
    expected = {policy: await answer(engine, f"e{policy}", policy, 40) for policy in ("base", "0")}
    assert expected["base"] != expected["0"]
    num_answers = 0
    swapping = True

    async def user(number: int) -> None:
        nonlocal num_answers
        while swapping:
            policy = ("base", "0")[num_answers % 2]
            num_answers += 1
            assert await answer(engine, f"u{num_answers}", policy, 40) == expected[policy]

    users = [asyncio.create_task(user(number)) for number in range(4)]
    for swap in range(30):
        adapter_id = f"swap-{swap}"
        info = await engine.load_adapter(adapter_id, str(adapter_dirs[swap % 3]), "policy")
        assert engine.adapters[adapter_id] == info
        assert info.rank == 4
        assert info.num_bytes > 0
        running = asyncio.create_task(answer(engine, f"s{swap}", adapter_id, 20))
        await asyncio.sleep(0)
        await engine.unload_adapter(adapter_id)
        # Whoever came before the unload was served to the end, and needs a turn to notice.
        await asyncio.sleep(0)
        assert len(running.result()) == 20
    swapping = False
    await asyncio.gather(*users)
    assert num_answers > 4
    assert list(engine.adapters) == ["0"]


async def test_a_crash_loses_all_adapters_and_says_so(
    engine: EngineClient, adapter_dirs: list[Path]
) -> None:
    await engine.load_adapter("p", str(adapter_dirs[0]), "policy")
    await engine.load_adapter("r", str(adapter_dirs[1]), "reward")
    assert engine.adapters["r"].num_heads == 2
    before = await answer(engine, "1", "p")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    loading = asyncio.create_task(engine.load_adapter("q", str(adapter_dirs[2]), "policy"))
    leaving = asyncio.create_task(engine.unload_adapter("r"))
    await asyncio.sleep(0.05)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable):
        await loading
    # What is gone needs no unloading any more.
    await leaving
    assert engine.adapters == {}
    with pytest.raises(EngineUnavailable):
        await engine.load_adapter("p", str(adapter_dirs[0]), "policy")
    await asyncio.wait_for(engine.wait_ready(), 60)
    with pytest.raises(EngineRequestError) as caught:
        await answer(engine, "2", "p")
    assert caught.value.kind == "not_loaded"
    assert caught.value.field == "policy"
    await engine.load_adapter("p", str(adapter_dirs[0]), "policy")
    assert await answer(engine, "3", "p") == before


async def test_refusals_reach_whoever_asked(
    engine: EngineClient, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    loads = [engine.load_adapter("p", str(adapter_dirs[0]), "policy") for _ in range(3)]
    assert len({info.num_bytes for info in await asyncio.gather(*loads)}) == 1
    with pytest.raises(EngineRequestError, match=r"adapter_config\.json") as caught:
        await engine.load_adapter("q", str(tmp_path), "policy")
    assert (caught.value.kind, caught.value.field) == ("invalid", "adapter")
    await engine.load_adapter("r", str(adapter_dirs[1]), "reward")
    with pytest.raises(EngineRequestError, match="all 2 adapter slots are taken") as caught:
        await engine.load_adapter("s", str(adapter_dirs[2]), "policy")
    assert caught.value.kind == "resource"
    item = ScoreItem(IDS, IDS)
    scored = await engine.score(Score("1", [item], policy="p", reward="r"))
    assert len(scored.rewards[0]) == 2
    assert len(scored.logprobs[0]) == len(IDS)
    with pytest.raises(EngineRequestError, match="not a reward model"):
        await engine.score(Score("2", [item], reward="p"))
    with pytest.raises(EngineRequestError, match="not a policy"):
        await answer(engine, "3", "r")
    assert sorted(engine.adapters) == ["p", "r"]
    await engine.unload_adapter("unknown")


async def test_a_cancelled_wait_leaves_the_adapter_where_it_comes_to_be(
    engine: EngineClient, adapter_dirs: list[Path]
) -> None:
    loading = asyncio.create_task(engine.load_adapter("p", str(adapter_dirs[0]), "policy"))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await asyncio.wait_for(engine.load_adapter("p", str(adapter_dirs[0]), "policy"), 10)
    assert list(engine.adapters) == ["p"]


async def test_an_unload_on_its_way_has_the_last_word() -> None:
    """The child's answer to the load crosses the unload that was sent after it."""
    sent: list[object] = []
    table = AdapterTable(sent.append)
    loading = asyncio.create_task(table.load("a", "/there", "policy"))
    await asyncio.sleep(0)
    leaving = asyncio.create_task(table.unload("a"))
    await asyncio.sleep(0)
    assert isinstance(sent[-1], UnloadAdapter)
    table.take_loaded(AdapterLoaded("load-1", "a", 10))
    with pytest.raises(EngineRequestError, match="unloaded again"):
        await loading
    assert table.loaded == {}
    assert not leaving.done()
    again = asyncio.create_task(table.load("a", "/there", "policy"))
    await asyncio.sleep(0)
    table.take_loaded(AdapterLoaded("load-3", "a", 10))
    assert (await again).num_bytes == 10
    with pytest.raises(EngineRequestError, match="loaded again before it had left"):
        await leaving
    assert list(table.loaded) == ["a"]
    table.take_unloaded(AdapterUnloaded("a"))
