"""Does learning disturb serving? Half load, a hundred swaps, and a refresh from votes to verdict.

Users arrive at random at half of what the server can do, and stream answers; first alone, then
while a trainer on the same cores works on a refresh and champions are swapped. Counted are requests
that failed and the time between tokens, as the client sees it, whole and by the refresh's stage.

Usage: python benchmarks/loop_under_load.py [--comparisons 40] [--swaps 100] [--quiet-s 60]
Takes a quarter of an hour on two cores.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import heedful
from heedful_trainer.simulation.driver import Asking, simulate_votes
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.raters import SimulatedRater
from loop_support import DEFAULT_MODEL, LoopServer, loop_server, program, say, write_result

_CAPACITY_CLIENTS = 8
_CAPACITY_S = 15.0
_POLL_S = 0.5
_LEAST_GAPS = 200
# Two versions to swap between; what they learned does not matter here.
_QUICK = {"reward.enabled": "false", "gate.enabled": "false"}


@dataclass
class Seen:
    """What clients saw."""

    answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)  # to the first token
    gaps_s: list[float] = field(default_factory=list)  # between tokens
    versions: Counter[str] = field(default_factory=Counter)
    stage: str = ""  # of the refresh that runs now
    gaps_of_stage_s: dict[str, list[float]] = field(default_factory=dict)

    def add_gaps(self, times_s: Sequence[float]) -> None:
        """Note the times between the tokens of one answer, under the stage in which it ended."""
        gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
        self.gaps_s += gaps_s
        self.gaps_of_stage_s.setdefault(self.stage, []).extend(gaps_s)

    def to_json(self) -> dict[str, Any]:
        """Return counts and percentiles, in milliseconds."""
        return {
            "answers": self.answers,
            "failures": dict(self.failures),
            "versions": dict(self.versions),
            "first_token_ms": _percentiles(self.first_s),
            "between_tokens_ms": _percentiles(self.gaps_s),
            "between_tokens_ms_by_stage": {
                stage: _percentiles(gaps_s)
                for stage, gaps_s in self.gaps_of_stage_s.items()
                if stage and len(gaps_s) > _LEAST_GAPS
            },
        }


async def main() -> None:
    """Measure alone and under training, print both and write the dated result."""
    args = _arguments()
    with loop_server(args.model, settings=tuple(args.set)) as server:
        async with heedful.AsyncClient(server.target, timeout_s=300) as client:
            await _vote(client, args.comparisons)
            for seed in range(2):
                await _refresh(client, server, {**_QUICK, "run.seed": str(seed)})
            rate = await _capacity(client, args.max_tokens) / 2
            say(f"half load: {rate:.2f} requests/s")
            alone = await _for_seconds(client, args, rate)
            found = await _while_training(client, server, args, rate)
    result = {"requests_per_second": rate, "alone": alone.to_json(), **found}
    p99 = [result[name]["between_tokens_ms"]["p99"] for name in ("alone", "training")]
    result["p99_ratio"] = p99[1] / p99[0]
    print(f"between tokens, p99: {p99[0]:.1f} ms alone, {p99[1]:.1f} ms ({p99[1] / p99[0]:.2f} x)")
    print(f"failed: {sum(alone.failures.values())}, {sum(found['training']['failures'].values())}")
    print(f"swaps: {found['swaps']}, refresh: {found['refresh']}")
    print(f"written: {write_result('loop_under_load', result, args.out)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--swap-every-s", type=float, default=2.0)
    parser.add_argument("--quiet-s", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--set", action="append", default=[], help="setting of the server")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


async def _vote(client: heedful.AsyncClient, count: int) -> None:
    say(f"{count} votes of a simulated rater")
    prompts = draw_prompts("votes", count, 0)
    await simulate_votes(client, prompts, [SimulatedRater("brief")], Asking())


async def _refresh(
    client: heedful.AsyncClient,
    server: LoopServer,
    overrides: dict[str, str],
    seen: Seen | None = None,
) -> heedful.Refresh:
    """Run one refresh to its end, in a session of its own as under `heedful up`.

    Args:
        seen: is told the stage.
    """
    refresh = await client.start_refresh("dpo", overrides=overrides)
    command = [str(program("heedful-trainer")), "work", "--once", "--run", refresh.run_id]
    command += ["--home", str(server.home), "--target", server.target]
    with (server.home / f"trainer-{refresh.run_id}.log").open("w") as log:
        trainer = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while trainer.poll() is None:
            await asyncio.sleep(_POLL_S)
            if seen is not None:
                seen.stage = (await client.get_refresh(refresh.run_id)).stage
    refresh = await client.get_refresh(refresh.run_id)
    say(f"refresh {refresh.run_id}: {refresh.status} {refresh.verdict} {refresh.error}")
    if refresh.status != "finished":
        raise SystemExit(Path(log.name).read_text()[-4000:])
    return refresh


async def _capacity(client: heedful.AsyncClient, max_tokens: int) -> float:
    """Return answers a second of a closed loop of clients."""
    seen, end_s = Seen(), time.monotonic() + _CAPACITY_S

    async def loop(seed: int) -> None:
        while time.monotonic() < end_s:
            await _ask(client, f"Tell me about the number {seed}.", max_tokens, seen)

    began_s = time.monotonic()
    await asyncio.gather(*(loop(seed) for seed in range(_CAPACITY_CLIENTS)))
    return seen.answers / (time.monotonic() - began_s)


async def _for_seconds(client: heedful.AsyncClient, args: argparse.Namespace, rate: float) -> Seen:
    end_s = time.monotonic() + args.quiet_s
    seen = Seen()
    await _load(client, args.max_tokens, rate, lambda: time.monotonic() >= end_s, seen)
    return seen


async def _while_training(
    client: heedful.AsyncClient, server: LoopServer, args: argparse.Namespace, rate: float
) -> dict[str, Any]:
    seen = Seen()
    overrides = dict(item.split("=", 1) for item in args.override)
    training = asyncio.create_task(_refresh(client, server, overrides, seen))
    swapping = asyncio.create_task(_swap(client, args))
    began_s = time.monotonic()
    await _load(client, args.max_tokens, rate, lambda: training.done() and swapping.done(), seen)
    refresh = await training
    return {
        "training": seen.to_json(),
        "swaps": await swapping,
        "refresh": {"verdict": refresh.verdict, "seconds": round(time.monotonic() - began_s, 1)},
    }


async def _swap(client: heedful.AsyncClient, args: argparse.Namespace) -> int:
    """Promote the two versions in turn; return how often."""
    for swap in range(args.swaps):
        await asyncio.sleep(args.swap_every_s)
        await client.promote(f"v{swap % 2 + 1}")
    return int(args.swaps)


async def _load(
    client: heedful.AsyncClient,
    max_tokens: int,
    rate: float,
    is_over: Callable[[], bool],
    seen: Seen,
) -> None:
    """Start requests at exponential intervals until it is over; wait for the last."""
    arrivals, running = random.Random(0), set[asyncio.Task[None]]()
    prompts = draw_prompts("evaluation", 320, 0)
    number = 0
    while not is_over():
        task = asyncio.create_task(_ask(client, prompts[number % len(prompts)], max_tokens, seen))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
        await asyncio.sleep(arrivals.expovariate(rate))
    await asyncio.gather(*running)


async def _ask(client: heedful.AsyncClient, prompt: str, max_tokens: int, seen: Seen) -> None:
    asked_s = time.perf_counter()
    times_s: list[float] = []
    try:
        async with client.stream(prompt, max_tokens=max_tokens, temperature=1.0) as stream:
            async for _ in stream:
                times_s.append(time.perf_counter())
            seen.versions[stream.generation.served_by.policy_version] += 1
    except heedful.HeedfulError as error:
        seen.failures[type(error).__name__] += 1
        return
    seen.answers += 1
    seen.first_s.append(times_s[0] - asked_s)
    seen.add_gaps(times_s)


def _percentiles(values_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_s, n=100)
    return {f"p{rank}": round(1000 * cuts[rank - 1], 2) for rank in (50, 90, 99)}


if __name__ == "__main__":
    asyncio.run(main())
