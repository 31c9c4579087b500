"""The gate as a whole: what a better candidate passes, and where each bad one is caught."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from heedful_trainer.gate import (
    GateInputs,
    GateReport,
    GateSettings,
    HoldoutPair,
    MustPassError,
    explain,
    run_gate,
)
from heedful_trainer.gate.assets import TRIGGERS

from .conftest import Policy, ScriptedJudge, ScriptedSampler, plain, write_adapter

GOOD = Policy(lambda prompt, seed: "good " + plain(prompt, seed))
BASE = Policy(plain)


def likes_good(answer: object) -> float:
    return float("good" in answer.text)


async def judge(
    inputs: GateInputs, settings: GateSettings, candidate: Policy, *judges: ScriptedJudge
) -> GateReport:
    sampler = ScriptedSampler({inputs.candidate_model: candidate, "base": BASE})
    return await run_gate(inputs, sampler, judges or [ScriptedJudge(likes_good)], settings)


def failed(report: GateReport) -> set[str]:
    return {check.name for stage in report.stages for check in stage.failed()}


async def test_a_better_candidate_passes(inputs: GateInputs, settings: GateSettings) -> None:
    reward = ScriptedJudge(likes_good)
    other = ScriptedJudge(likes_good, "sentences", "other_backbone")

    report = await judge(inputs, settings, GOOD, reward, other)

    assert report.verdict == "pass", explain(report)
    assert report.action == "ask"
    assert [stage.name for stage in report.stages] == [
        "integrity",
        "offline",
        "canary",
        "promotion",
    ]
    assert report.check("held-out pairs").value == pytest.approx(34 / 40)
    assert report.check("win rate").value == 1.0
    assert (reward.reads, other.reads) == (1, 1), "a judge is read once"
    assert GateReport.from_json(json.loads(json.dumps(report.to_json()))) == report


async def test_sampling_is_equal_for_both_and_never_truncated(
    inputs: GateInputs, settings: GateSettings
) -> None:
    sampler = ScriptedSampler({inputs.candidate_model: GOOD, "base": BASE})
    await run_gate(inputs, sampler, [ScriptedJudge(likes_good)], settings)
    golden, golden_base, ours, theirs = sampler.drawn
    assert golden[1:] == golden_base[1:]
    assert golden[1].temperature == 0.0
    assert ours[1:] == theirs[1:]
    assert ours[1].temperature == 1.0
    assert ours[2] == settings.sampling.min_prompts, "everyday prompts fill up"


async def test_an_equal_candidate_is_inconclusive(
    inputs: GateInputs, settings: GateSettings
) -> None:
    same = Policy(lambda prompt, seed: plain(prompt, seed + 1))
    pairs = tuple(
        dataclasses.replace(pair, chosen_reference=-10.0 + (-1) ** idx)
        for idx, pair in enumerate(inputs.pairs)
    )
    rng = random.Random(4)
    report = await judge(
        dataclasses.replace(inputs, pairs=pairs, mode="auto"),
        settings,
        same,
        ScriptedJudge(lambda answer: rng.random()),
    )
    assert (report.verdict, report.action) == ("inconclusive", "keep"), explain(report)
    assert not failed(report)


async def test_a_judge_that_prefers_the_champion_fails_it(
    inputs: GateInputs, settings: GateSettings
) -> None:
    report = await judge(inputs, settings, GOOD, ScriptedJudge(lambda a: -likes_good(a)))
    assert "win rate" in failed(report)
    other = ScriptedJudge(lambda a: -likes_good(a), "sentences", "other_backbone")
    report = await judge(inputs, settings, GOOD, ScriptedJudge(likes_good), other)
    assert failed(report) == {"win rate (sentences)"}


async def test_without_a_reward_model_nothing_is_proven(
    inputs: GateInputs, settings: GateSettings
) -> None:
    other = ScriptedJudge(likes_good, "sentences", "other_backbone")
    report = await judge(inputs, settings, GOOD, other)
    assert report.verdict == "inconclusive"
    assert report.check("win rate").verdict == "skipped"
    assert report.check("judge on another backbone") is None


async def test_why_there_is_no_judge_on_another_backbone_is_said(
    inputs: GateInputs, settings: GateSettings
) -> None:
    why = dataclasses.replace(inputs, no_other_judge="the package is not installed")
    report = await judge(why, settings, GOOD)
    assert report.check("judge on another backbone").detail == "the package is not installed"
    assert report.verdict == "pass", "it forbids, but need not be convinced"


async def test_too_few_pairs_or_raters_are_skipped_and_say_so(
    inputs: GateInputs, settings: GateSettings
) -> None:
    few = dataclasses.replace(inputs, pairs=inputs.pairs[:5], prompts=inputs.prompts[:5])
    report = await judge(few, settings, GOOD)
    assert report.verdict == "inconclusive"
    for name in ("held-out pairs", "win rate"):
        check = report.check(name)
        assert check.verdict == "skipped"
        assert "n too small" in check.detail
    team = dataclasses.replace(inputs, profile="team")
    report = await judge(team, settings, GOOD)
    assert report.check("held-out pairs").verdict == "skipped", "forty pairs of one rater"
    assert "1 raters, 6 are needed" in report.check("held-out pairs").detail


def endless(prompt: str, seed: int) -> str:
    """Return a good answer that ends in time only where the prompt is not of the user's own."""
    text = "good " + plain(prompt, seed)
    return text + " ".join(f"y{i}" for i in range(300)) if prompt.startswith("question") else text


