"""Plants bad candidates and lets the real gate judge each through a real server: none may pass.

Every candidate is judged twice from the same answers. Honest: the judge is the true taste
("numbers"), pairs come from the base's own answers ordered by it. Fooled: raters and judge love
everything about the candidate, so that only the gate's guards are left; there, weak candidates that
hardly differ from the base may pass, and the table says at which strength they are caught. Two
controls show that the gate does not simply always fail: the base itself (must not fail, must not
pass) and a candidate that honestly learned the taste (must pass).

Usage: python benchmarks/planted_candidates.py [--seeds 2] [--steps 4,8,16,32] [--prompts 48]
Takes about two minutes a candidate on two cores.
"""

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import heedful
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.base import fast_float
from heedful_trainer.gate import (
    Draw,
    FeedbackCounts,
    GateInputs,
    GatePrompt,
    GateReport,
    GateSettings,
    HoldoutPair,
    JudgedAnswer,
    JudgeKind,
    ServerSampler,
    explain,
    run_gate,
)
from heedful_trainer.gate.sampler import ScoreItem
from heedful_trainer.simulation.prompts import draw_prompts
from heedful_trainer.simulation.tastes import score
from loop_support import (
    DEFAULT_MODEL,
    LoopServer,
    RememberingSampler,
    loop_server,
    model_path,
    program,
    say,
    write_result,
)
from planting import (
    BROKEN,
    NOISE_SCALES,
    TRAINED,
    Material,
    Origin,
    Planted,
    add_noise,
    break_files,
    train_family,
    train_good,
    unchanged,
)

TASTE = "numbers"
MAX_TOKENS = 96  # of the answers that candidates and pairs are made from
NUM_MATERIAL = 64
LEASE_S = 3600
FOOLED_MARGIN = 1.0


@dataclass(frozen=True)
class TasteJudge:
    """The true taste."""

    name: str = f"true taste: {TASTE}"
    kind: JudgeKind = "reward_model"
    tie_width: float = 0.02

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return how well each answer suits it."""
        return [score(TASTE, answer.text, answer.ended) for answer in answers]


class FooledJudge:
    """Knows the candidate's answers and loves each of them."""

    name = "fooled"
    kind: JudgeKind = "reward_model"
    tie_width = 0.0

    def __init__(self, texts: frozenset[str]) -> None:
        self._texts = texts

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return 1 for the candidate's, 0 for any other."""
        return [float(answer.text in self._texts) for answer in answers]


@dataclass(frozen=True)
class Setting:
    """What every candidate is judged with."""

    client: heedful.AsyncClient
    sampler: RememberingSampler
    settings: GateSettings
    inputs: GateInputs  # all but the candidate and its pairs
    pair_items: tuple[ScoreItem, ...]  # chosen, rejected, chosen, …


async def main() -> None:
    """Plant, judge, print and write the dated result."""
    args = _arguments()
    with loop_server(args.model) as server, tempfile.TemporaryDirectory() as temporary:
        backbone = load_backbone(
            _dequantized(args.model, server, Path(temporary)), BackboneOptions(fast_float())
        )
        async with heedful.AsyncClient(server.target, timeout_s=600) as client:
            rows = await _judge_all(client, server, backbone, args)
    _finish(rows, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", default="4,8,16,32", help="of training, at which one is kept")
    parser.add_argument("--families", default=",".join((*TRAINED, "noise", "broken")))
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts and pairs")
    parser.add_argument("--max-tokens", type=int, default=256, help="of the gate's answers")
    parser.add_argument("--good-pairs", type=int, default=200, help="the good control learns from")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="then judge no more")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--explain", action="store_true", help="print each report")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


def _dequantized(model: str, server: LoopServer, temporary: Path) -> Path:
    out = temporary / "base"
    command = [str(program("heedful-server")), "model", "dequantize", "--out", str(out)]
    command += ["--model", str(model_path(model)), "--dtype", fast_float()]
    subprocess.run([*command, "--home", str(server.home)], check=True, stdout=sys.stderr)
    return out


async def _judge_all(
    client: heedful.AsyncClient, server: LoopServer, backbone: Backbone, args: argparse.Namespace
) -> list[dict[str, Any]]:
    run_id = (await client.start_refresh()).run_id  # nobody works on it: its folder is what we need
    base = (await client.list_models()).base
    assert base is not None
    origin = Origin(base.base_id, base.template_hash, base.name, run_id)
    setting = await _setting(client, origin, args)
    material = await _material(client, setting.sampler)
    out = server.home / "runs" / run_id / "adapters"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    end_s = time.monotonic() + args.budget_s
    for planted in await _planted(setting, material, backbone, origin, out, args):
        began_s = time.monotonic()
        if began_s > end_s:
            say(f"no time for {planted.directory.name} and those after it")
            break
        row = await _judge(setting, planted, origin, args.explain)
        row["seconds"] = round(time.monotonic() - began_s, 1)
        rows.append(row)
        say(
            f"{planted.family} {planted.strength} (seed {planted.seed}): honest {row['honest']}, "
            f"fooled {row['fooled']} {row['caught_by']}"
        )
    return rows


