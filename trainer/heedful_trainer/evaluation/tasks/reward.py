"""Win rate under the project's reward model, on prompts that neither policy can have learned from.

Owns which prompts those are and how answers are compared. The reward model is what the version was
trained against: its verdict says whether training did what it was told, not what people think.
Event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import heedful
import numpy as np
from scipy import special

from heedful_trainer.evaluation import log
from heedful_trainer.evaluation.asking import Both, kept
from heedful_trainer.evaluation.figures import Estimate, Figure, mean_figure, win_rate
from heedful_trainer.evaluation.prompt_file import read_prompts
from heedful_trainer.evaluation.section import Context, Section, Skipped, drawn, left_out
from heedful_trainer.gate.sampler import Answer, Draw
from heedful_trainer.gate.statistics import at_equal_length, outcome_of
from heedful_trainer.simulation.prompts import draw_prompts

TITLE = "Win rate: the project's reward model"
_MAX_TOKENS = 200
_FROM_90_TO_95 = 1.959964 / 1.644854  # half-widths of normal intervals


async def reward(context: Context) -> Section:
    """Return how the reward model compares both policies.

    Raises:
        Skipped: the project has no reward model.
    """
    asker = context.asker
    try:
        await asker.rewards([("Hello", "Hello.")])
    except heedful.FailedPrecondition as error:
        raise Skipped(f"no reward model ({error}): a refresh makes one") from None
    prompts, origin = await _prompts(context)
    found = await asker.answers(prompts, Draw(1.0, _MAX_TOKENS, context.seed))
    places, both = kept(found)
    if not places:
        raise Skipped("no prompt fits the model's context")
    items = [
        [(prompts[place], a.token_ids) for place, a in zip(places, of, strict=True)] for of in both
    ]
    version = await asker.rewards(items[0])
    baseline = await asker.rewards(items[1]) if asker.compares else version
    return Section(
        "reward",
        TITLE,
        "done",
        figures=tuple(_figures(Both(version, baseline), both, asker.compares)),
        notes=(
            origin,
            "The version was trained against a reward model: this says whether training worked, "
            "not what people think.",
            *left_out(len(prompts), len(places)),
        ),
    )


def outcomes_of(version: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return who has the higher reward: 1, 0 or, where both have the same, a half."""
    return [outcome_of(ours - theirs, 0.0) for ours, theirs in zip(version, baseline, strict=True)]


def at_equal_length_95(
    outcomes: Sequence[float], lengths: Sequence[tuple[float, float]]
) -> Estimate:
    """Return the win rate at equal length; the gate's 90 % interval widened to 95 % in logits."""
    value, low, high = at_equal_length(outcomes, lengths)
    middle, ends = special.logit(value), special.logit(np.array([low, high]))
    wide = special.expit(middle + (ends - middle) * _FROM_90_TO_95)
    return Estimate(value, float(wide[0]), float(wide[1]), len(outcomes))


def _figures(rewards: Both[list[float]], both: Both[list[Answer]], compares: bool) -> list[Figure]:
    lengths = Both(*([float(answer.num_tokens) for answer in of] for of in both))
    figures = [
        mean_figure("reward", "reward", rewards, compares),
        mean_figure("length of answers", "tokens", lengths, compares, better="neither"),
    ]
    if not compares:
        return figures
    outcomes = outcomes_of(*rewards)
    estimate, tests = win_rate([str(idx) for idx in range(len(outcomes))], outcomes)
    wins, ties = outcomes.count(1.0), outcomes.count(0.5)
    detail = (
        f"{wins} won, {len(outcomes) - wins - ties} lost, {ties} tied; p = {tests.p_better:.3g}"
    )
    controlled = at_equal_length_95(outcomes, list(zip(*lengths, strict=True)))
    return [
        Figure("reward model prefers the version", "share", "higher", estimate, reference=0.5,
               detail=detail),
        Figure("the same at equal length", "share", "higher", controlled, reference=0.5,
               detail="outcome regressed on the difference in length"),
        *figures,
    ]  # fmt: skip


async def _prompts(context: Context) -> tuple[list[heedful.Prompt], str]:
    """Return what is asked, and in words where it is from."""
    if context.prompts is not None:
        own = drawn(read_prompts(context.prompts), context)
        return own, f"{len(own)} prompts of {context.prompts.name}."
    since = await _made(context)
    logged = await log.held_out_prompts(context.asker.client, since, context.limit)
    shipped = draw_prompts("evaluation", context.limit, context.seed)
    shipped = tuple(dict.fromkeys(shipped))[: context.limit - len(logged)]
    origin = (
        f"{len(logged)} prompts of the log that were first asked after both policies were made, "
        f"{len(shipped)} that ship with heedful."
    )
    return [*(list(ids) for ids in logged), *shipped], origin


async def _made(context: Context) -> datetime | None:
    """Return when the later of both policies was made; None where neither was trained."""
    models = await context.asker.client.list_models()
    names = (context.asker.version, context.asker.baseline)
    versions = [models.find(name) for name in names]
    times = [item.created for item in versions if item is not None and item.created is not None]
    return max(times, default=None)
