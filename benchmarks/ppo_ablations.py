"""Ablations of PPO-ptx on a toy (`ppo_toy.py`): the paper's E.6 to E.11 at a size of minutes.

    python benchmarks/ppo_ablations.py --sweep gamma|beta|ptx_texts|minibatches [--seeds 5]

`gamma` sweeps the literal ptx coefficient, and then a stress run without KL penalty (β = 0, longer)
with and without ptx. `beta` sweeps the KL penalty, `ptx_texts` the texts for each episode at
coefficient 27.8, `minibatches` the steps of a batch. For each value: true taste, reward, KL, and
how far the language-model loss on held-out text rose, over seeds. Of the runs that went farthest,
an over-optimisation report: reward by one head, by the mean that was trained against and by the
least head, and the true taste, against √KL.

Before anything is swept it checks that the reward model is better than chance by the true taste,
and that the untrained policy is at a KL of 0 with no rise of the loss.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from heedful_trainer.ppo.plots import line_plot
from heedful_trainer.ppo.report import overoptimisation
from loop_support import RESULTS, say, write_result
from ppo_toy import Toy, run, toy

SWEEPS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "gamma": ("ptx.gamma", (0.0, 1.0, 5.0, 20.0, 27.8), {}),
    "beta": ("kl.beta", (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0), {}),
    "ptx_texts": ("ptx.texts_per_episode", (0.5, 1.0, 4.0, 8.0, 16.0), {"ptx.gamma": 27.8}),
    "minibatches": ("minibatches", (1, 2, 4, 8), {}),
}
# Of the gamma sweep: no KL penalty, twice as long.
STRESS = {"kl.beta": 0.0, "iterations": 56, "stopping.evaluate_every": 4}
FIGURES = ("true_taste", "reward_mean", "kl_nats", "lm_loss_rise")
READINGS = {
    "reward_single": "one head",
    "reward_mean": "mean (trained against)",
    "reward_min": "least head",
    "true_taste": "true taste (0 to 1)",
}


def main() -> None:
    """Check, sweep, and write JSON and a page of plots."""
    args = _arguments()
    path, values, fixed = SWEEPS[args.sweep]
    started = time.monotonic()
    with toy() as made:
        _check(made)
        say(f"reward model: {made.reward_accuracy:.0%} of unseen pairs by the true taste")
        cases = [(f"{path} = {value:g}", {**fixed, path: value}) for value in values]
        if args.sweep == "gamma":
            cases += [(f"beta = 0, gamma = {g:g}", {**STRESS, "ptx.gamma": g}) for g in (0.0, 27.8)]
        found = {name: _seeds(made, name, changes, args.seeds) for name, changes in cases}
        accuracy = made.reward_accuracy
    summary = {name: _summary(runs) for name, runs in found.items()}
    farthest = max(found, key=lambda name: summary[name]["kl_nats"]["mean"])
    looks = _mean_looks(found[farthest])
    result = {
        "sweep": args.sweep,
        "seeds": args.seeds,
        "seconds": time.monotonic() - started,
        "reward_accuracy": accuracy,
        "summary": summary,
        "overoptimisation": {"of": farthest, "looks": looks, "report": overoptimisation(looks)},
        "runs": found,
    }
    written = write_result(f"ppo_ablations_{args.sweep}", result, args.out)
    swept = {value: summary[f"{path} = {value:g}"] for value in values}
    page = written.with_suffix(".html")
    page.write_text(_page(args.sweep, path, swept, summary, farthest, looks), encoding="utf-8")
    print(json.dumps(summary, indent=1))
    say(f"written to {written} and {page.name}")


def _check(made: Toy) -> None:
    if made.reward_accuracy < 0.55:
        sys.exit(f"the reward model knows nothing ({made.reward_accuracy:.0%}): no figures")
    made.trained.adapter.reset(0)
    before, after = (made.language_loss(with_adapter=on) for on in (False, True))
    if before != after:
        sys.exit("an untrained adapter changes the language-model loss: no figures")


def _seeds(made: Toy, name: str, changes: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    found = []
    for seed in range(seeds):
        found.append(run(made, changes, seed))
        if found[-1]["looks"][0]["kl_nats"] != 0.0:
            sys.exit("the untrained policy is not at a KL of 0: no figures")
    shown = _summary(found)
    figures = ", ".join(f"{key} {shown[key]['mean']:.3g}" for key in FIGURES)
    say(f"{name}: {figures}; {shown['stable']} of {seeds} stable")
    return found


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"stable": sum(item["stable"] for item in runs), "of": len(runs)}
    for key in (*FIGURES, "true_taste_before", "reward_min", "ppo_norm", "ptx_norm"):
        values = [item[key] for item in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = {"mean": statistics.fmean(values), "deviation": spread}
    return found


def _mean_looks(runs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the looks of several seeds as one: the mean at each iteration."""
    whole = [item["looks"] for item in runs if item["stable"]]
    return [
        {key: statistics.fmean(look[key] for look in at_once) for key in at_once[0]}
        for at_once in zip(*whole, strict=True)
    ]


def _page(
    sweep: str,
    path: str,
    swept: dict[float, dict[str, Any]],
    summary: dict[str, dict[str, Any]],
    farthest: str,
    looks: Sequence[dict[str, float]],
) -> str:
    plots = []
    for key in FIGURES:
        middle = [(value, item[key]["mean"]) for value, item in swept.items()]
        spread = [(value, item[key]["deviation"]) for value, item in swept.items()]
        lines = {
            "mean": middle,
            "mean + deviation": [(x, y + d) for (x, y), (_, d) in zip(middle, spread, strict=True)],
            "mean - deviation": [(x, y - d) for (x, y), (_, d) in zip(middle, spread, strict=True)],
        }
        plots.append(line_plot(f"{key} by {path}", path, key, lines))
    curves = {
        name: [(look["sqrt_kl"], look[key]) for look in looks] for key, name in READINGS.items()
    }
    title = f"over-optimisation: {farthest}, mean of seeds"
    plots.append(line_plot(title, "√KL to the reference, nats", "reward, taste", curves))
    head = "".join(f"<th>{key}</th>" for key in ("", *FIGURES, "stable"))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(
            f"<td>{item[key]['mean']:.3f} ± {item[key]['deviation']:.3f}</td>" for key in FIGURES
        )
        + f"<td>{item['stable']} of {item['of']}</td></tr>"
        for name, item in summary.items()
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>PPO ablation: {sweep}</title>"
        "<style>body{font-family:sans-serif}td,th{padding:2px 12px;text-align:left}</style>"
        f"<h1>PPO-ptx on a toy: {sweep}</h1><p>± is the deviation over seeds.</p>"
        f"<table><tr>{head}</tr>{rows}</table>{''.join(plots)}\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweep", choices=tuple(SWEEPS), required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help=f"default: a dated file in {RESULTS.name}/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
