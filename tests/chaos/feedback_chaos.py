"""Kills a real server at random while many writers record feedback, then compares the log.

Usage: feedback_chaos.py [--kills 200] [--writers 64] [--seed 1]. Each life of the server ends by a
failpoint before the commit, after it or before the acknowledgement, or by SIGKILL at a random
moment. Every writer keeps its own history of what was acknowledged. In the end the log must hold
each acknowledged event exactly once, with its content and position, and nothing else. Prints
figures as one line of JSON; the exit code is 1 where a promise was broken.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import heedful
from heedful import Correction, Critique, Event, Receipt, ReceiptStatus, Thumb
from heedful_server.identity import LOCAL_CALLER
from heedful_store import Completion, CompletionPayload, Scope, Store, uuid7
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

T = TypeVar("T")

CHILD = Path(__file__).parent / "server_without_engine.py"
PLACES = ("before_commit", "after_commit", "before_ack")
START_TIMEOUT_S = 60.0
# A failpoint that is not reached in this time gives way to a plain kill.
LIFE_TIMEOUT_S = 10.0
NUM_CHANNELS = 8
LOG_NAME = "server.log"


class BrokenPromise(Exception):  # noqa: N818 - the program says the condition
    """Something that was acknowledged is missing, doubled or changed."""


@dataclass
class Writer:
    """One writer: says things about its answer, one after the other, until each is acknowledged."""

    name: str
    completion_id: str
    client: heedful.AsyncClient
    chance: random.Random
    counts: Counter[str]
    events: dict[str, Event] = field(default_factory=dict)
    retractions: dict[str, str] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    _last_id: str = ""

    async def run(self, stopping: asyncio.Event) -> None:
        """Write until told to stop; what was begun is finished."""
        while not stopping.is_set():
            step = self.chance.choice(
                [self._say, self._say, self._say_several, self._edit, self._take_back, self._repeat]
            )
            await step()

    async def _say(self, supersedes_id: str = "") -> None:
        event = self._event(supersedes_id)
        self._note(await self._acknowledged(lambda: self._submit([event])), [event])
        self._last_id = event.feedback_id

    async def _say_several(self) -> None:
        events = [self._event() for _ in range(3)]
        self._note(await self._acknowledged(lambda: self._submit(events)), events)

    async def _edit(self) -> None:
        await self._say(self._last_id)

    async def _take_back(self) -> None:
        if not self._last_id:
            return
        target_id, retraction_id = self._last_id, uuid7()
        self._last_id = ""
        receipt = await self._acknowledged(
            lambda: self.client.retract(target_id, retraction_id=retraction_id)
        )
        self.retractions[retraction_id] = target_id
        self._keep(receipt)

    async def _repeat(self) -> None:
        """Submit again what was acknowledged: it must be known, under the position it had."""
        if not self.events:
            return
        event = self.chance.choice(list(self.events.values()))
        (receipt,) = await self._acknowledged(lambda: self._submit([event]))
        if receipt.status is not ReceiptStatus.DUPLICATE:
            raise BrokenPromise(f"{event.feedback_id} was acknowledged and then not known")
        if receipt.seq != self.positions[event.feedback_id]:
            raise BrokenPromise(f"{event.feedback_id} moved to {receipt.seq}")
        self.counts["repetitions"] += 1

    def _event(self, supersedes_id: str = "") -> Event:
        kind = type(self.events[supersedes_id].judgement) if supersedes_id else None
        text = f"{self.name} says {self.chance.random()}"
        choices = [Thumb(self.chance.random() < 0.5, (text,)), Correction(text), Critique(text)]
        return Event(
            judgement=self.chance.choice([said for said in choices if kind in (None, type(said))]),
            completion_id=self.completion_id,
            feedback_id=uuid7(),
            supersedes_id=supersedes_id,
            rater_id=self.name,
        )

    async def _submit(self, events: Sequence[Event]) -> list[Receipt]:
        receipts = []
        for outcome in await self.client.submit(events, timeout_s=20):
            if isinstance(outcome, heedful.HeedfulError):
                raise outcome
            receipts.append(outcome)
        return receipts

    async def _acknowledged(self, send: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await send()
            except (heedful.Unavailable, heedful.DeadlineExceeded):
                self.counts["failures"] += 1
                await asyncio.sleep(self.chance.uniform(0.02, 0.1))

    def _note(self, receipts: Sequence[Receipt], events: Sequence[Event]) -> None:
        for receipt, event in zip(receipts, events, strict=True):
            self.events[event.feedback_id] = event
            self._keep(receipt)

    def _keep(self, receipt: Receipt) -> None:
        if receipt.seq <= max(self.positions.values(), default=0):
            raise BrokenPromise(f"{receipt.feedback_id} got a position before an earlier event")
        self.positions[receipt.feedback_id] = receipt.seq
        # The commit came through, the acknowledgement of the first attempt did not.
        self.counts["late"] += receipt.status is ReceiptStatus.DUPLICATE


@dataclass
class Lives:
    """Starts and kills the server; at most one process at a time."""

    directory: Path
    port: int
    chance: random.Random
    counts: Counter[str]

    @contextlib.asynccontextmanager
    async def life(self, failpoints: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
        """Run the server until the block ends; yields once it answers."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("HEEDFUL_")}
        settings = [f"home={self.directory}", f"grpc.port={self.port}", "http.enabled=false"]
        with (self.directory / LOG_NAME).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(CHILD), str(self.directory / "model"), *settings),
                cwd=self.directory,
                env=environ | {"HEEDFUL_FAILPOINTS": failpoints},
                stderr=log,
            )
        try:
            await self._wait_for_port(process)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def die_often(self, num_kills: int, writing: "asyncio.Future[list[None]]") -> None:
        """Live and die so many times; end early where a writer failed."""
        for kill_idx in range(num_kills):
            if writing.done():
                return
            await self.live_and_die()
            if (kill_idx + 1) % 20 == 0:
                print(f"{kill_idx + 1} kills", file=sys.stderr, flush=True)

    async def live_and_die(self) -> None:
        """One life that ends by a kill."""
        place = self.chance.choice([*PLACES, "any moment"])
        failpoints = f"{place}={self.chance.randint(1, 25)}:kill" if place in PLACES else ""
        life_s = LIFE_TIMEOUT_S if place in PLACES else self.chance.uniform(0, 1)
        async with self.life(failpoints) as process:
            try:
                exit_code = await asyncio.wait_for(process.wait(), life_s)
            except TimeoutError:
                place = "any moment"
            else:
                if exit_code != -signal.SIGKILL:
                    raise BrokenPromise(f"the server ended by itself with {exit_code}")
        self.counts[f"killed: {place}"] += 1

    async def _wait_for_port(self, process: asyncio.subprocess.Process) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        # A failpoint may end a life before anybody saw the port open.
        while process.returncode is None:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            if time.monotonic() > end_s:
                raise BrokenPromise("the server did not start")
            await asyncio.sleep(0.02)


