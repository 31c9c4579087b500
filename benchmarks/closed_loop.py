"""Does it learn? Simulated raters vote at a real server, one refresh, and the true taste judges.

For each taste, method and seed, in a project of its own: votes through blind comparisons (graded,
with noise and ties), StartRefresh, a real trainer, the real gate, and then a contest of the
candidate against the base on prompts that nobody voted on. Beside the win rate stands what it cost
(KL, perplexity under the base, length) and the ceiling: the best of four answers of the base, by
the true taste. A coin-flipper must promote nothing.

Usage: python benchmarks/closed_loop.py [--tastes brief,numbers,lists,polite,topic,coin]
           [--methods dpo] [--seeds 3] [--comparisons 400] [--answers 2] [--prompts 320]
Takes about half an hour for each combination on two cores. Method kto votes with thumbs.
"""

import argparse
import asyncio
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heedful
from heedful_trainer.gate import Draw, ServerSampler
from heedful_trainer.gate.settings import SamplingSettings
from heedful_trainer.simulation.contest import best_of_ceiling, hold_contest
from heedful_trainer.simulation.driver import Asking, simulate_votes
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.raters import SimulatedRater
from heedful_trainer.simulation.tastes import TASTES, Taste
from loop_support import (
    DEFAULT_MODEL,
    LoopServer,
    RememberingSampler,
    loop_server,
    program,
    say,
    write_result,
)

LEASE_S = 3600
POLL_S = 0.5


@dataclass(frozen=True)
class Case:
    """One combination."""

    taste: Taste
    method: str
    seed: int

    @property
    def project(self) -> str:
        """A project of its own, so that no case learns from another's votes."""
        return f"{self.taste}-{self.method}-{self.seed}"


