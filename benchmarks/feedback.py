"""Durable, acknowledged feedback events a second over gRPC, one event a call.

A real server process with a SQLite store of its own (`synchronous=FULL`); many writers in one
client process on the same cores, each sending its next event when the last one is acknowledged.
Beside it, in the same run, the same client calls the health service, which is the floor of a
call. Afterwards every acknowledged event is looked up; if one is missing or doubled, no figure is
printed.

Usage: python benchmarks/feedback.py [--writers 64] [--seconds 10]
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio
import heedful
from grpc_health.v1 import health_pb2, health_pb2_grpc
from heedful.ids import IdSource
from heedful_proto.v1 import feedback_pb2, feedback_pb2_grpc
from serving_cpu import cpu_name, server

HERE = Path(__file__).resolve().parent


async def run(target: str, writers: int, seconds: float) -> dict[str, float]:
    """Return the figures; raise SystemExit when an acknowledged event is not there exactly once."""
    async with heedful.AsyncClient(target) as client:
        answer = await client.generate("Hi", max_tokens=4)
    completion = answer.completions[0]
    async with grpc.aio.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        floor = await closed_loop(lambda: health.Check(health_pb2.HealthCheckRequest()), writers, 3)
        stub = feedback_pb2_grpc.FeedbackServiceStub(channel)
        acknowledged: list[str] = []
        ids = IdSource()

        async def submit() -> None:
            event = feedback_pb2.FeedbackEvent(
                feedback_id=ids.next(),
                completion_id=completion.completion_id,
                completion_token=completion.completion_token,
                thumb=feedback_pb2.Thumb(up=True),
            )
            reply = await stub.SubmitFeedback(feedback_pb2.SubmitFeedbackRequest(event=event))
            acknowledged.append(reply.receipt.feedback_id)

        await closed_loop(submit, writers, 1)
        latencies_s, elapsed_s = await closed_loop(submit, writers, seconds)
        stored: list[str] = []
        async for item in stub.ExportFeedback(feedback_pb2.ExportFeedbackRequest()):
            stored.append(item.record.event.feedback_id)
    if len(stored) != len(set(stored)) or not set(acknowledged) <= set(stored):
        raise SystemExit("an acknowledged event is missing or doubled: no figures")
    latencies_ms = sorted(1000 * latency for latency in latencies_s)
    return {
        "events_per_s": len(latencies_s) / elapsed_s,
        "p50_ms": statistics.median(latencies_ms),
        "p99_ms": latencies_ms[int(0.99 * len(latencies_ms))],
        "health_calls_per_s": len(floor[0]) / floor[1],
        "num_events_checked": float(len(acknowledged)),
    }


async def closed_loop(call, writers: int, seconds: float) -> tuple[list[float], float]:  # type: ignore[no-untyped-def]
    """Run writers that call again and again; return latencies and elapsed time in seconds."""
    latencies_s: list[float] = []
    started_s = time.perf_counter()
    end_s = started_s + seconds

    async def write() -> None:
        while (now_s := time.perf_counter()) < end_s:
            await call()
            latencies_s.append(time.perf_counter() - now_s)

    await asyncio.gather(*(write() for _ in range(writers)))
    return latencies_s, time.perf_counter() - started_s


def main() -> None:
    """Measure, print and write the dated result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    args = parser.parse_args()
    with server(args.model, []) as target:
        figures = asyncio.run(run(target, args.writers, args.seconds))
    print(json.dumps(figures, indent=2))
    result = {
        "benchmark": "feedback",
        "command": " ".join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "shape": {"writers": args.writers, "calls": "unary", "store": "SQLite, synchronous=FULL"},
        "figures": figures,
    }
    out = HERE / "results" / f"feedback-{datetime.now(UTC):%Y-%m-%d}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