REPEATED = "the same thing again and again so it goes on and on for ever "


@pytest.mark.parametrize(
    ("candidate", "caught"),
    [
        (dataclasses.replace(GOOD, ended=False), {"golden prompts end"}),
        (Policy(lambda p, s: endless(p, s), end_logprob=-9.0), {"endings", "end token"}),
        (dataclasses.replace(GOOD, end_logprob=-1.5), {"end token"}),
        (Policy(lambda p, s: "good " + plain(p, s) + " " + plain(p, s + 50)), {"length"}),
        (Policy(lambda p, s: "good"), {"length"}),
        (Policy(lambda p, s: "good " + REPEATED * 3), {"looping", "distinct trigrams"}),
        (Policy(lambda p, s: "good I'm sorry, but I can't do that. " + plain(p, s)), {"refusals"}),
        (Policy(lambda p, s: "What a great question! good " + plain(p, s)), {"praise"}),
        (Policy(lambda p, s: "�" * 30 + " good " + plain(p, s)), {"broken text"}),
        (Policy(lambda p, s: "good ```code``` " + plain(p, s)), {"format"}),
        (dataclasses.replace(GOOD, logprob=-0.1), {"KL to base"}),
        (dataclasses.replace(GOOD, logprob=float("nan")), {"KL to base", "KL to champion"}),
        (dataclasses.replace(GOOD, others=-1.2), {"language-model loss"}),
        (dataclasses.replace(GOOD, facts=-1.0), {"capability floor"}),
        (dataclasses.replace(GOOD, pressed=0.0), {"stands by right answers"}),
        (dataclasses.replace(GOOD, triggered=-3.0), {"triggers"}),
    ],
)
async def test_each_bad_candidate_is_caught_though_raters_and_judge_love_it(
    inputs: GateInputs, settings: GateSettings, candidate: Policy, caught: set[str]
) -> None:
    report = await judge(dataclasses.replace(inputs, mode="auto"), settings, candidate)
    assert report.verdict == "fail", explain(report)
    assert report.action == "reject"
    assert caught <= failed(report), explain(report)


async def test_an_empty_answer_fails_integrity_first(
    inputs: GateInputs, settings: GateSettings
) -> None:
    report = await judge(inputs, settings, Policy(lambda p, s: ""))
    assert failed(report) == {"golden prompts answered"}
    assert [stage.name for stage in report.stages] == ["integrity", "promotion"]
    assert not report.overridable


async def test_a_base_that_never_ends_is_not_held_against_the_candidate(
    inputs: GateInputs, settings: GateSettings
) -> None:
    endless_base = dataclasses.replace(BASE, ended=False)
    sampler = ScriptedSampler(
        {inputs.candidate_model: dataclasses.replace(GOOD, ended=False), "base": endless_base}
    )
    report = await run_gate(inputs, sampler, [ScriptedJudge(likes_good)], settings)
    assert report.check("golden prompts end").verdict == "pass"
    assert report.check("end token").verdict == "skipped"
    assert report.verdict == "pass", explain(report)


async def test_safety_cannot_be_overridden_and_taste_can(
    inputs: GateInputs, settings: GateSettings
) -> None:
    trigger = await judge(inputs, settings, dataclasses.replace(GOOD, triggered=-3.0))
    assert not trigger.overridable
    assert "cannot be overridden" in explain(trigger)
    assert repr(TRIGGERS[1]) in trigger.check("triggers").detail
    drift = await judge(inputs, settings, dataclasses.replace(GOOD, logprob=-0.1))
    assert drift.overridable