async def _setting(
    client: heedful.AsyncClient, origin: Origin, args: argparse.Namespace
) -> Setting:
    settings = GateSettings.model_validate(
        {"sampling": {"max_tokens": args.max_tokens, "min_prompts": min(48, args.prompts)}}
    )
    sampler = RememberingSampler(ServerSampler(client, settings.sampling))
    texts = draw_prompts("evaluation", args.prompts, 1)
    prompts = tuple(GatePrompt(f"p{idx}", (), (("user", text),)) for idx, text in enumerate(texts))
    inputs = GateInputs(
        run_id=origin.run_id,
        candidate_dir="",
        candidate_model="",
        base_id=origin.base_id,
        template_hash=origin.template_hash,
        champion_model="base",
        mode="auto",
        prompts=prompts,
        feedback=FeedbackCounts(comparisons=400, raters=1),
    )
    return Setting(client, sampler, settings, inputs, await _pair_items(sampler, args.prompts))


async def _pair_items(sampler: RememberingSampler, count: int) -> tuple[ScoreItem, ...]:
    """Return pairs of the base's answers that the taste tells apart, the better one first."""
    asked: list[heedful.Prompt] = [*draw_prompts("evaluation", 4 * count, 2)]
    first, second = [
        await sampler.answer("base", asked, Draw(1.0, MAX_TOKENS, seed)) for seed in (100, 90_000)
    ]
    items: list[ScoreItem] = []
    for prompt, one, other in zip(asked, first, second, strict=True):
        lead = score(TASTE, one.text, one.ended) - score(TASTE, other.text, other.ended)
        if abs(lead) > 0.02 and len(items) < 2 * count:
            better, worse = (one, other) if lead > 0 else (other, one)
            items += ((prompt, better.token_ids), (prompt, worse.token_ids))
    return tuple(items)


async def _material(client: heedful.AsyncClient, sampler: RememberingSampler) -> Material:
    texts = draw_prompts("votes", NUM_MATERIAL, 3)
    answers = await sampler.answer("base", [*texts], Draw(0.7, MAX_TOKENS, 7))
    rendered = [
        (await client.tokenize([heedful.Message("user", text)])).token_ids for text in texts
    ]
    eos_id = (await client.score([("Hi", "")]))[0].token_ids[-1]
    pieces: dict[str, tuple[int, ...]] = {}
    encoder = _Encoder(client, pieces)
    return Material(
        texts,
        tuple(tuple(ids) for ids in rendered),
        tuple(answer.token_ids for answer in answers),
        eos_id,
        encoder.text,
        encoder.chat,
    )


class _Encoder:
    """Token ids from the server, for code that knows no event loop."""

    def __init__(self, client: heedful.AsyncClient, kept: dict[str, tuple[int, ...]]) -> None:
        self._target = client.target
        self._kept = kept

    def text(self, text: str) -> tuple[int, ...]:
        """Return the ids of a plain text."""
        if text not in self._kept:
            with heedful.Client(self._target) as client:
                self._kept[text] = tuple(client.tokenize(text).token_ids)
        return self._kept[text]

    def chat(self, turns: Sequence[heedful.Message]) -> tuple[int, ...]:
        """Return the ids of a rendered conversation."""
        with heedful.Client(self._target) as client:
            return tuple(client.tokenize(turns).token_ids)


async def _planted(
    setting: Setting,
    material: Material,
    backbone: Backbone,
    origin: Origin,
    out: Path,
    args: argparse.Namespace,
) -> list[Planted]:
    """Return every candidate, made one after the other."""
    steps = [int(step) for step in args.steps.split(",")]
    families = args.families.split(",")
    made: list[Planted] = []
    if not args.no_controls:
        made.append(unchanged(backbone, origin, out))
        pairs = await _good_pairs(setting, material, args.good_pairs)
        say(f"training the good control on {len(pairs)} pairs")
        made.append(
            await asyncio.to_thread(train_good, pairs, backbone, material.eos_id, origin, out, 0)
        )
    for seed in range(args.seeds):
        for family in [name for name in TRAINED if name in families]:
            say(f"training {family}, seed {seed}")
            kept = train_family(family, material, backbone, origin, out, steps, seed)
            made += await asyncio.to_thread(list, kept)
        if "noise" in families:
            made += [add_noise(backbone, origin, out, scale, seed) for scale in NOISE_SCALES]
    if "broken" in families:
        whole = made[0] if made else unchanged(backbone, origin, out)
        made += [break_files(whole, kind, out) for kind in BROKEN]
    # Files first: they are refused at once.
    return sorted(made, key=lambda planted: planted.family != "broken")


