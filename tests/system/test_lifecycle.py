"""Kills, storms and shutdowns of the real program: no call hangs, nothing is left behind."""

import asyncio
import random
import time
from collections import Counter

import heedful
import pytest
from heedful import FinishReason

NUM_CLIENTS = 64
LONG = {"max_tokens": 450, "ignore_eos": True}
# No call of a storm may take longer, however it ends: it waits for the engine's two restarts.
HANG_S = 60.0


def wait_restarted(server, dead_pid: int) -> None:
    def restarted() -> bool:
        return server.engine_pid not in (None, dead_pid) and server.get("/readyz")[0] == 200

    server.wait_until(restarted, "restart of the engine", 60)


async def test_killed_engine_ends_calls_as_unavailable_and_comes_back(launch, tiny_model_dir):
    with launch(tiny_model_dir) as server:
        async with heedful.AsyncClient(server.target, timeout_s=60) as client:
            stream = client.stream("hello", **LONG)
            await stream.next()
            dead_pid = server.kill_engine()
            with pytest.raises(heedful.Unavailable):
                await finish(stream)
            assert stream.generation.completions[0].token_ids
            assert (await client.health()).feedback is heedful.ServingStatus.SERVING
            await asyncio.to_thread(wait_restarted, server, dead_pid)
            assert server.metric("heedful_engine_restarts_total") == 1
            assert server.logged_value("exit_code") == "-9"
            answer = await client.generate("hello", max_tokens=4, ignore_eos=True)
            assert len(answer.completions[0].token_ids) == 4
        assert server.terminate() == 0


async def test_sigterm_lets_running_calls_finish_and_exits_with_0(launch, tiny_model_dir):
    with launch(tiny_model_dir) as server:
        async with heedful.AsyncClient(server.target, timeout_s=60, max_attempts=1) as client:
            streams = [client.stream("hello", seed=seed, **LONG) for seed in range(8)]
            await asyncio.gather(*[stream.next() for stream in streams])
            server.process.terminate()
            assert all(len(stream.generation.completions[0].token_ids) < 450 for stream in streams)
            ended = await asyncio.gather(*[finish(stream) for stream in streams])
            assert ended == [(FinishReason.LENGTH, 450)] * 8
        assert await asyncio.to_thread(server.process.wait, 30) == 0


async def finish(stream) -> tuple[FinishReason | None, int]:
    """Read a stream to its end; return why and after how many tokens it ended."""
    while await stream.next() is not None:
        pass
    (completion,) = stream.generation.completions
    return completion.finish_reason, len(completion.token_ids)


class Storm:
    """Clients that stream, cancel, run into deadlines or ask for whole answers, at random."""

    def __init__(self, target: str, seed: int) -> None:
        self._client = heedful.AsyncClient(target, timeout_s=HANG_S, max_attempts=1)
        self._seed = seed
        self.ends: Counter[str] = Counter()
        self.stopping = False

    async def run(self) -> None:
        """Run every client until `stopping`; raises TimeoutError where a call hangs."""
        async with self._client:
            await asyncio.gather(*[self._one_client(idx) for idx in range(NUM_CLIENTS)])

    async def _one_client(self, idx: int) -> None:
        chance = random.Random(f"{self._seed}/{idx}")
        call = [self._cancelled, self._cut_by_deadline, self._whole, self._several][idx % 4]
        while not self.stopping:
            try:
                self.ends[await asyncio.wait_for(call(chance), HANG_S)] += 1
            except heedful.HeedfulError as error:
                self.ends[type(error).__name__] += 1
                await asyncio.sleep(chance.uniform(0.05, 0.2))

    async def _cancelled(self, chance: random.Random) -> str:
        async with self._client.stream(prompt_of(chance), **LONG) as stream:
            for _ in range(chance.randint(0, 3)):
                await stream.next()
        return "cancelled"

    async def _cut_by_deadline(self, chance: random.Random) -> str:
        timeout_s = chance.uniform(0.05, 0.5)
        return f"cut: {(await finish(self._client.stream('hi', timeout_s=timeout_s, **LONG)))[0]}"

    async def _whole(self, chance: random.Random) -> str:
        max_tokens = chance.randint(1, 40)
        await self._client.generate(prompt_of(chance), max_tokens=max_tokens)
        return "whole"

    async def _several(self, chance: random.Random) -> str:
        n = chance.randint(2, 4)
        stream = self._client.stream(prompt_of(chance), n=n, max_tokens=20, regex="[ab]{1,30}")
        while await stream.next() is not None:
            pass
        return "several"


def prompt_of(chance: random.Random) -> str:
    return "shared beginning " * chance.randint(0, 4) + str(chance.random())


@pytest.mark.timeout(180)
async def test_storm_with_two_kills_hangs_no_call_and_leaks_nothing(launch, tiny_model_dir):
    with launch(tiny_model_dir, "engine.kv_cache_bytes=4194304") as server:
        storm = Storm(server.target, seed=5)
        running = asyncio.create_task(storm.run())
        for _ in range(2):
            await asyncio.sleep(2)
            dead_pid = server.kill_engine()
            await asyncio.to_thread(wait_restarted, server, dead_pid)
        last_pid = server.engine_pid
        await asyncio.sleep(3)
        storm.stopping = True
        await asyncio.wait_for(running, HANG_S)
        assert storm.ends["Unavailable"] > 0
        assert storm.ends["cancelled"] > 0
        assert storm.ends["whole"] > 0
        assert storm.ends["several"] > 0
        await asyncio.to_thread(wait_idle, server)
        # An idle engine checks that nothing is held, and dies where something is.
        time.sleep(1)
        assert server.engine_pid == last_pid
        assert server.metric("heedful_engine_restarts_total") == 2
        assert server.terminate() == 0


def wait_idle(server) -> None:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    for name in [*(f"heedful_{name}" for name in names), "heedful_sequences_in_flight"]:
        server.wait_until(lambda name=name: server.metric(name) == 0, f"{name} of 0", 10)
