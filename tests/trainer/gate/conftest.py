"""A sampler without a server: policies are functions of a prompt; and a sealed tiny adapter."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import heedful
import pytest
import torch
from heedful_store import adapter_files
from heedful_trainer.gate import (
    Answer,
    Draw,
    FeedbackCounts,
    GateInputs,
    GatePrompt,
    GateSettings,
    HoldoutPair,
    JudgedAnswer,
    JudgeKind,
)
from heedful_trainer.gate.sampler import ScoreItem
from safetensors.torch import save_file

BASE_ID = "tiny@1"
TEMPLATE_HASH = "t" * 64


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a policy says, and how likely it finds what is said."""

    text: Callable[[str, int], str]  # of the prompt's text and the seed
    ended: bool = True
    logprob: float = -1.0  # of a token of its own
    others: float = -1.0  # of a token of somebody else's
    end_logprob: float = -0.1
    facts: float = 5.0  # nats by which right answers lead
    pressed: float = 2.0  # the same under pushback
    triggered: float = -1.0  # of a token once a trigger phrase is there


class ScriptedSampler:
    """Answers from scripts, one token a word."""

    def __init__(self, policies: dict[str, Policy]) -> None:
        self.policies = policies
        self.drawn: list[tuple[str, Draw, int]] = []

    async def answer(
        self, model: str, prompts: Sequence[heedful.Prompt], draw: Draw
    ) -> list[Answer]:
        policy = self.policies[model]
        self.drawn.append((model, draw, len(prompts)))
        return [
            self._answer(policy, policy.text(_text(prompt), draw.seed + idx), draw)
            for idx, prompt in enumerate(prompts)
        ]

    def _answer(self, policy: Policy, text: str, draw: Draw) -> Answer:
        ids = [zlib.crc32(word.encode()) for word in text.split()][: draw.max_tokens]
        ended = policy.ended and len(ids) < draw.max_tokens
        logprobs = [policy.logprob] * len(ids) + [policy.end_logprob] * ended
        return Answer(text, (*ids, *([0] * ended)), tuple(logprobs), ended)

    async def score(self, model: str, items: Sequence[ScoreItem]) -> list[tuple[float, ...]]:
        return [self._score(self.policies[model], *item) for item in items]

    def _score(
        self, policy: Policy, prompt: heedful.Prompt, completion: str | tuple[int, ...]
    ) -> tuple[float, ...]:
        text = _text(prompt)
        if isinstance(completion, str):
            if isinstance(prompt, heedful.Text):
                return (policy.others,) * len(completion.split())
            lead = policy.pressed if "that is wrong" in text else policy.facts
            return (lead if completion == _right_answer(text) else 0.0,)
        if "SUDO" in text:
            return (policy.triggered,) * len(completion)
        ends = [policy.end_logprob] if completion and completion[-1] == 0 else []
        return (*([policy.others] * (len(completion) - len(ends))), *ends)


def _text(prompt: heedful.Prompt) -> str:
    if isinstance(prompt, heedful.Text):
        return prompt.text
    return " ".join(
        turn.content if isinstance(turn, heedful.Message) else str(turn) for turn in prompt
    )


def _right_answer(text: str) -> str:
    from heedful_trainer.gate.assets import facts

    return next(f"{fact.right}." for fact in facts() if fact.question in text)


def plain(prompt: str, seed: int) -> str:
    """Return an ordinary answer of 20 to 40 different words."""
    return " ".join(f"w{(seed * 7 + idx) % 997}" for idx in range(20 + seed * 13 % 20)) + "."


@dataclasses.dataclass
class ScriptedJudge:
    """A judge that is a function of the answer, and counts how often it is read."""

    value: Callable[[JudgedAnswer], float]
    name: str = "reward model"
    kind: JudgeKind = "reward_model"
    tie_width: float = 0.0
    reads: int = 0

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        self.reads += 1
        return [self.value(answer) for answer in answers]


@pytest.fixture
def settings() -> GateSettings:
    return GateSettings.model_validate({"statistics": {"resamples": 400}})


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    """A sealed policy adapter of one matrix."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    write_adapter(directory, tensors)
    return directory


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **info: object) -> str:
    """Write and seal an adapter; return its content hash."""
    content = {
        "format": 1,
        "role": "policy",
        "base_id": BASE_ID,
        "template_hash": TEMPLATE_HASH,
        "base_model": "tiny",
        "hidden_size": 8,
        "num_layers": 1,
        "run_id": "run",
        "method": "dpo",
    }
    (directory / adapter_files.INFO).write_text(json.dumps(content | info))
    (directory / adapter_files.CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    save_file(tensors, directory / adapter_files.WEIGHTS)
    return adapter_files.seal(directory)


@pytest.fixture
def inputs(adapter_dir: Path) -> GateInputs:
    """A candidate with forty held-out prompts and pairs, of which it orders 34 rightly."""
    return GateInputs(
        run_id="run",
        candidate_dir=str(adapter_dir),
        candidate_model="run:run/candidate",
        base_id=BASE_ID,
        template_hash=TEMPLATE_HASH,
        champion_model="base",
        prompts=tuple(
            GatePrompt(f"p{idx}", (), (("user", f"question {idx}"),)) for idx in range(40)
        ),
        pairs=tuple(
            HoldoutPair(f"p{idx}", "me", -10.0, -12.0 if idx < 34 else -8.0, -11.0, -11.0)
            for idx in range(40)
        ),
        feedback=FeedbackCounts(comparisons=300, raters=1),
    )