async def chaos(directory: Path, num_kills: int, num_writers: int, seed: int) -> Counter[str]:
    """Run it; return the figures. Raises BrokenPromise, or HeedfulError for a wrong status."""
    chance, counts = random.Random(seed), Counter[str]()
    write_tokenizer(directory / "model")
    answers = await write_answers(directory / "heedful.db", num_writers)
    lives = Lives(directory, free_port(), chance, counts)
    stopping = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        target = f"127.0.0.1:{lives.port}"
        clients = [
            await stack.enter_async_context(heedful.AsyncClient(target))
            for _ in range(NUM_CHANNELS)
        ]
        writers = []
        for i, answer in enumerate(answers):
            own_chance = random.Random(f"{seed}/{i}")
            client = clients[i % NUM_CHANNELS]
            writers.append(Writer(f"writer-{i}", answer, client, own_chance, counts))
        writing = asyncio.gather(*[writer.run(stopping) for writer in writers])
        try:
            await lives.die_often(num_kills, writing)
            async with lives.life() as process:
                stopping.set()
                await writing
                await compare_log(clients[0], writers, counts)
                process.terminate()
                if await process.wait() != 0:
                    raise BrokenPromise("the server did not end cleanly")
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
    check_file(directory / "heedful.db")
    return counts


async def compare_log(
    client: heedful.AsyncClient, writers: Sequence[Writer], counts: Counter[str]
) -> None:
    """Raise BrokenPromise unless the log is what the writers remember, each event once."""
    stored: dict[str, heedful.FeedbackRecord] = {}
    async for record in client.list_feedback(page_size=1000):
        feedback_id = record.receipt.feedback_id
        if feedback_id in stored:
            raise BrokenPromise(f"{feedback_id} is there twice")
        stored[feedback_id] = record
    for writer in writers:
        for feedback_id, position in writer.positions.items():
            found = stored.pop(feedback_id, None)
            if found is None:
                raise BrokenPromise(f"{feedback_id} was acknowledged and is lost")
            said = writer.events.get(feedback_id)
            if said and (found.event.judgement, found.event.supersedes_id) != (
                said.judgement,
                said.supersedes_id,
            ):
                raise BrokenPromise(f"{feedback_id} has changed")
            if found.retracts_id != writer.retractions.get(feedback_id, ""):
                raise BrokenPromise(f"{feedback_id} takes back {found.retracts_id!r}")
            if found.receipt.seq != position:
                raise BrokenPromise(f"{feedback_id} moved to {found.receipt.seq}")
            counts["acknowledged"] += 1
    if stored:
        raise BrokenPromise(f"{len(stored)} events are there that nobody was told of")


def write_tokenizer(directory: Path) -> None:
    """Write the files that a server needs before its engine: a byte tokenizer."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 256}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"eos_token": "<eos>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


async def write_answers(path: Path, num_answers: int) -> list[str]:
    """Log one answer for each writer, as a server with an engine would; return their ids."""
    ids = [uuid7() for _ in range(num_answers)]
    with Store(f"sqlite:///{path}") as store:
        for completion_id in ids:
            answer = Completion(
                completion_id=completion_id,
                scope=Scope(LOCAL_CALLER.tenant),
                policy_version="base",
                created_at_ms=1,
                payload=CompletionPayload([1, 2], [3, 4], "a question", "an answer"),
            )
            await store.append_completion(answer)
    return ids


def check_file(path: Path) -> None:
    """Raise BrokenPromise where SQLite finds its file damaged."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
    if verdict != "ok":
        raise BrokenPromise(f"the database is damaged: {verdict}")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill the feedback service at random.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heedful-chaos-") as directory:
        try:
            counts = asyncio.run(chaos(Path(directory), asked.kills, asked.writers, asked.seed))
        except BrokenPromise as broken:
            log = (Path(directory) / LOG_NAME).read_text(errors="replace")
            print(f"{log[-4000:]}\nseed {asked.seed}: {broken}", file=sys.stderr)
            return 1
    figures = {"kills": asked.kills, "seed": asked.seed, **dict(sorted(counts.items()))}
    figures["elapsed_s"] = round(time.monotonic() - started_s, 1)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