async def main() -> None:
    """Run every case, print a table and write the dated result."""
    args = _arguments()
    tastes: list[Taste] = [taste for taste in TASTES if taste in args.tastes.split(",")]
    cases = [
        Case(taste, method, seed)
        for seed in range(args.seeds)
        for method in args.methods.split(",")
        for taste in tastes
    ]
    with loop_server(args.model, settings=tuple(args.set)) as server:
        async with heedful.AsyncClient(server.target, timeout_s=600) as client:
            ceilings = await _ceilings(client, tastes, args)
        rows = [await _run(server, case, args) for case in cases]
    _finish(rows, ceilings, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tastes", default=",".join(TASTES))
    parser.add_argument("--methods", default="dpo", help="of auto, dpo, kto, ppo_ptx")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--answers", type=int, default=2, help="of one comparison, 2 to 9")
    parser.add_argument("--prompts", type=int, default=320, help="unseen ones, at most 320")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--set", action="append", default=[], help="setting of the server")
    parser.add_argument("--no-ceiling", action="store_true")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


async def _ceilings(
    client: heedful.AsyncClient, tastes: Sequence[Taste], args: argparse.Namespace
) -> dict[Taste, dict[str, float]]:
    if args.no_ceiling:
        return {}
    say(f"best of four on {args.prompts} prompts")
    sampler = ServerSampler(client, SamplingSettings())
    prompts = draw_prompts("evaluation", args.prompts, 0)
    return await best_of_ceiling(
        sampler, tastes, "base", prompts, Draw(1.0, args.max_tokens, 500_000)
    )


async def _run(server: LoopServer, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    async with heedful.AsyncClient(server.target, project=case.project, timeout_s=600) as client:
        seconds: dict[str, float] = {}
        began_s = time.monotonic()
        ties = await _vote(client, case, args)
        seconds["votes"] = time.monotonic() - began_s
        refresh = await _refresh(client, server, case, args, seconds)
        row: dict[str, Any] = {
            "taste": case.taste,
            "method": refresh.method,
            "seed": case.seed,
            "comparisons": args.comparisons,
            "ties": ties,
            "status": refresh.status,
            "error": refresh.error,
            "verdict": refresh.verdict,
            "action": _at(refresh.evidence, "gate", "action"),
            "reward_accuracy": _at(refresh.evidence, "reward", "report", "accuracy"),
            "failed_checks": _failed_checks(refresh),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }
        if refresh.status == "finished":
            row["contest"] = await _contest(client, refresh, case, args)
    say(f"{case.project}: {row['status']}, {row['verdict']}, {_win(row)} {row['error']}")
    return row


async def _vote(client: heedful.AsyncClient, case: Case, args: argparse.Namespace) -> int:
    say(f"{case.project}: {args.comparisons} votes of a simulated rater")
    prompts = draw_prompts("votes", args.comparisons, case.seed)
    asking = Asking(args.answers, max_tokens=args.max_tokens, thumbs=case.method == "kto")
    votes = await simulate_votes(
        client, prompts, [SimulatedRater(case.taste, 0, case.seed)], asking
    )
    return sum(len(vote.groups) == 1 for vote in votes)


async def _refresh(
    client: heedful.AsyncClient,
    server: LoopServer,
    case: Case,
    args: argparse.Namespace,
    seconds: dict[str, float],
) -> heedful.Refresh:
    """Run one refresh to its end, and add the seconds of each stage."""
    overrides = {"run.seed": str(case.seed)}
    overrides |= dict(item.split("=", 1) for item in args.override)
    refresh = await client.start_refresh(case.method, overrides=overrides)
    command = [str(program("heedful-trainer")), "work", "--once", "--run", refresh.run_id]
    command += ["--home", str(server.home), "--target", server.target]
    log = (server.home / f"trainer-{case.project}.log").open("w")
    with log:
        trainer = subprocess.Popen(command, stdout=log, stderr=log)
        stage, began_s = refresh.stage, time.monotonic()
        while not refresh.is_over and trainer.poll() is None:
            await asyncio.sleep(POLL_S)
            refresh = await client.get_refresh(refresh.run_id)
            if refresh.stage != stage or refresh.is_over:
                now_s = time.monotonic()
                seconds[stage] = seconds.get(stage, 0.0) + now_s - began_s
                say(f"{case.project}: {stage} took {now_s - began_s:.0f} s")
                stage, began_s = refresh.stage, now_s
        await asyncio.to_thread(trainer.wait)
    refresh = await client.get_refresh(refresh.run_id)
    if not refresh.is_over:
        raise SystemExit(f"the trainer ended early:\n{Path(log.name).read_text()[-4000:]}")
    return refresh


async def _contest(
    client: heedful.AsyncClient, refresh: heedful.Refresh, case: Case, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the contest of the candidate, published or not, against the base."""
    adapter = heedful.RunAdapter(refresh.run_id, "policy")
    model = refresh.candidate_version
    if not model:
        await client.load_adapter(adapter, lease_s=LEASE_S)
        model = adapter.model
    sampler = RememberingSampler(ServerSampler(client, SamplingSettings()))
    prompts = draw_prompts("evaluation", args.prompts, 0)
    draw = Draw(1.0, args.max_tokens, 1_000_000 * (case.seed + 1))
    found = await hold_contest(sampler, case.taste, model, "base", prompts, draw)
    return found.to_json()


def _at(evidence: Any, *names: str) -> Any:
    for name in names:
        evidence = evidence.get(name) if hasattr(evidence, "get") else None
    return evidence


def _failed_checks(refresh: heedful.Refresh) -> list[str]:
    stages = _at(refresh.evidence, "gate", "stages") or []
    return [
        check["name"]
        for stage in stages
        for check in stage.get("checks", [])
        if check["verdict"] == "fail"
    ]


def _win(row: dict[str, Any]) -> str:
    contest = row.get("contest")
    if not contest:
        return "no candidate"
    low, high = contest["win_rate_interval"]
    return f"{contest['win_rate']:.1%} [{low:.1%}, {high:.1%}]"


def _finish(
    rows: list[dict[str, Any]], ceilings: dict[Taste, dict[str, float]], args: argparse.Namespace
) -> None:
    print("| taste | method | seed | win rate | ceiling | KL | perplexity (base's) | verdict | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        contest = row.get("contest") or {}
        ceiling = ceilings.get(row["taste"], {}).get("win_rate")
        cells = [
            row["taste"],
            row["method"],
            str(row["seed"]),
            _win(row),
            f"{ceiling:.1%}" if ceiling else "",
            f"{contest.get('kl_nats', float('nan')):.1f}",
            f"{contest.get('perplexity', float('nan')):.1f} "
            f"({contest.get('perplexity_against', float('nan')):.1f})",
            row["verdict"] or row["status"],
            f"{sum(row['seconds'].values()) - row['seconds']['votes']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    promoted = [row for row in rows if row["taste"] == "coin" and row["verdict"] == "pass"]
    result = {
        "shape": {
            "comparisons": args.comparisons,
            "answers": args.answers,
            "prompts": args.prompts,
            "max_tokens": args.max_tokens,
            "temperature": 1.0,
            "overrides": args.override,
        },
        "simulated": True,
        "summary": _summary(rows),
        "coin_flippers_passed": len(promoted),
        "ceilings": ceilings,
        "rows": rows,
    }
    print(f"written: {write_result('closed_loop', result, args.out)}")


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by method the mean win rate over tastes and seeds, and that of the worst taste."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.get("contest") and row["taste"] != "coin":
            of_method = found.setdefault(row["method"], {})
            of_method.setdefault(row["taste"], []).append(row["contest"]["win_rate"])
    return {
        method: {
            "mean": statistics.fmean(statistics.fmean(rates) for rates in tastes.values()),
            "worst_taste": min(statistics.fmean(rates) for rates in tastes.values()),
        }
        for method, tastes in found.items()
    }


if __name__ == "__main__":
    asyncio.run(main())
