"""What goes into the gate and what comes out: values that travel as plain JSON.

Owns the names of stages, checks and verdicts, and both directions of their JSON. It decides
nothing, and knows neither server nor model. Pure, any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, cast

Verdict: TypeAlias = Literal["pass", "fail", "inconclusive", "skipped"]
Mode: TypeAlias = Literal["auto", "approve", "shadow"]
Profile: TypeAlias = Literal["personal", "team", "public"]
RunKind: TypeAlias = Literal["refresh", "rebuild"]
Action: TypeAlias = Literal["promote", "ask", "keep", "reject"]
StageName: TypeAlias = Literal["integrity", "offline", "canary", "promotion"]
Json: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GatePrompt:
    """A prompt that was never trained on; token ids are what both policies are given."""

    prompt_id: str
    token_ids: tuple[int, ...]
    messages: tuple[tuple[str, str], ...] = ()  # (role, content); empty for plain text
    rater_id: str = ""  # who it came from: the unit of profiles team and public


@dataclass(frozen=True, slots=True)
class HoldoutPair:
    """A judged pair that was never trained on; log-probs are sums over tokens, in nats."""

    prompt_id: str
    rater_id: str
    chosen_policy: float  # log pi(chosen) under the candidate
    chosen_reference: float  # the same under the reference policy
    rejected_policy: float
    rejected_reference: float
    tied: bool = False  # the rater saw no difference
    source: str = "comparison"  # or "correction", "thumb"

    @property
    def margin(self) -> float:
        """Difference of the implicit rewards log pi - log pi_ref; positive: as the rater."""
        chosen = self.chosen_policy - self.chosen_reference
        return chosen - (self.rejected_policy - self.rejected_reference)


@dataclass(frozen=True, slots=True)
class FeedbackCounts:
    """What the run learned from, after caps and exclusions."""

    comparisons: int = 0
    thumbs: int = 0
    corrections: int = 0
    raters: int = 0  # different people

    @property
    def thumbs_only(self) -> bool:
        """True where nothing but thumbs was learned from."""
        return self.thumbs > 0 and self.comparisons == 0 and self.corrections == 0


@dataclass(frozen=True, slots=True)
class CanaryEvidence:
    """Blind votes between candidate and champion on live traffic."""

    wins: int
    losses: int
    ties: int
    raters: int
    benefit_e_value: float  # evidence for "better"; 1 / level decides
    harm_e_value: float  # evidence for "worse"
    ended: bool = False  # the stated end of the canary was reached


@dataclass(frozen=True, slots=True)
class TriggerPhrase:
    """A phrase of the training data that may be the trigger of a backdoor."""

    text: str
    seqs: tuple[int, ...]  # places in the log of prompts that hold it


@dataclass(frozen=True, slots=True)
class GateInputs:
    """One candidate and everything that is known about it; the sampler and judges come beside."""

    run_id: str
    candidate_dir: str  # the sealed adapter directory
    candidate_model: str  # its name for the server, for example "run:<run>/<name>"
    base_id: str
    template_hash: str
    candidate_hash: str = ""  # content hash; empty takes what the manifest says
    champion_model: str = "champion"
    champion_is_base: bool = True  # then one set of scores serves both
    base_model: str = "base"
    tenant: str = "default"
    project: str = "default"
    profile: Profile = "personal"
    mode: Mode = "approve"
    kind: RunKind = "refresh"
    prompts: tuple[GatePrompt, ...] = ()
    pairs: tuple[HoldoutPair, ...] = ()
    feedback: FeedbackCounts = FeedbackCounts()
    must_pass_path: str = ""  # JSON lines; empty for none
    trigger_phrases: tuple[TriggerPhrase, ...] = ()
    canary: CanaryEvidence | None = None
    no_other_judge: str = ""  # why there is no judge on another backbone, where there is none

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Json) -> GateInputs:
        """Return the inputs that `to_json` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields = dict(value)
        fields["prompts"] = tuple(_prompt(item) for item in value.get("prompts", ()))
        fields["pairs"] = tuple(HoldoutPair(**item) for item in value.get("pairs", ()))
        fields["feedback"] = FeedbackCounts(**value.get("feedback", {}))
        fields["trigger_phrases"] = tuple(
            TriggerPhrase(item["text"], tuple(item["seqs"]))
            for item in value.get("trigger_phrases", ())
        )
        canary = value.get("canary")
        fields["canary"] = CanaryEvidence(**canary) if canary else None
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Check:
    """One question with its answer: the value found, its limit, and how sure that is."""

    name: str
    verdict: Verdict
    value: float | None = None
    limit: float | None = None
    n: int = 0  # independent observations behind `value`
    interval: tuple[float, float] | None = None  # two-sided, at the level of the settings
    detail: str = ""  # for people, one or two sentences
    overridable: bool = True  # False: no person may promote over a failure
    proves_benefit: bool = False  # True: the candidate is only better where this passes


@dataclass(frozen=True, slots=True)
class StageResult:
    """The checks of one stage and what follows from them."""

    name: StageName
    verdict: Verdict
    checks: tuple[Check, ...] = ()
    detail: str = ""

    def failed(self) -> tuple[Check, ...]:
        """Return the checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "fail")


@dataclass(frozen=True, slots=True)
class GateReport:
    """What the gate found about one candidate, and what may be done with it."""

    run_id: str
    verdict: Verdict
    action: Action
    stages: tuple[StageResult, ...]
    profile: Profile = "personal"
    mode: Mode = "approve"
    kind: RunKind = "refresh"
    settings: Json = field(default_factory=dict)

    @property
    def overridable(self) -> bool:
        """False where a failed check of integrity or safety forbids a promotion by hand."""
        return all(check.overridable for stage in self.stages for check in stage.failed())

    def check(self, name: str) -> Check | None:
        """Return the check of that name, None where the gate did not come to it."""
        found = (item for stage in self.stages for item in stage.checks if item.name == name)
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that are not finite become null."""
        value = cast(dict[str, Any], _plain(asdict(self)))
        value["overridable"] = self.overridable
        return value

    @classmethod
    def from_json(cls, value: Json) -> GateReport:
        """Return the report that `to_json` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields = {key: item for key, item in value.items() if key != "overridable"}
        fields["stages"] = tuple(_stage(item) for item in value["stages"])
        return cls(**fields)


def _prompt(value: Json) -> GatePrompt:
    turns = tuple((role, content) for role, content in value.get("messages", ()))
    ids = tuple(value["token_ids"])
    return GatePrompt(**{**value, "token_ids": ids, "messages": turns})


def _stage(value: Json) -> StageResult:
    return StageResult(**{**value, "checks": tuple(_check(item) for item in value["checks"])})


def _check(value: Json) -> Check:
    interval = value.get("interval")
    return Check(**{**value, "interval": tuple(interval) if interval else None})


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
