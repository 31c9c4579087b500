"""A tiny backbone, synthetic judgements with a stated taste, and a real store filled with them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_store import Completion, CompletionPayload, Scope, Store, uuid7
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.examples import Answer, Example

EOS = 258  # <|im_end|> of the tiny tokenizer
BASE_ID, TEMPLATE = "tiny@1", "t" * 8
LIKED, DISLIKED = 40, 90  # a token that raters like, and one that they do not


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tiny model's sums are too small to share, and waiting for a busy core costs more.
    torch.set_num_threads(1)


@pytest.fixture
def backbone(tiny_model_dir: Path) -> Backbone:
    return load_backbone(tiny_model_dir, BackboneOptions("float32", 8, 16.0, 0.5, 1 << 28))


@pytest.fixture
def config() -> TrainerConfig:
    return quick_config()


def quick_config(**overrides: object) -> TrainerConfig:
    """Settings that let a tiny model learn in a second."""
    quick: dict[str, object] = {
        "base.dtype": "float32",
        "lora.rank": 8,
        "reward.heads": 3,
        "reward.epochs": 3,
        "reward.optimiser.learning_rate": 5e-3,
        "reward.optimiser.batch_size": 8,
        "reward.optimiser.min_steps": 0,
        "dpo.epochs": 2,
        "dpo.optimiser.learning_rate": 5e-3,
        "dpo.optimiser.batch_size": 8,
        "dpo.optimiser.min_steps": 0,
        "kto.epochs": 2,
        "kto.optimiser.learning_rate": 5e-3,
        "kto.optimiser.batch_size": 8,
        "kto.optimiser.min_steps": 0,
        "sft.epochs": 3,
        "sft.optimiser.learning_rate": 5e-3,
        "run.threads": 1,
        "yielding.scheduling": "none",
    }
    return with_overrides(TrainerConfig(), {**quick, **overrides})


def answer_ids(rng: random.Random, liked: bool, ended: bool = True) -> tuple[int, ...]:
    word = LIKED if liked else DISLIKED
    ids = [rng.choice((word, rng.randint(1, 200))) for _ in range(rng.randint(3, 7))] + [word]
    return (*ids, EOS) if ended else tuple(ids)


def prompt_ids(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(1, 200) for _ in range(rng.randint(2, 6)))


def pair_examples(
    count: int, *, seed: int = 0, split: Any = None, flip: float = 0.0
) -> list[Example]:
    """Blind pairs of a rater who likes one token; splits go round unless one is given."""
    rng = random.Random(seed)
    order = ["train"] * 6 + ["validation", "calibration", "gate", "gate"]
    examples = []
    for i in range(count):
        good = rng.random() < 0.5
        answers = (answer_ids(rng, good), answer_ids(rng, not good))
        won = good != (rng.random() < flip)
        examples.append(
            Example(
                seq=i + 1,
                kind="ranking",
                split=split or order[i % len(order)],
                cluster=f"c{i}",
                prompt=prompt_ids(rng),
                answers=tuple(Answer(ids) for ids in answers),
                ranks=(0, 1) if won else (1, 0),
                source="comparison",
                rater="ann",
            )
        )
    return examples


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(f"sqlite:///{tmp_path / 'heedful.db'}") as opened:
        yield opened


AddAnswer = Callable[..., Completion]


@pytest.fixture
def add_answer(store: Store) -> AddAnswer:
    """Log one answer; text and ids may be given."""

    def add(
        prompt: str = "hello",
        ids: tuple[int, ...] = (40, EOS),
        text: str = "I",
        **more: Any,
    ) -> Completion:
        messages = json.dumps([{"role": "user", "content": prompt}])
        payload = CompletionPayload(
            prompt_ids=tuple(prompt.encode()),
            completion_ids=ids,
            prompt_text=prompt,
            completion_text=text,
            messages=messages,
        )
        completion = Completion(
            **{
                "completion_id": uuid7(),
                "scope": Scope(),
                "policy_version": "base",
                "created_at_ms": 1,
                "base_id": BASE_ID,
                "template_hash": TEMPLATE,
                "payload": payload,
                **more,
            }
        )
        store.append_completion(completion).result()
        return completion

    return add


@pytest.fixture
def make_pairs() -> Callable[..., list[Example]]:
    return pair_examples


@pytest.fixture
def log_pairs() -> Callable[..., None]:
    """Fill a store with blind comparisons of a rater who likes one token."""
    from heedful_store import FeedbackEvent, Ranking

    def fill(store: Store, count: int, *, ties: bool = False, prefix: str = "") -> None:
        for example in pair_examples(count, seed=len(prefix)):
            names = []
            for answer in example.answers:
                text = f"{prefix}{chr(97 + example.seq % 26) * (example.seq // 26 + 1)}"
                payload = CompletionPayload(
                    prompt_ids=example.prompt, completion_ids=answer.ids, prompt_text=text
                )
                names.append(uuid7())
                store.append_completion(
                    Completion(
                        completion_id=names[-1],
                        scope=Scope(),
                        policy_version="base",
                        created_at_ms=1,
                        base_id=BASE_ID,
                        template_hash=TEMPLATE,
                        payload=payload,
                    )
                ).result()
            best, worst = names if example.ranks == (0, 1) else names[::-1]
            groups = ((best, worst),) if ties else ((best,), (worst,))
            event = FeedbackEvent(
                feedback_id=uuid7(), scope=Scope(), judgement=Ranking(groups), rater_id="ann"
            )
            store.append_feedback(event).result()

    return fill
