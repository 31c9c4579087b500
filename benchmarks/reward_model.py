"""What reward model and preference methods are worth, on the default model: six cases.

flipped      accuracy on clean labels of unseen prompts, learned from 25 % flipped ones
calibration  how far the same model's probabilities can be believed on unseen pairs
kway         all answers of a prompt in one row, beside shuffled pairs: cost and validation loss
kto          thumbs alone, beside DPO on the same answers
human        real people's pairs by cross-validation, beside "the longer one" (--human DIR)
mismatch     log-probs of the server beside the trainer's, in three forms of the weights

Answers are drawn from a real server (T = 1), ordered by a taste that a program states exactly, and
training is the trainer's own with its defaults unless --override says otherwise. Every figure has
an interval with the prompt as the unit. Rows of an earlier run with the same case and taste in the
same result file are replaced, others kept.

    python benchmarks/reward_model.py --cases flipped,calibration [--taste brief] [--cache FILE]

On two quiet cores, with the defaults: flipped and calibration 8 minutes together, kway 3, kto 6,
human 8, mismatch 2; about a third of the first two is the drawing of answers, which --cache saves
the next time. `kto` on 2 000 thumbs takes about 20 (--kto-prompts 635 --max-tokens 32 --override
kto.epochs=1 --override dpo.epochs=1).
"""

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from heedful_trainer.dataset.text import TextEncoder
from heedful_trainer.simulation.tastes import TASTES
from loop_support import DEFAULT_MODEL, RESULTS, loop_server, say, write_result
from reward_cases import Noisy, calibration, flipped, kway, train_noisy
from reward_human import human
from reward_mismatch import mismatch
from reward_samples import Bench, collect, load_tokenizer, make_backbone, make_base, wanted
from reward_thumbs import kto

CASES = ("flipped", "calibration", "kway", "kto", "human", "mismatch")
_WITHOUT_TASTE = ("human", "mismatch")


def main() -> None:
    """Run the cases one after the other; the result is written after each."""
    args = _arguments()
    cases = args.cases.split(",")
    if unknown := set(cases) - set(CASES):
        raise SystemExit(
            f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}"
        )
    if "human" in cases and args.human is None:
        raise SystemExit("the case human needs --human DIR, where the files of real pairs lie")
    rows = []
    with tempfile.TemporaryDirectory(prefix="heedful-reward-") as temporary:
        bench = _prepare(cases, args, Path(temporary))
        noisy: Noisy | None = None
        for case in cases:
            say(f"case {case}")
            began_s = time.monotonic()
            if case in ("flipped", "calibration"):
                noisy = noisy or train_noisy(bench)
            found = _run(case, bench, noisy)
            row = _described(case, found, bench) | {"case_s": round(time.monotonic() - began_s, 1)}
            rows.append(row)
            path = _write(row, args)
            gc.collect()
    _print(rows)
    print(f"written: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="flipped,calibration,kway,kto,mismatch")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--taste", default="brief", choices=[t for t in TASTES if t != "coin"])
    parser.add_argument("--flip", type=float, default=0.25, help="share of labels flipped")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a drawn answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="JSON lines of drawn answers, read and added to")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    synthetic = parser.add_argument_group("flipped and calibration")
    synthetic.add_argument("--prompts", type=int, default=130, help="learned from")
    synthetic.add_argument("--validation", type=int, default=16)
    synthetic.add_argument("--calibration", type=int, default=24)
    synthetic.add_argument("--held-out", type=int, default=200, help="of 320")
    grouping = parser.add_argument_group("kway")
    grouping.add_argument("--kway-prompts", type=int, default=60)
    grouping.add_argument("--kway-validation", type=int, default=32)
    grouping.add_argument("--kway-epochs", type=float, default=1.0)
    grouping.add_argument("--kway-batch", type=int, default=4, help="prompts of one step")
    thumbs = parser.add_argument_group("kto")
    thumbs.add_argument("--kto-prompts", type=int, default=110, help="of 635, three answers each")
    thumbs.add_argument("--kto-held-out", type=int, default=80, help="of 320, four answers each")
    people = parser.add_argument_group("human")
    people.add_argument("--human", type=Path, help="folder of the sets")
    people.add_argument("--human-prompts", type=int, default=90, help="of each set; 0: all")
    people.add_argument("--folds", type=int, default=2)
    people.add_argument("--human-epochs", type=float, help="default: the trainer's")
    people.add_argument("--human-prompt-tokens", type=int, default=192)
    people.add_argument("--human-answer-tokens", type=int, default=128)
    parser.add_argument("--mismatch-prompts", type=int, default=48, help="one answer each")
    return parser.parse_args()


def _prepare(cases: Sequence[str], args: argparse.Namespace, work: Path) -> Bench:
    """Get weights and answers from a server, which is stopped before anything is trained."""
    with loop_server(args.model, work / "home") as server:
        config, base = make_base(server, args)
        tokenizer = load_tokenizer(base)
        samples = asyncio.run(collect(server, tokenizer, wanted(cases, args), args))
    backbone = make_backbone(base, config)
    encoder = TextEncoder(base.directory)
    say(f"{base.name} in {base.dtype}, {torch.get_num_threads()} threads")
    return Bench(args, config, base, backbone, tokenizer, encoder, work, samples)


