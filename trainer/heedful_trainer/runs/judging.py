"""The stage that judges: the candidate in the server beside the champion, and the gate's report.

Owns what the gate is given (prompts and pairs that were held out, the run's reward model and one on
another backbone as judges) and that the candidate stays loaded while it is asked. The checks are
the gate's. Training thread; the lease on the loaded adapter has a thread of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import heedful
import structlog
from heedful_store import BASE_VERSION

from heedful_trainer.config import DpoSettings
from heedful_trainer.dataset.builders import pairs_of
from heedful_trainer.dataset.examples import Example
from heedful_trainer.errors import StageFailed
from heedful_trainer.evaluation import JudgePair, JudgeUnavailable, fit_sentence_judge
from heedful_trainer.gate import (
    FeedbackCounts,
    GateInputs,
    GatePrompt,
    GateSettings,
    HoldoutPair,
    Judge,
    JudgedAnswer,
    MustPassError,
    explain,
    run_gate_on_server,
    suspicious_phrases,
)
from heedful_trainer.gate.judges import JudgeKind
from heedful_trainer.methods.policy import parts
from heedful_trainer.packing import Row
from heedful_trainer.reward.model import RewardModel, load_reward_model
from heedful_trainer.runs.connecting import async_client
from heedful_trainer.runs.context import RunContext, write_whole
from heedful_trainer.runs.learning import PAIRS

ADAPTER = "policy"
_ADAPTER_LEASE_S = 300
# Reward differences below this share of the temperature are as good as a coin.
_TIE_SHARE = 0.1


class RunJudge:
    """The run's own reward model as a judge."""

    name = "reward model of the run"
    kind: JudgeKind = "reward_model"

    def __init__(self, model: RewardModel, eos_token_id: int) -> None:
        self._model, self._eos = model, eos_token_id

    @property
    def tie_width(self) -> float:
        """A tenth of the temperature: probabilities from 0.475 to 0.525."""
        return _TIE_SHARE * self._model.heads.temperature

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return the mean reward of each answer."""
        rows = [
            Row(answer.prompt.token_ids, (answer.token_ids or (self._eos,),)) for answer in answers
        ]
        return [float(value) for value in self._model.score(rows).mean(1)]


def judge_candidate(context: RunContext) -> Mapping[str, Any]:
    """Ask the gate; without it the verdict is "skipped", which never promotes by itself.

    Raises:
        StageFailed: the server is away, or refuses the candidate.
    """
    if not context.config.gate.enabled:
        context.lease.update(verdict="skipped")
        return {"verdict": "skipped", "detail": "turned off (gate.enabled)"}
    table = context.config.gate
    settings = GateSettings.model_validate(
        table.model_dump(exclude={"enabled", "mode", "must_pass_file"})
    )
    try:
        judges, no_other_judge = _judges(context)
        with _loaded(context):
            report = run_gate_on_server(
                gate_inputs(context, no_other_judge),
                lambda: async_client(context.config, context.run.scope.project),
                judges,
                settings,
            )
    except heedful.HeedfulError as error:
        raise StageFailed(f"the gate could not ask the server: {error}") from error
    except MustPassError as error:
        raise StageFailed(str(error)) from error
    content = report.to_json()
    context.write_json("gate.json", content)
    write_whole(context.directory / "report" / "gate.txt", explain(report).encode())
    context.lease.update(verdict=report.verdict)
    return content


def gate_inputs(context: RunContext, no_other_judge: str = "") -> GateInputs:
    """Return what the gate is told about the candidate.

    Args:
        context: of the run.
        no_other_judge: why there is no judge on another backbone, where there is none.
    """
    run, base = context.run, context.base.identity
    champion = context.store.aliases(run.scope, base.base_id).get("champion", BASE_VERSION)
    evidence = run.evidence["snapshot"]
    return GateInputs(
        run_id=run.run_id,
        candidate_dir=str(context.adapter_dir(ADAPTER)),
        candidate_model=f"run:{run.run_id}/{ADAPTER}",
        candidate_hash=str(run.evidence["policy"]["content_hash"]),
        base_id=base.base_id,
        template_hash=base.template_hash,
        champion_model=champion,
        champion_is_base=champion == BASE_VERSION,
        tenant=run.scope.tenant,
        project=run.scope.project,
        profile=context.place.profile,
        mode=context.config.gate.mode,
        kind=run.kind,
        prompts=tuple(_prompts(context.examples)),
        pairs=tuple(_pairs(context)),
        feedback=_counts(evidence),
        must_pass_path=context.config.gate.must_pass_file,
        trigger_phrases=suspicious_phrases(_asked(context)),
        no_other_judge=no_other_judge,
    )


def _asked(context: RunContext) -> dict[int, str]:
    """Return the last turn of each prompt that was learned from, by place in the log."""
    decode = context.encoder.decode
    return {
        example.seq: json.loads(example.messages)[-1]["content"]
        if example.messages
        else decode(example.prompt)
        for example in context.examples
        if example.split == "train"
    }


def _prompts(examples: Sequence[Example]) -> list[GatePrompt]:
    """Return held-out prompts, each cluster once, those of the gate's own part first."""
    order = ("gate", "calibration", "validation")
    held_out = sorted(
        (example for example in examples if example.split in order),
        key=lambda example: (order.index(example.split), example.seq),
    )
    found: dict[str, GatePrompt] = {}
    for example in held_out:
        turns = json.loads(example.messages) if example.messages else []
        prompt = GatePrompt(
            example.cluster,
            example.prompt,
            tuple((turn["role"], turn["content"]) for turn in turns),
            example.rater,
        )
        found.setdefault(example.cluster, prompt)
    return list(found.values())


