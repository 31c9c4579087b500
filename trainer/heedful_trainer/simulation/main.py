"""`heedful-trainer simulate`: simulated raters vote at a running server, or judge two policies.

Owns the flags and what is printed: lines for people on standard error and, where asked for, one
JSON object on standard output. Secrets come from the environment: HEEDFUL_API_KEY, HEEDFUL_TLS_CA.
The process lives for one command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import heedful

from heedful_trainer.gate.sampler import Draw, ServerSampler
from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.simulation.contest import hold_contest
from heedful_trainer.simulation.driver import Asking, Vote, simulate_votes
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.raters import Reliability, SimulatedRater
from heedful_trainer.simulation.tastes import TASTES

_LABEL = "simulated rater, not a person"
_PROGRESS_EVERY = 10
_CONNECT_S = 60.0


def main(argv: Sequence[str]) -> int:
    """Run one command and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        result = asyncio.run(_run(args))
    except heedful.HeedfulError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heedful-trainer simulate",
        description="Have simulated raters with a stated taste vote on blind comparisons. "
        "Everything they leave in the log is labelled simulated.",
    )
    parser.add_argument("--taste", choices=TASTES, default="brief")
    parser.add_argument("--comparisons", type=_positive, default=40, help="votes (40)")
    parser.add_argument("--raters", type=_positive, default=1, help="different raters (1)")
    parser.add_argument("--answers", type=int, default=2, choices=range(2, 10), metavar="2..9")
    parser.add_argument("--max-tokens", type=_positive, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--thumbs", action="store_true", help="thumbs instead of an order")
    parser.add_argument("--random-share", type=_share, default=0.1, help="votes at random (0.1)")
    parser.add_argument("--first-bias", type=float, default=0.0, help="for what is shown first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--project", default="default")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    judging = parser.add_argument_group("instead of voting")
    judging.add_argument("--judge", metavar="MODEL", help="win rate of MODEL by the true taste")
    judging.add_argument("--against", default="base", help="the other policy (base)")
    judging.add_argument("--prompts", type=_positive, default=300, help="unseen prompts (300)")
    return parser


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    key = os.environ.get("HEEDFUL_API_KEY") or None
    async with heedful.AsyncClient(
        args.target, api_key=key, tls=_tls(), project=args.project
    ) as client:
        await client.wait_ready(_CONNECT_S)
        return await (_judge(client, args) if args.judge else _vote(client, args))


async def _vote(client: heedful.AsyncClient, args: argparse.Namespace) -> dict[str, Any]:
    reliability = Reliability(random_share=args.random_share, first_bias=args.first_bias)
    raters = [
        SimulatedRater(args.taste, number, args.seed, reliability) for number in range(args.raters)
    ]
    prompts = draw_prompts("votes", args.comparisons, args.seed)
    _say(f"{_LABEL}: taste {args.taste!r}, {len(prompts)} blind comparisons")
    done = 0

    def report(_: Vote) -> None:
        nonlocal done
        done += 1
        if done % _PROGRESS_EVERY == 0 or done == len(prompts):
            _say(f"{_LABEL}: {done} of {len(prompts)} votes")

    asking = Asking(args.answers, args.max_tokens, args.temperature, thumbs=args.thumbs)
    votes = await simulate_votes(client, prompts, raters, asking, report)
    return {
        "simulated": True,
        "taste": args.taste,
        "raters": [rater.rater_id for rater in raters],
        "comparisons": len(votes),
        "ties": sum(len(vote.groups) == 1 for vote in votes),
        "last_seq": max(vote.seq for vote in votes),
    }


async def _judge(client: heedful.AsyncClient, args: argparse.Namespace) -> dict[str, Any]:
    sampler = ServerSampler(client, SamplingSettings())
    prompts = draw_prompts("evaluation", args.prompts, args.seed)
    _say(f"{_LABEL}: {args.judge} against {args.against} on {len(prompts)} unseen prompts")
    draw = Draw(args.temperature, args.max_tokens, args.seed)
    found = await hold_contest(sampler, args.taste, args.judge, args.against, prompts, draw)
    low, high = found.win_rate_interval
    _say(f"{_LABEL}: win rate {found.win_rate:.0%} [{low:.0%}, {high:.0%}]")
    return {"simulated": True, **found.to_json()}


def _tls() -> heedful.TLS | None:
    ca = os.environ.get("HEEDFUL_TLS_CA")
    if not ca:
        return None
    return heedful.TLS() if ca == "system" else heedful.TLS(Path(ca).read_bytes())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be 0 to 1")
    return value