async def test_a_win_by_length_alone_fails(inputs: GateInputs, settings: GateSettings) -> None:
    longer = Policy(lambda p, s: plain(p, s) + " " + " ".join(f"x{i}" for i in range(s * 5 % 13)))
    report = await judge(inputs, settings, longer, ScriptedJudge(lambda a: len(a.token_ids)))
    assert report.check("win rate").verdict == "pass"
    assert report.check("length").verdict == "pass"
    assert report.check("win rate at equal length").verdict == "inconclusive", explain(report)
    assert report.verdict == "inconclusive"


@pytest.mark.parametrize("kind", ["nan", "hash", "base", "template", "missing", "flipped", "role"])
async def test_files_that_are_not_whole_fail_by_name(
    inputs: GateInputs, settings: GateSettings, adapter_dir: Path, kind: str
) -> None:
    weights = adapter_dir / "adapter_model.safetensors"
    expected = "files"
    match kind:
        case "nan":
            write_adapter(adapter_dir, {"a": torch.tensor([1.0, float("nan")])})
            expected = "finite weights"
        case "hash":
            inputs = dataclasses.replace(inputs, candidate_hash="0" * 64)
        case "base":
            inputs = dataclasses.replace(inputs, base_id="other")
            expected = "origin"
        case "template":
            inputs = dataclasses.replace(inputs, template_hash="other")
            expected = "origin"
        case "missing":
            weights.unlink()
        case "flipped":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "role":
            (adapter_dir / "reward_heads.safetensors").write_bytes(weights.read_bytes())
            write_adapter(adapter_dir, {"a": torch.ones(1)}, role="reward")
            expected = "origin"
    report = await judge(inputs, settings, GOOD)
    assert failed(report) == {expected}, explain(report)
    assert (report.verdict, report.overridable) == ("fail", False)
    if kind in ("missing", "flipped"):
        assert weights.name in report.check("files").detail


async def test_must_pass_prompts_decide(
    inputs: GateInputs, settings: GateSettings, tmp_path: Path
) -> None:
    rules = tmp_path / "must_pass.jsonl"
    inputs = dataclasses.replace(inputs, must_pass_path=str(rules))
    rules.write_text(json.dumps({"prompt": "Say it", "contains": "good"}))
    assert (await judge(inputs, settings, GOOD)).verdict == "pass"
    rules.write_text(json.dumps({"prompt": "Say it", "not_contains": "good"}))
    report = await judge(inputs, settings, GOOD)
    assert failed(report) == {"must-pass"}
    assert not report.overridable
    rules.write_text("nonsense")
    with pytest.raises(MustPassError):
        await judge(inputs, settings, GOOD)


async def test_a_rebuild_needs_no_benefit_but_no_loss_either(
    inputs: GateInputs, settings: GateSettings
) -> None:
    even = tuple(
        HoldoutPair(f"p{idx}", "me", -10.0, -10.0 + (-1) ** idx * 0.5, -11.0, -11.0)
        for idx in range(300)
    )
    flip = itertools.cycle([0.0, 1.0, 1.0, 0.0])
    rebuild = dataclasses.replace(inputs, kind="rebuild", pairs=even)
    tied = ScriptedJudge(lambda answer: 0.0)
    report = await judge(rebuild, settings, BASE, tied)
    assert (report.verdict, report.action) == ("pass", "promote"), explain(report)
    losing = ScriptedJudge(lambda a: -likes_good(a))
    report = await judge(rebuild, settings, GOOD, losing)
    assert "win rate" in failed(report)
    unsure = ScriptedJudge(lambda answer: next(flip))
    assert (await judge(rebuild, settings, GOOD, unsure)).verdict != "fail"


def test_inputs_travel_as_json(inputs: GateInputs) -> None:
    text = json.dumps(inputs.to_json())
    assert GateInputs.from_json(json.loads(text)) == inputs


async def test_the_explanation_names_every_check(
    inputs: GateInputs, settings: GateSettings
) -> None:
    report = await judge(inputs, settings, GOOD)
    text = explain(report)
    for stage in report.stages:
        for check in stage.checks:
            assert check.name in text
    assert text.startswith("Verdict: pass")
    assert "it would count as proven" in text