def _run(case: str, bench: Bench, noisy: Noisy | None) -> dict[str, Any]:
    match case:
        case "flipped":
            assert noisy is not None
            return flipped(noisy)
        case "calibration":
            assert noisy is not None
            return calibration(noisy, bench.args.flip, bench.args.seed)
        case "kway":
            return kway(bench)
        case "kto":
            return kto(bench)
        case "human":
            return human(bench)
        case _:
            return mismatch(bench)


def _described(case: str, found: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
    """Return a case's figures with everything that they were made with."""
    args = {
        name: value
        for name, value in vars(bench.args).items()
        if name not in ("out", "cache", "human", "cases")
    }
    used: dict[str, Any] = {"base_dtype": bench.base.dtype, "threads": torch.get_num_threads()}
    if case != "mismatch":
        settings = bench.config.model_dump(mode="json")
        used |= {name: settings[name] for name in ("lora", *_settings_of(case))}
        if case in ("kway", "human"):  # these set some themselves
            used["reward"]["epochs"] = found["epochs"]
        if case == "kway":
            used["reward"]["optimiser"] |= {"batch_size": found["batch_size"], "min_steps": 0}
    return {
        "case": case,
        "simulated": case not in _WITHOUT_TASTE,
        "taste": "" if case in _WITHOUT_TASTE else bench.args.taste,
        "command": " ".join(["benchmarks/reward_model.py", *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **found,
        "shape": args,
        "settings": used,
    }


def _settings_of(case: str) -> tuple[str, ...]:
    return ("kto", "dpo") if case == "kto" else ("reward",)


def _write(row: Mapping[str, Any], args: argparse.Namespace) -> Path:
    """Put a row into the result file, keeping those of other cases and tastes."""
    path = args.out or RESULTS / f"reward_model-{datetime.now(UTC):%Y-%m-%d}.json"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    key = row["case"], row["taste"]
    rows = [other for other in kept if (other["case"], other["taste"]) != key]
    return write_result("reward_model", {"rows": [*rows, row]}, path)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    if used := next((row["settings"] for row in rows), None):
        print(f"frozen weights in {used['base_dtype']}, {used['threads']} threads")
    print("| case | taste | figure | value, 95 % interval | n | target | s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        for figure, value, n in _cells(row):
            cells = [row["case"], row["taste"], figure, value, n, row["target"]]
            print(f"| {' | '.join(cells)} | {row['case_s']:.0f} |")
    for row in rows:
        for name in _settings_of(row["case"]) if "lora" in row["settings"] else ():
            found = row["settings"][name]
            rate = found["optimiser"]["learning_rate"]
            batch = found["optimiser"]["batch_size"]
            print(f"{row['case']}: {name}.epochs {found['epochs']}, rate {rate}, batch {batch}")


def _cells(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return figure, value and size of a case's lines."""
    match row["case"]:
        case "flipped":
            beside = f"{_share(row)}; length only {row['length_only_accuracy']:.3f}"
            return [("accuracy on clean labels", beside, f"{row['held_out_pairs']} pairs")]
        case "calibration":
            return [
                (f"debiased ECE, {name}", _ece(row[name]), f"{row[name]['n']} pairs")
                for name in ("flipped", "bradley_terry")
            ]
        case "kway":
            return _kway_cells(row)
        case "kto":
            lines = [(m, _share(row[m]), f"{row['held_out_pairs']} pairs") for m in ("kto", "dpo")]
            size = f"{row['thumbs']} thumbs, {row['dpo_pairs']} pairs"
            return [*lines, ("kto - dpo", _signed(row, "difference", "interval"), size)]
        case "human":
            sets = {**row["sets"], "pooled": row}
            return [
                (name, _human(found), f"{found['pairs']} pairs")
                for name, found in sets.items()
                if found["pairs"]
            ]
        case _:
            return _mismatch_cells(row)


def _kway_cells(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lines = [
        (
            f"{name}: validation loss",
            f"{row[name]['validation_loss']:.4f}",
            f"{row[name]['answer_forwards']} answer forwards, {row[name]['tokens']} tokens",
        )
        for name in ("kway", "shuffled")
    ]
    visits = f"{row['pairs']} pairs x {row['epochs']:g}"
    return [*lines, ("kway - shuffled", _signed(row, "difference", "interval"), visits)]


def _mismatch_cells(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    pairs = {
        f"server {form}, trainer {dtype}": found
        for form, by_dtype in row["forms"].items()
        for dtype, found in by_dtype.items()
    }
    pairs["transformers, sdpa and eager in bf16"] = row["transformers_sdpa_against_eager_bfloat16"]
    lines = []
    for name, found in pairs.items():
        low, high = found["mean_interval"]
        value = f"mean {found['mean']:.2g} [{low:.2g}, {high:.2g}], p99 {found['p99']:.2g} nats"
        lines.append((name, value, f"{row['tokens']} tokens"))
    ratio = f"{row['bf16_ratio_to_self_mismatch']:.2f}"
    return [*lines, ("bf16 / self-mismatch", ratio, f"{row['tokens']} tokens")]


def _share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _ece(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    before = found["debiased_ece_before"]
    return f"{found['debiased_ece_after']:.3f} [{low:.3f}, {high:.3f}], before {before:.3f}"


def _human(found: Mapping[str, Any]) -> str:
    gain = _signed(found, "gain_over_length", "gain_interval")
    return f"{_share(found)}; length only {found['length_only_accuracy']:.3f}, gain {gain}"


def _signed(found: Mapping[str, Any], name: str, interval: str) -> str:
    low, high = found[interval]
    return f"{found[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
