"""The gate as a whole: one candidate, its stages in order, one report.

Owns the order of stages and what each is given; the checks own their questions, `promotion` what
follows. Everything comes in by argument: inputs, sampler, judges, settings. Runs on an event loop;
files, and judges, which may compute for long, in worker threads.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import heedful

from heedful_trainer.gate import assets, benefit, promotion
from heedful_trainer.gate.drift import Sampled, drift_checks
from heedful_trainer.gate.integrity import answer_checks, file_checks
from heedful_trainer.gate.judges import Judge, JudgedAnswer
from heedful_trainer.gate.probes import probe_checks
from heedful_trainer.gate.sampler import Answer, Draw, Sampler, ServerSampler, prompt_of
from heedful_trainer.gate.settings import GateSettings
from heedful_trainer.gate.statistics import outcome_of
from heedful_trainer.gate.types import Check, GateInputs, GatePrompt, GateReport, StageResult

_ORDER_SEED = 7  # of the order in which a judge sees answers


async def run_gate(
    inputs: GateInputs, sampler: Sampler, judges: Sequence[Judge], settings: GateSettings
) -> GateReport:
    """Judge one candidate and return the evidence.

    Raises:
        MustPassError: the must-pass file cannot be used.
        HeedfulError: the server does not answer; nothing is concluded then.
    """
    stages = [await _integrity(inputs, settings, sampler)]
    if stages[0].verdict != "fail":
        stages.append(await _offline(inputs, settings, sampler, judges))
        stages.append(promotion.canary_stage(inputs.canary, settings.statistics))
    last, verdict, action = promotion.promotion_stage(inputs, stages, settings.statistics)
    return GateReport(
        run_id=inputs.run_id,
        verdict=verdict,
        action=action,
        stages=(*stages, last),
        profile=inputs.profile,
        mode=inputs.mode,
        kind=inputs.kind,
        settings=settings.model_dump(mode="json"),
    )


def run_gate_on_server(
    inputs: GateInputs,
    connect: Callable[[], heedful.AsyncClient],
    judges: Sequence[Judge],
    settings: GateSettings,
) -> GateReport:
    """Judge one candidate through a running server; blocks, for callers without an event loop.

    Raises:
        MustPassError, HeedfulError: as for `run_gate`.
    """

    async def judged() -> GateReport:
        async with connect() as client:
            sampler = ServerSampler(client, settings.sampling)
            return await run_gate(inputs, sampler, judges, settings)

    return asyncio.run(judged())


async def _integrity(inputs: GateInputs, settings: GateSettings, sampler: Sampler) -> StageResult:
    checks = await asyncio.to_thread(file_checks, inputs)
    if promotion.stage_verdict(checks) == "pass":
        checks += await answer_checks(inputs, settings, sampler)
    return StageResult("integrity", promotion.stage_verdict(checks), tuple(checks))


async def _offline(
    inputs: GateInputs, settings: GateSettings, sampler: Sampler, judges: Sequence[Judge]
) -> StageResult:
    own = inputs.prompts[: settings.sampling.max_prompts]
    added = assets.general_prompts()[: max(0, settings.sampling.min_prompts - len(own))]
    prompts = (*own, *added)
    sampled = await sample(inputs, settings, sampler, prompts)
    checks = [benefit.pair_accuracy(inputs.pairs, inputs.profile, settings.statistics, inputs.kind)]
    for judge in judges:
        checks += await _judged(judge, inputs, settings, own, sampled)
    if not any(judge.kind == "reward_model" for judge in judges):
        detail = "there is no reward model to judge answers"
        checks.append(Check("win rate", "skipped", detail=detail, proves_benefit=True))
    if not any(judge.kind == "other_backbone" for judge in judges):
        detail = inputs.no_other_judge or "there is none"
        checks.append(Check("judge on another backbone", "skipped", detail=detail))
    checks += drift_checks(sampled, settings.drift, settings.probes, settings.statistics)
    checks += await probe_checks(inputs, settings, sampler, prompts, sampled)
    detail = f"{len(own)} held-out prompts, {len(added)} everyday ones for drift alone"
    return StageResult("offline", promotion.stage_verdict(checks), tuple(checks), detail)


async def sample(
    inputs: GateInputs,
    settings: GateSettings,
    sampler: Sampler,
    prompts: Sequence[GatePrompt],
) -> Sampled:
    """Return both policies' answers at T = 1, each scored by the policies it is compared with."""
    draw = Draw(1.0, settings.sampling.max_tokens, settings.sampling.seed)
    asked = [prompt_of(prompt) for prompt in prompts]
    ours, theirs = await asyncio.gather(
        sampler.answer(inputs.candidate_model, asked, draw),
        sampler.answer(inputs.champion_model, asked, draw),
    )

    async def scored(model: str, answers: Sequence[Answer]) -> tuple[tuple[float, ...], ...]:
        items = [(prompt, answer.token_ids) for prompt, answer in zip(asked, answers, strict=True)]
        return tuple(await sampler.score(model, items))

    ours_by_base = await scored(inputs.base_model, ours)
    same = inputs.champion_is_base
    return Sampled(
        candidate=tuple(ours),
        champion=tuple(theirs),
        candidate_by_base=ours_by_base,
        candidate_by_champion=ours_by_base if same else await scored(inputs.champion_model, ours),
        champion_by_base=(
            tuple(answer.logprobs for answer in theirs)
            if same
            else await scored(inputs.base_model, theirs)
        ),
        champion_by_candidate=await scored(inputs.candidate_model, theirs),
    )


async def _judged(
    judge: Judge,
    inputs: GateInputs,
    settings: GateSettings,
    own: Sequence[GatePrompt],
    sampled: Sampled,
) -> list[Check]:
    """Return the checks by one judge, which is read once with both policies' answers mixed."""
    name = "win rate" if judge.kind == "reward_model" else f"win rate ({judge.name})"
    if not own:
        proves = judge.kind == "reward_model"
        return [Check(name, "skipped", detail="n too small: no prompts", proves_benefit=proves)]
    differences = await _differences(judge, own, sampled)
    units = [benefit.unit_of(inputs.profile, prompt.prompt_id, prompt.rater_id) for prompt in own]
    statistics = settings.statistics
    check = benefit.win_rate(
        name,
        judge.kind,
        units,
        differences,
        judge.tie_width,
        statistics,
        profile=inputs.profile,
        kind=inputs.kind,
    )
    if judge.kind != "reward_model" or inputs.kind == "rebuild":
        return [check]
    outcomes = [outcome_of(value, judge.tie_width) for value in differences]
    lengths = [
        (float(ours.num_tokens), float(theirs.num_tokens))
        for ours, theirs in zip(sampled.candidate, sampled.champion, strict=True)
    ][: len(own)]
    controlled = benefit.length_controlled(units, outcomes, lengths, inputs.profile, statistics)
    return [check, controlled]


async def _differences(judge: Judge, own: Sequence[GatePrompt], sampled: Sampled) -> list[float]:
    """Return by how much the judge prefers each of the candidate's answers."""
    answers = [
        JudgedAnswer(prompt, answer.text, answer.token_ids, answer.ended)
        for given in (sampled.candidate, sampled.champion)
        for prompt, answer in zip(own, given[: len(own)], strict=True)
    ]
    order = list(range(len(answers)))
    random.Random(_ORDER_SEED).shuffle(order)
    found = await asyncio.to_thread(judge.score, [answers[idx] for idx in order])
    scores = dict(zip(order, found, strict=True))
    return [float(scores[idx]) - float(scores[idx + len(own)]) for idx in range(len(own))]