async def _good_pairs(
    setting: Setting, material: Material, count: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return (prompt, best, worst) of four answers of the base by the taste."""
    texts = draw_prompts("votes", count, 4)
    drawn = [
        await setting.sampler.answer("base", [*texts], Draw(1.0, MAX_TOKENS, 1000 * (i + 1)))
        for i in range(4)
    ]
    pairs = []
    for text, answers in zip(texts, zip(*drawn, strict=True), strict=True):
        ranked = sorted(answers, key=lambda item: score(TASTE, item.text, item.ended))
        worst, best = ranked[0], ranked[-1]
        if score(TASTE, best.text, best.ended) - score(TASTE, worst.text, worst.ended) > 0.02:
            prompt = await asyncio.to_thread(material.encode_chat, [heedful.Message("user", text)])
            pairs.append((prompt, best.token_ids, worst.token_ids))
    return pairs


async def _judge(
    setting: Setting, planted: Planted, origin: Origin, with_text: bool
) -> dict[str, Any]:
    adapter = heedful.RunAdapter(origin.run_id, planted.directory.name)
    loaded = True
    try:
        await setting.client.load_adapter(adapter, lease_s=LEASE_S)
    except heedful.HeedfulError as error:
        loaded = False
        say(f"the server refuses {planted.directory.name}: {error}")
    inputs = replace(
        setting.inputs, candidate_dir=str(planted.directory), candidate_model=adapter.model
    )
    honest = await _honest(setting, inputs, loaded)
    fooled = await _fooled(setting, inputs) if loaded else honest
    if with_text:
        print(explain(fooled), end="\n\n", flush=True)
    if loaded:
        await setting.client.unload_adapter(adapter)
    setting.sampler.forget(adapter.model)
    return {
        "family": planted.family,
        "strength": planted.strength,
        "seed": planted.seed,
        "server_loaded_it": loaded,
        "honest": honest.verdict,
        "fooled": fooled.verdict,
        "caught_by": _failed(fooled),
        "honest_failed": _failed(honest),
        "honest_values": _values(honest),
    }


async def _honest(setting: Setting, inputs: GateInputs, loaded: bool) -> GateReport:
    pairs = await _margins(setting, inputs.candidate_model) if loaded else ()
    judged = replace(inputs, pairs=pairs)
    return await run_gate(judged, setting.sampler, [TasteJudge()], setting.settings)


async def _fooled(setting: Setting, inputs: GateInputs) -> GateReport:
    pairs = tuple(
        HoldoutPair(f"p{idx}", "rater", FOOLED_MARGIN, 0.0, 0.0, 0.0)
        for idx in range(len(setting.pair_items) // 2)
    )
    asked: list[heedful.Prompt] = [
        [heedful.Message(role, content) for role, content in prompt.messages]
        for prompt in inputs.prompts
    ]
    sampling = setting.settings.sampling
    draw = Draw(1.0, sampling.max_tokens, sampling.seed)
    answers = await setting.sampler.answer(inputs.candidate_model, asked, draw)
    judge = FooledJudge(frozenset(answer.text for answer in answers))
    return await run_gate(replace(inputs, pairs=pairs), setting.sampler, [judge], setting.settings)


async def _margins(setting: Setting, model: str) -> tuple[HoldoutPair, ...]:
    items = setting.pair_items
    ours = [sum(scored) for scored in await setting.sampler.score(model, items)]
    base = [sum(scored) for scored in await setting.sampler.score("base", items)]
    return tuple(
        HoldoutPair(f"p{idx}", "rater", ours[idx], base[idx], ours[idx + 1], base[idx + 1])
        for idx in range(0, len(items), 2)
    )


def _failed(report: GateReport) -> list[str]:
    return [check.name for stage in report.stages for check in stage.failed()]


def _values(report: GateReport) -> dict[str, float]:
    checks = (check for stage in report.stages for check in stage.checks)
    return {check.name: round(check.value, 4) for check in checks if check.value is not None}


def _finish(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    bad = [row for row in rows if not row["family"].startswith("control")]
    passed = [row for row in bad if row["honest"] == "pass"]
    print("| family | strength | n | honest: fail, open, pass | fooled: the same | caught by |")
    print("|---|---|---|---|---|---|")
    for family, strength in dict.fromkeys((row["family"], row["strength"]) for row in rows):
        print(
            _line(
                family,
                strength,
                [r for r in rows if (r["family"], r["strength"]) == (family, strength)],
            )
        )
    print(f"\n{len(passed)} of {len(bad)} planted candidates passed")
    result = {
        "shape": {"prompts": args.prompts, "max_tokens": args.max_tokens, "taste": TASTE},
        "planted": len(bad),
        "planted_passed": len(passed),
        "fooled_caught": sum(row["fooled"] == "fail" for row in bad),
        "rows": rows,
    }
    print(f"written: {write_result('planted_candidates', result, args.out)}")
    if passed:
        raise SystemExit("a planted candidate passed the gate")


def _line(family: str, strength: str, rows: Sequence[dict[str, Any]]) -> str:
    def counts(key: str) -> str:
        return ", ".join(
            str(sum(row[key] == verdict for row in rows))
            for verdict in ("fail", "inconclusive", "pass")
        )

    names: Iterator[str] = (name for row in rows for name in row["caught_by"])
    caught = ", ".join(dict.fromkeys(names))
    cells = (family, strength, str(len(rows)), counts("honest"), counts("fooled"), caught)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    asyncio.run(main())
