"""Ablations of PPO-ptx on a toy (`ppo_toy.py`): the paper's E.6 to E.11 at a size of minutes.

    python benchmarks/ppo_ablations.py --sweep gamma|beta|ptx_texts|minibatches|reading [--seeds 5]

`gamma` sweeps the literal ptx coefficient, and then a stress run without KL penalty (β = 0, longer)
with and without ptx. `beta` sweeps the KL penalty, `ptx_texts` the texts for each episode at
coefficient 27.8, `minibatches` the steps of a batch. `reading` trains against the mean, the least
and the first of the reward's heads, without KL penalty, longer, and from few comparisons by bad
raters, so that the reward can be over-optimised; each seed has raters of its own, for which answer
fools a reward model is a matter of which reward model it is. Rewards are then as the model gives
them, so that the three can be compared, and no accuracy is asked of the reward model.

For each value: true taste at the end and of the snapshot that would be kept, reward by the three
readings, KL, and how far the language-model loss on held-out text rose, over seeds. Then an
over-optimisation report, of the runs that went farthest or of every reading: reward by one head, by
the mean and by the least head, and the true taste, against √KL.

Before anything is swept it checks that the reward model is better than chance by the true taste,
and that the untrained policy is at a KL of 0 with no rise of the loss.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from heedful_trainer.ppo.plots import line_plot
from heedful_trainer.ppo.report import overoptimisation
from loop_support import RESULTS, say, write_result
from ppo_toy import Raters, Toy, run, toy

# No KL penalty, twice as long.
STRESS = {"kl.beta": 0.0, "iterations": 56, "stopping.evaluate_every": 4}
FIGURES = (
    "true_taste",
    "true_taste_of_chosen",
    "reward_single",
    "reward_mean",
    "reward_min",
    "kl_nats",
    "lm_loss_rise",
)
READINGS = {
    "reward_single": "one head",
    "reward_mean": "mean of heads",
    "reward_min": "least head",
    "true_taste": "true taste (0 to 1)",
}

Changes = Mapping[str, Any]
Runs = list[dict[str, Any]]
Looks = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Sweep:
    """A setting, the values it takes, and what all its runs have in common."""

    path: str
    values: tuple[float, ...] | tuple[str, ...]
    fixed: Changes = field(default_factory=dict)
    more: Mapping[str, Changes] = field(default_factory=dict)  # cases beside the values
    raters: Raters = field(default_factory=Raters)
    is_by_raters: bool = False  # each seed has raters of its own, and every case a report
    least_accuracy: float = 0.55  # of the reward model by the true taste, else no figures

    def cases(self) -> dict[str, Changes]:
        """Return what each case changes, by name."""
        return {self.name(value): {**self.fixed, self.path: value} for value in self.values} | {
            **self.more
        }

    def name(self, value: float | str) -> str:
        """Return the name of the case of a value."""
        return f"{self.path} = {value if isinstance(value, str) else format(value, 'g')}"

    def toys(self, seeds: int) -> Iterable[tuple[Raters, Sequence[int]]]:
        """Return the raters, and which seeds PPO runs with on their reward model."""
        if self.is_by_raters:
            return [(replace(self.raters, seed=seed), (seed,)) for seed in range(seeds)]
        return [(self.raters, range(seeds))]


SWEEPS = {
    "gamma": Sweep(
        "ptx.gamma",
        (0.0, 1.0, 5.0, 20.0, 27.8),
        more={f"beta = 0, gamma = {g:g}": {**STRESS, "ptx.gamma": g} for g in (0.0, 27.8)},
    ),
    "beta": Sweep("kl.beta", (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)),
    "ptx_texts": Sweep("ptx.texts_per_episode", (0.5, 1.0, 4.0, 8.0, 16.0), {"ptx.gamma": 27.8}),
    "minibatches": Sweep("minibatches", (1, 2, 4, 8)),
    "reading": Sweep(
        "reward.reading",
        ("mean", "least", "single"),
        {"kl.beta": 0.0, "iterations": 40, "reward.scale": "model"},
        raters=Raters(comparisons=120, flipped=1 / 4),
        is_by_raters=True,
        least_accuracy=0.0,  # that a reward model knows little is what is looked at
    ),
}


def main() -> None:
    """Check, sweep, and write JSON and a page of plots."""
    args = _arguments()
    sweep = SWEEPS[args.sweep]
    started = time.monotonic()
    found, accuracies = _swept(sweep, args.seeds)
    summary = {name: _summary(runs) for name, runs in found.items()}
    farthest = max(found, key=lambda name: summary[name]["kl_nats"]["mean"])
    reported = list(found) if sweep.is_by_raters else [farthest]
    looks = {name: _mean_looks(found[name]) for name in reported}
    result = {
        "sweep": args.sweep,
        "seeds": args.seeds,
        "seconds": time.monotonic() - started,
        "reward_accuracy": accuracies,
        "summary": summary,
        "overoptimisation": [
            {"of": name, "looks": each, "report": overoptimisation(each)}
            for name, each in looks.items()
        ],
        "runs": found,
    }
    written = write_result(f"ppo_ablations_{args.sweep}", result, args.out)
    page = written.with_suffix(".html")
    plots = [*_plots_by_value(sweep, summary), *_plots_of_distance(looks)]
    page.write_text(_page(args.sweep, summary, plots), encoding="utf-8")
    print(json.dumps(summary, indent=1))
    say(f"written to {written} and {page.name}")


def _swept(sweep: Sweep, seeds: int) -> tuple[dict[str, Runs], list[float]]:
    """Return the runs of each case, and the accuracy of each reward model."""
    cases = sweep.cases()
    found: dict[str, Runs] = {name: [] for name in cases}
    accuracies = []
    for raters, of_raters in sweep.toys(seeds):
        with toy(raters) as made:
            _check(made, sweep.least_accuracy)
            say(f"reward model: {made.reward_accuracy:.0%} of unseen pairs by the true taste")
            accuracies.append(made.reward_accuracy)
            for name, changes in cases.items():
                found[name] += [_run(made, name, changes, seed) for seed in of_raters]
    return found, accuracies


def _check(made: Toy, least_accuracy: float) -> None:
    if made.reward_accuracy < least_accuracy:
        sys.exit(f"the reward model knows nothing ({made.reward_accuracy:.0%}): no figures")
    made.trained.adapter.reset(0)
    before, after = (made.language_loss(with_adapter=on) for on in (False, True))
    if before != after:
        sys.exit("an untrained adapter changes the language-model loss: no figures")


def _run(made: Toy, name: str, changes: Changes, seed: int) -> dict[str, Any]:
    found = run(made, dict(changes), seed)
    if found["looks"][0]["kl_nats"] != 0.0:
        sys.exit("the untrained policy is not at a KL of 0: no figures")
    figures = ", ".join(f"{key} {found[key]:.3g}" for key in FIGURES)
    say(f"{name}, seed {seed}: {figures}; {found['ended']}")
    return found


def _summary(runs: Runs) -> dict[str, Any]:
    found: dict[str, Any] = {"stable": sum(item["stable"] for item in runs), "of": len(runs)}
    for key in (*FIGURES, "true_taste_before", "ppo_norm", "ptx_norm"):
        values = [item[key] for item in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = {"mean": statistics.fmean(values), "deviation": spread}
    return found


def _mean_looks(runs: Runs) -> Looks:
    """Return the looks of several seeds as one: the mean at each iteration."""
    whole = [item["looks"] for item in runs if item["stable"]]
    return [
        {key: statistics.fmean(look[key] for look in at_once) for key in at_once[0]}
        for at_once in zip(*whole, strict=True)
    ]


def _plots_by_value(sweep: Sweep, summary: Mapping[str, Any]) -> Iterable[str]:
    """Yield a plot for each figure; values that are words lie on no axis."""
    values = [value for value in sweep.values if not isinstance(value, str)]
    for key in FIGURES if values else ():
        swept = [(value, summary[sweep.name(value)][key]) for value in values]
        lines = {
            "mean": [(value, item["mean"]) for value, item in swept],
            "mean + deviation": [(v, item["mean"] + item["deviation"]) for v, item in swept],
            "mean - deviation": [(v, item["mean"] - item["deviation"]) for v, item in swept],
        }
        yield line_plot(f"{key} by {sweep.path}", sweep.path, key, lines)


def _plots_of_distance(looks: Mapping[str, Looks]) -> Iterable[str]:
    """Yield the over-optimisation plot of each case, and the true taste of all in one."""
    axis = "√KL to the reference, nats"
    for name, each in looks.items():
        curves = {
            label: [(look["sqrt_kl"], look[key]) for look in each]
            for key, label in READINGS.items()
        }
        title = f"over-optimisation: {name}, mean of seeds"
        yield line_plot(title, axis, "reward, taste", curves)
    if len(looks) > 1:
        tastes = {
            name: [(look["sqrt_kl"], look["true_taste"]) for look in each]
            for name, each in looks.items()
        }
        yield line_plot("true taste, mean of seeds", axis, "taste", tastes)


def _page(sweep: str, summary: Mapping[str, Any], plots: Iterable[str]) -> str:
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
