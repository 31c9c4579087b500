"""Episodes a second of PPO-ptx beside TRL's PPO: same model, prompts, reward and budget, on a CPU.

Ours is the trainer's own loop with the running server as sampler, ptx included; the peer is
`peers/trl_ppo_peer.py`, in an environment with trl 1.12.0. Both train a LoRA adapter of one rank
with the same batch, minibatches, clip, λ and fixed β; the reward is a program (`brief_reward.py`),
so that neither runs a reward model. The peer adapts all layers and has a value model of its own, as
TRL wants it; ours adapts the upper half, and its policy, reference and value share the rest. Ours
trains only its values in its first iteration, and publishes its averaged weights.

The policies are compared by one evaluator on prompts that neither saw: answers by transformers,
reward by the program, KL over the whole vocabulary. It refuses figures where serving and training
disagree about the untrained model, or both sides about a reward.

    python benchmarks/ppo.py --peer-python PYTHON [--episodes 192] [--batch 32] [--answer 48]

The floor: sampled tokens at the rate at which the server decodes, and what a step must compute, at
the rate of a plain matrix product. Nobody can be faster on these cores without computing less.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from loop_support import DEFAULT_MODEL, LoopServer, loop_server, say, write_result
from ppo_measures import evaluate, floor, reward_at
from ppo_sides import Task, check_rewards, make_task, our_side

PEER = Path(__file__).resolve().parent / "peers" / "trl_ppo_peer.py"
_MOST_MISMATCH = 0.15  # nats a token between what serves (4-bit kernels) and what trains
_PEER_TIMEOUT_S = 3600.0


def main() -> None:
    """Run ours, the peer, the evaluation, and write the result."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="heedful-ppo-") as temporary:
        directory = Path(temporary)
        with loop_server(args.model, directory / "home") as server:
            task = make_task(server, directory, args)
            ours = _ours(server, task, directory)
        say(f"ours: {ours['episodes'] / ours['seconds']:.2f} episodes/s")
        peer = _peer(args.peer_python, task, directory) if args.peer_python else None
        sides = {"ours": ours, **({"peer": peer} if peer else {})}
        adapters: dict[str, Path | None] = {"base": None}
        adapters |= {name: directory / name / "adapter" for name in sides}
        say("evaluating")
        figures = {name: evaluate(task, adapter) for name, adapter in adapters.items()}
        result = _result(task, sides, figures, floor(task, ours))
    path = write_result("ppo", result, args.out)
    print(
        json.dumps({key: result[key] for key in ("episodes_per_s", "ratio", "held_out")}, indent=1)
    )
    say(f"written to {path}")


def _ours(server: LoopServer, task: Task, directory: Path) -> dict[str, Any]:
    ours = our_side(server, task, directory / "ours")
    mismatch = ours["history"][0]["mismatch_nats"]
    if mismatch > _MOST_MISMATCH:
        sys.exit(f"server and trainer differ by {mismatch:.3f} nats a token: no figures")
    if not ours["rewards"]:
        sys.exit("no rollout to check a reward on: no figures")
    check_rewards(task, ours["rewards"])
    del ours["rewards"]
    return ours


def _peer(python: Path, task: Task, directory: Path) -> dict[str, Any]:
    """Train the peer in its own environment and return what it noted."""
    out = directory / "peer"
    out.mkdir()
    spec = directory / "spec.json"
    spec.write_text(json.dumps(task.peer_spec()))
    say("peer begins")
    log = (directory / "peer.log").open("w+")
    command = [str(python), str(PEER), str(spec), str(out)]
    done = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=_PEER_TIMEOUT_S)
    if done.returncode:
        log.seek(0)
        sys.exit(f"the peer ended with code {done.returncode}:\n{log.read()[-3000:]}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    rate = found["episodes"] / found["seconds"]
    say(f"peer: {rate:.2f} episodes/s")
    first = abs(found["history"][0]["kl_nats"])
    if first > 0.05 * task.answer_tokens:
        sys.exit(f"the peer's untrained policy is {first:.2f} nats from its reference: no figures")
    return found


def _result(
    task: Task, sides: dict[str, Any], held_out: dict[str, Any], least: dict[str, Any]
) -> dict[str, Any]:
    rates = {name: side["episodes"] / side["seconds"] for name, side in sides.items()}
    result: dict[str, Any] = {
        "task": task.shown(),
        "floor": least,
        "episodes_per_s": {"floor": least["episodes_per_s"], **rates},
        "ratio": rates["ours"] / rates["peer"] if "peer" in rates else None,
        "held_out": held_out,
        "sides": sides,
    }
    if "peer" in sides:
        # On the way both pass the same distances; what each had earned by then.
        histories = {name: side["history"] for name, side in sides.items()}
        common = min(max(row["kl_nats"] for row in history) for history in histories.values())
        result["equal_kl"] = {
            "kl_nats": common,
            "reward": {name: reward_at(history, common) for name, history in histories.items()},
        }
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--peer-python", type=Path, help="Python with trl==1.12.0; none: no peer")
    parser.add_argument("--episodes", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--answer", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--held-out", type=int, default=32, help="prompts of the evaluation")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of both policies")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether we draw the next rollouts while we learn from these",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.episodes % args.batch or args.batch % (2 * args.minibatches):
        parser.error("--episodes must hold whole batches, --batch whole minibatches of pairs")
    return args


if __name__ == "__main__":
    main()