def _pairs(context: RunContext) -> list[HoldoutPair]:
    clusters = {example.prompt: example.cluster for example in context.examples}
    stored = json.loads((context.directory / "report" / PAIRS).read_text())
    found = []
    for pair in stored:
        prompt = tuple(pair["prompt"])
        unnamed = hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
        found.append(
            HoldoutPair(
                prompt_id=clusters.get(prompt, unnamed),
                rater_id=pair["rater"],
                chosen_policy=pair["first_policy"],
                chosen_reference=pair["first_reference"],
                rejected_policy=pair["second_policy"],
                rejected_reference=pair["second_reference"],
                source=pair["source"],
            )
        )
    return found


def _counts(evidence: Mapping[str, Any]) -> FeedbackCounts:
    learned = evidence["train"]
    return FeedbackCounts(
        comparisons=int(learned.get("comparisons", 0)),
        thumbs=int(learned.get("thumbs", 0)),
        corrections=int(learned.get("corrections", 0)) + int(learned.get("demonstrations", 0)),
        raters=int(evidence["raters"]),
    )


def _judges(context: RunContext) -> tuple[list[Judge], str]:
    """Return the judges, and why there is none on another backbone where there is none."""
    judges: list[Judge] = []
    directory = context.adapter_dir("reward")
    if directory.is_dir():
        model = load_reward_model(context.backbone, directory)
        judges.append(RunJudge(model, context.encoder.eos_token_id))
    other = fit_sentence_judge(_judge_pairs(context))
    if isinstance(other, JudgeUnavailable):
        structlog.get_logger().info("no_judge_on_another_backbone", reason=other.reason)
        return judges, other.reason
    return [*judges, other], ""


def _judge_pairs(context: RunContext) -> list[JudgePair]:
    """Return the decided pairs of the parts that belong to neither training nor the gate."""
    groups = parts(context.examples)
    turns = {e.prompt: json.loads(e.messages) if e.messages else [] for e in context.examples}
    decode = context.encoder.decode
    found = []
    for group in (*groups["calibration"], *groups["validation"]):
        answers = group.row.answers
        asked = turns.get(group.prompt, [])
        prompt = asked[-1]["content"] if asked else decode(group.prompt)
        for pair in pairs_of(group, DpoSettings(tie_weight=0.0)):
            chosen, rejected = decode(answers[pair.first]), decode(answers[pair.second])
            found.append(JudgePair(prompt, chosen, rejected))
    return found


@contextmanager
def _loaded(context: RunContext) -> Iterator[None]:
    """Keep the candidate in the server's engine, and renew its lease until the body ends."""
    adapter = heedful.RunAdapter(context.run.run_id, ADAPTER)
    ended = threading.Event()
    with context.connect() as client:
        client.load_adapter(adapter, lease_s=_ADAPTER_LEASE_S)

        def renew() -> None:
            while not ended.wait(_ADAPTER_LEASE_S / 3):
                try:
                    client.load_adapter(adapter, lease_s=_ADAPTER_LEASE_S)
                except heedful.HeedfulError as error:
                    structlog.get_logger().warning("candidate_not_renewed", reason=str(error))

        thread = threading.Thread(target=renew, name="candidate-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            _unload(client, adapter)


def _unload(client: heedful.Client, adapter: heedful.RunAdapter) -> None:
    try:
        client.unload_adapter(adapter)
    except heedful.HeedfulError as error:
        # Its lease lapses anyway.
        structlog.get_logger().warning("candidate_not_unloaded", reason=str(error))
