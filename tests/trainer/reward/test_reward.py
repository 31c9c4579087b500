"""The reward model on the tiny base: it learns, says how well, and comes back from its files."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_store import Failpoints, adapter_files
from heedful_trainer.backbone import Backbone
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.examples import Answer, Example
from heedful_trainer.errors import NotEnoughFeedback
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import parts
from heedful_trainer.packing import Row, pack
from heedful_trainer.reward.model import Heads, RewardModel, load_reward_model, pooled
from heedful_trainer.reward.report import report_on_reward
from heedful_trainer.reward.training import RewardObjective, RewardResult, train_reward

EOS = 258


def train(
    backbone: Backbone, examples: list[Example], config: TrainerConfig, directory: Path
) -> RewardResult:
    return train_reward(
        backbone, parts(examples), config, CheckpointStore(directory), NoHooks(), Failpoints()
    )


def test_it_learns_pairs_and_reports_beside_the_length_baseline(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = make_pairs(150)
    result = train(backbone, examples, config, tmp_path)
    gate = parts(examples)["gate"]
    report = report_on_reward(result.model, unbiased=gate, unseen=gate)
    assert report["accuracy"]["n"] == 30
    assert report["accuracy"]["value"] > 0.85 > report["length_only_accuracy"]
    assert report["by_source"]["comparison"] == report["accuracy"]
    assert sum(bucket["n"] for bucket in report["by_length"].values()) == 30
    assert -1 <= report["head_error_correlation"] <= 1
    assert result.calibration_pairs == 15
    assert report["temperature"] != 1.0
    assert set(report["calibration"]) == {
        "n",
        "ece_before",
        "ece_after",
        "debiased_ece_before",
        "debiased_ece_after",
    }


def test_the_pooled_state_is_the_mean_over_an_answers_own_tokens() -> None:
    packed = pack([Row((1, 2), ((3, 4), (5,))), Row((1,), ((6, 7, 8),))])
    # Rows of five positions: the prompt's at 0 and 1, then the answers'; the second row has four.
    hidden = torch.arange(10.0)[:, None] * torch.tensor([1.0, 10.0])
    assert packed.own_N.tolist() == [2, 3, 4, 6, 7, 8]
    assert pooled(hidden, packed).tolist() == [[2.5, 25.0], [4.0, 40.0], [7.0, 70.0]]


def test_a_reward_is_the_mean_of_what_it_would_be_for_each_token(backbone: Backbone) -> None:
    heads = Heads(3, backbone.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.17, generator=torch.Generator().manual_seed(1))
    backbone.adapter.reset(2)
    model = RewardModel(backbone, heads)
    answer = (40, 90, 7, EOS)
    whole, other = model.score([Row((5, 6), (answer, (9, 9)))])
    each = model.score([Row((5, 6, *answer[:i]), ((answer[i],),)) for i in range(len(answer))])
    torch.testing.assert_close(whole, each.mean(0))
    assert not torch.equal(whole, other)


def test_saved_and_loaded_it_gives_the_same_scores(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    model = train(backbone, make_pairs(40), config, tmp_path / "c").model
    rows = [Row((5, 6), ((40, 41, EOS), (90, EOS))), Row((9,), ((1, 2, 3),))]
    before, temperature = model.score(rows), model.heads.temperature
    directory = tmp_path / "reward"
    directory.mkdir()
    model.save(directory, "tiny")
    assert (directory / adapter_files.HEADS).is_file()
    backbone.adapter.reset(123)
    loaded = load_reward_model(backbone, directory)
    assert torch.equal(loaded.score(rows), before)
    assert loaded.heads.temperature == pytest.approx(temperature)


def test_rankings_with_ties_thumbs_and_corrections_in_one_objective(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    rng = random.Random(0)
    examples = make_pairs(40)
    more: list[Example] = []
    for i, example in enumerate(examples[:12]):
        liked = Answer((40, rng.randint(1, 200), 40, EOS))
        answers = (*example.answers, liked)
        more.append(replace(example, seq=100 + i, answers=answers, ranks=(1, 1, 0)))
        more.append(
            replace(example, seq=200 + i, kind="thumb", ranks=(), answers=(liked,), up=True)
        )
        disliked = Answer((90, 90, EOS))
        more.append(
            replace(
                example,
                seq=300 + i,
                kind="correction",
                ranks=(),
                answers=(disliked,),
                corrected=(40, 40, EOS),
                edit_distance=0.5,
            )
        )
    result = train(backbone, [*examples, *more], config, tmp_path)
    assert result.log_nu is not None
    learned = parts([*examples, *more])["train"]
    report = report_on_reward(result.model, unbiased=learned, unseen=[])
    assert report["ties"] == 8  # those of the training part
    assert set(report["by_source"]) == {"comparison", "correction"}
    assert report["accuracy_without_corrections"]["n"] < report["accuracy"]["n"]


def test_demonstrations_have_mean_reward_zero(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = make_pairs(40)
    shown = [
        replace(e, seq=500 + i, kind="demonstration", answers=(), ranks=(), corrected=(40, 7, EOS))
        for i, e in enumerate(examples[:10])
    ]
    model = train(backbone, [*examples, *shown], config, tmp_path).model
    rows = [Row(e.prompt, ((40, 7, EOS),)) for e in shown if e.split == "train"]
    assert model.score(rows).mean(0).abs().max() < 1e-4


def test_k_answers_cost_at_most_k_forwards(
    backbone: Backbone, config: TrainerConfig, tmp_path: Path
) -> None:
    answers = tuple(Answer((i, i, EOS)) for i in range(1, 8))
    ranking = Example(
        seq=1,
        kind="ranking",
        split="train",
        cluster="c",
        prompt=(5,),
        answers=answers,
        ranks=tuple(range(7)),
    )
    result = train(backbone, [ranking], config, tmp_path)
    (group,) = parts([ranking])["train"]
    objective = RewardObjective(result.model, config.reward, [group], [], seed=0)
    # One prompt and seven answers of three tokens, for 21 pairs.
    assert objective.sizes == [1 + 7 * 3]


def test_all_bad_alone_lowers_every_answer(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any
) -> None:
    from heedful_trainer.reward.model import Heads, RewardModel

    bad = [replace(e, ranks=(0, 0), all_bad=True) for e in make_pairs(4, split="train")]
    heads = Heads(2, backbone.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.17, generator=torch.Generator().manual_seed(0))
    backbone.adapter.reset(0)
    model = RewardModel(backbone, heads)
    objective = RewardObjective(model, config.reward, parts(bad)["train"], [], seed=0)
    loss, _ = objective.loss([0, 1, 2, 3])
    loss.backward()  # type: ignore[no-untyped-call]
    assert heads.bias.grad is not None
    assert (heads.bias.grad > 0).all()


def test_too_few_judgements_are_refused(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    with pytest.raises(NotEnoughFeedback, match="a reward model: 3 of 8"):
        train(backbone, make_pairs(3, split="train"), config, tmp_path)


def test_without_calibration_pairs_the_temperature_stays_one(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    quick = with_overrides(config, {"reward.epochs": "1"})
    result = train(backbone, make_pairs(20, split="train"), quick, tmp_path)
    assert result.calibration_pairs == 0
    assert result.model.heads.temperature == 1.0


def test_what_stops_training_does_not_depend_on_how_sure_the_heads_are(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = [
        replace(example, ranks=example.ranks[::-1]) if number % 5 == 0 else example
        for number, example in enumerate(make_pairs(160))
    ]
    model = train(backbone, examples, config, tmp_path).model
    split = parts(examples)
    objective = RewardObjective(model, config.reward, split["train"], split["validation"], 0)
    before = objective.evaluate()
    with torch.no_grad():
        model.heads.weight.mul_(7)
    after = objective.evaluate()
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
    assert after["accuracy"] == before["accuracy"]
    assert after["raw_loss"] > before["raw_loss"] + 0.05
    with torch.no_grad():
        model.heads.weight.mul_(-1)
    assert objective.evaluate()["loss"] > before["loss"] + 0.02


def test_a_start_that_training_makes_worse_is_what_remains(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = make_pairs(120)
    wild = with_overrides(
        config, {"reward.optimiser.learning_rate": 3.0, "reward.optimiser.clip_norm": 100.0}
    )
    result = train(backbone, examples, wild, tmp_path)
    first, *others = result.loop.history
    assert first["step"] == 0
    assert all(look["loss"] > first["loss"] for look in others)
    split = parts(examples)
    objective = RewardObjective(result.model, wild.reward, split["train"], split["validation"], 0)
    assert objective.evaluate()["loss"] == pytest.approx(first["loss"], abs=1e-5)
