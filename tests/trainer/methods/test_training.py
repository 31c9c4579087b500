"""Methods on the tiny model: they learn a stated taste, refuse too little, and resume exactly."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_store import FailpointError, Failpoints
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.checkpoint import CheckpointStore, hash_of
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import with_overrides
from heedful_trainer.dataset.builders import Pair, group_by_prompt
from heedful_trainer.dataset.examples import Answer, Example
from heedful_trainer.errors import CheckpointDamaged, NotEnoughFeedback, RunStopped, TrainingFailed
from heedful_trainer.methods.dpo import DpoObjective, pair_scores
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import (
    choose_method,
    judge_pairs,
    report_on_policy,
    train_policy,
)
from heedful_trainer.methods.scores import PolicyScorer, Scores
from heedful_trainer.packing import Row

EOS = 258
LIKED, DISLIKED = 40, 90


def thumbs(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        up = i % 2 == 0
        word = LIKED if up else DISLIKED
        ids = (*(rng.choice((word, rng.randint(1, 200))) for _ in range(5)), word, EOS)
        found.append(
            Example(
                seq=i + 1,
                kind="thumb",
                split="gate" if i % 5 == 0 else "train",
                cluster=str(i),
                prompt=tuple(rng.randint(1, 200) for _ in range(4)),
                answers=(Answer(ids),),
                up=up,
            )
        )
    return found


def corrections(count: int) -> list[Example]:
    found = []
    for example in thumbs(count):
        answers, corrected = example.answers, (LIKED, LIKED, LIKED, EOS)
        found.append(
            replace(example, kind="correction", up=None, answers=answers, corrected=corrected)
        )
    return found


def run(
    backbone: Backbone,
    examples: list[Example],
    config: TrainerConfig,
    directory: Path,
    failpoints: str = "",
    hooks: Any = None,
) -> PolicyScorer:
    scorer = PolicyScorer(backbone, EOS)
    method = choose_method(group_by_prompt(examples, "train"), config)
    train_policy(
        backbone,
        scorer,
        examples,
        method,
        config,
        CheckpointStore(directory),
        hooks or NoHooks(),
        Failpoints(failpoints),
    )
    return scorer


def liking(scorer: PolicyScorer) -> float:
    """Mean gain of a liked answer's log-prob over a disliked one's, on prompts never seen."""
    rng = random.Random(99)
    rows = [
        Row((rng.randint(1, 200), 7), ((LIKED, LIKED, EOS), (DISLIKED, DISLIKED, EOS)))
        for _ in range(16)
    ]
    with torch.no_grad():
        gain = scorer.policy(rows).total_A - scorer.reference(rows).total_A
    return float((gain[::2] - gain[1::2]).mean())


def test_ties_alone_take_no_more_rows_than_decided_pairs(
    backbone: Backbone, make_pairs: Any, config: TrainerConfig
) -> None:
    """Ten decided pairs among 30 ties: all ten stay, with ten ties spread over the log."""
    examples = [
        example if i % 4 == 0 else replace(example, ranks=(0, 0))
        for i, example in enumerate(make_pairs(40, split="train"))
    ]
    groups = group_by_prompt(examples, "train")
    objective = DpoObjective(PolicyScorer(backbone, EOS), {}, config.dpo, groups, groups)
    tied = [len(set(group.orders[0].ranks)) == 1 for group in groups]
    kept = [group.row for group, is_tied in zip(groups, tied, strict=True) if not is_tied]
    rows = objective.rows[: len(objective.sizes)]
    assert len(rows) == 20
    assert [row for row in rows if row in kept] == kept
    few = DpoObjective(PolicyScorer(backbone, EOS), {}, config.dpo, groups[:2], [])
    assert len(few.sizes) == 2


def test_dpo_learns_the_taste_and_reports_it(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = make_pairs(80)
    scorer = run(backbone, examples, config, tmp_path)
    assert liking(scorer) > 1
    gate = group_by_prompt(examples, "gate")
    pairs = judge_pairs(scorer, gate, config)
    report = report_on_policy(scorer, gate, pairs)
    assert report["pairs"] == 16
    assert report["accuracy"] > 0.8
    assert report["kl_nats"] > 0
    assert report["accuracy_interval"][0] < report["accuracy"] < 1.01


def test_kto_learns_from_thumbs_alone(
    backbone: Backbone, config: TrainerConfig, tmp_path: Path
) -> None:
    assert choose_method(group_by_prompt(thumbs(60), "train"), config) == "kto"
    assert liking(run(backbone, thumbs(60), config, tmp_path)) > 0.5


def test_sft_learns_what_people_wrote(
    backbone: Backbone, config: TrainerConfig, tmp_path: Path
) -> None:
    assert liking(run(backbone, corrections(24), config, tmp_path)) > 1


def test_kto_by_name_reads_rankings_as_thumbs(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    named = with_overrides(config, {"method": "kto"})
    assert liking(run(backbone, make_pairs(60), named, tmp_path)) > 0.5


def test_too_little_says_what_is_missing(config: TrainerConfig, make_pairs: Any) -> None:
    with pytest.raises(NotEnoughFeedback, match="3 of 8 decided pairs, 0 of 16 thumbs"):
        choose_method(group_by_prompt(make_pairs(3, split="train"), "train"), config)
    tied = [replace(e, ranks=(0, 0)) for e in make_pairs(40, split="train")]
    with pytest.raises(NotEnoughFeedback, match="ties alone say nothing") as caught:
        choose_method(group_by_prompt(tied, "train"), config)
    assert caught.value.missing["decided pairs"] == (0, 8)
    with pytest.raises(NotEnoughFeedback, match="any method"):
        choose_method([], config)


def test_thumbs_of_one_class_train_nothing(config: TrainerConfig) -> None:
    ups = [replace(e, up=True) for e in thumbs(60)]
    with pytest.raises(NotEnoughFeedback):
        choose_method(group_by_prompt(ups, "train"), config)
    named = with_overrides(config, {"method": "kto"})
    with pytest.raises(NotEnoughFeedback, match="0 of 4 disliked ones"):
        choose_method(group_by_prompt(ups, "train"), named)


def test_liking_cut_answers_teaches_nothing_against_ending() -> None:
    total, end = torch.tensor([-3.0, -8.0]), torch.tensor([0.0, -2.0])
    ended, length = torch.tensor([False, True]), torch.tensor([3, 4])
    scores = Scores(total, end, ended, length)
    (cut_wins,) = pair_scores(
        scores, scores, [Pair(0, 1, 1.0, 1.0)], length_normalised=False
    ).second_P.tolist()
    (ended_wins,) = pair_scores(
        scores, scores, [Pair(1, 0, 1.0, 1.0)], length_normalised=False
    ).first_P.tolist()
    assert cut_wins == -6.0  # without the end token's -2
    assert ended_wins == -8.0
    half = pair_scores(
        scores, scores, [Pair(1, 0, 1.0, 1.0)], length_normalised=False, end_share=0.5
    )
    assert (half.first_P.tolist(), half.second_P.tolist()) == ([-7.0], [-3.0])


@pytest.mark.parametrize(
    ("for_ending", "against", "share"), [(4, 0, 1.0), (4, 1, 0.75), (3, 3, 0.0), (1, 5, 0.0)]
)
def test_a_preferred_end_counts_by_its_surplus(
    for_ending: int,
    against: int,
    share: float,
    backbone: Backbone,
    make_pairs: Any,
    config: TrainerConfig,
) -> None:
    """With n preferred ends against cut answers and m the other way round: (n - m) / n."""
    examples = []
    for i, example in enumerate(make_pairs(for_ending + against, split="train")):
        first, second = (a.ids[:-1] for a in example.answers)
        answers = (Answer((*first, EOS)), Answer(second))
        ranks = (0, 1) if i < for_ending else (1, 0)
        examples.append(replace(example, answers=answers, ranks=ranks))
    groups = group_by_prompt(examples, "train")
    objective = DpoObjective(PolicyScorer(backbone, EOS), {}, config.dpo, groups, [])
    assert objective.end_share == share


def never_ending(count: int, make_pairs: Any) -> list[Example]:
    """Raters prefer whatever was cut."""
    found = []
    for example in make_pairs(count, split="train"):
        first, second = (a.ids[:-1] for a in example.answers)
        answers = (Answer(first), Answer((*second, EOS)))
        found.append(replace(example, answers=answers, ranks=(0, 1)))
    return found


def test_a_taste_for_cut_answers_does_not_unlearn_the_end(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = never_ending(60, make_pairs)
    scorer = run(backbone, examples, config, tmp_path)
    rows = [Row(e.prompt, (e.answers[1].ids,)) for e in examples[:20]]
    with torch.no_grad():
        change = scorer.policy(rows).end_A - scorer.reference(rows).end_A
    assert change.mean() > -0.7


def state(backbone: Backbone) -> str:
    return hash_of({n: p.detach() for n, p in backbone.adapter.parameters().items()})


@pytest.mark.parametrize("step", [1, 4, 11])
def test_a_cut_training_goes_on_to_the_same_bits(
    step: int, tiny_model_dir: Path, make_pairs: Any, config: TrainerConfig, tmp_path: Path
) -> None:
    def fresh() -> Backbone:
        return load_backbone(tiny_model_dir, BackboneOptions("float32", 8, 16.0, 0.5, 1 << 28))

    examples = make_pairs(80)
    often = with_overrides(config, {"run.checkpoint_s": "1e-9"})
    whole, cut, resumed = fresh(), fresh(), fresh()
    run(whole, examples, config, tmp_path / "whole")
    with pytest.raises(FailpointError):
        run(cut, examples, often, tmp_path / "cut", f"trainer_step={step}:raise")
    run(resumed, examples, often, tmp_path / "cut")
    assert state(resumed) == state(whole)


def test_stopping_saves_and_going_on_ends_alike(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    class StopAtThird(NoHooks):
        calls = 0

        def wanted(self) -> Any:
            self.calls += 1
            return "stop" if self.calls == 3 else "go"

    examples = make_pairs(80)
    run(backbone, examples, config, tmp_path / "whole")
    whole = state(backbone)
    with pytest.raises(RunStopped, match="step 3 of"):
        run(backbone, examples, config, tmp_path / "cut", hooks=StopAtThird())
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-00000003"]
    run(backbone, examples, config, tmp_path / "cut")
    assert state(backbone) == whole


def test_lost_optimiser_state_is_noticed(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    often = with_overrides(config, {"run.checkpoint_s": "1e-9"})
    with pytest.raises(FailpointError):
        run(backbone, make_pairs(80), often, tmp_path, "trainer_step=4:raise")
    store = CheckpointStore(tmp_path)
    saved = store.load_newest()
    assert saved is not None
    without = {n: t for n, t in saved.tensors.items() if not n.startswith("moment.exp_avg")}
    store.save(replace(saved, tensors=without))
    with pytest.raises(CheckpointDamaged, match="optimiser's state"):
        run(backbone, make_pairs(80), config, tmp_path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from heedful_trainer.checkpoint import Checkpoint

    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(3, {"x": torch.ones(2)}, {}))
    path = tmp_path / "step-00000003" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.load_newest() is None


def test_losses_that_stay_non_finite_fail_the_run(
    backbone: Backbone, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        backbone.head_VH[LIKED] = math.nan
    with pytest.raises(TrainingFailed, match="not finite in 3 steps in a row"):
        run(backbone, make_pairs(80), config, tmp_path)


def test_micro_batches_change_rounding_at_most(
    tiny_model_dir: Path, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    found = []
    for name, tokens in (("large", 4096), ("small", 30)):
        model = load_backbone(tiny_model_dir, BackboneOptions("float64", 8, 16.0, 0.5, 1 << 28))
        cut = with_overrides(config, {"dpo.optimiser.micro_batch_tokens": tokens})
        run(model, make_pairs(30), cut, tmp_path / name)
        found.append(model.adapter.parameters())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("least", "steps"), [(0, 2), (5, 5), (1000, 8)])
def test_a_small_log_is_passed_over_until_there_are_enough_steps(
    least: int,
    steps: int,
    backbone: Backbone,
    config: TrainerConfig,
    make_pairs: Any,
    tmp_path: Path,
) -> None:
    small = with_overrides(config, {"dpo.epochs": "1", "dpo.optimiser.min_steps": least})
    scorer = PolicyScorer(backbone, EOS)
    examples = make_pairs(12, split="train")
    result = train_policy(
        backbone,
        scorer,
        examples,
        "dpo",
        small,
        CheckpointStore(tmp_path),
        NoHooks(),
        Failpoints(),
    )
    assert result.steps == steps
