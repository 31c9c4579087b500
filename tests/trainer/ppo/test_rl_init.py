"""The start of PPO as the paper has it: demonstrations with a tenth of text, then the reference."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from heedful_store import Failpoints
from heedful_trainer.backbone import Backbone
from heedful_trainer.checkpoint import CheckpointStore
from heedful_trainer.config import OptimiserSettings
from heedful_trainer.dataset.builders import Correction, Group
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.loop import LoopResult, LoopSettings, train
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.packing import Row
from heedful_trainer.ppo.experience import judge
from heedful_trainer.ppo.networks import Networks
from heedful_trainer.ppo.rl_init import RlInitObjective, mixed_rows
from heedful_trainer.reward.model import Heads, RewardModel
from heedful_trainer.rollouts.records import Rollout

EOS, LIKED = 258, 40
TEXTS = [(7, 8, 9, 10), (11, 12, 13)]


def shown(count: int) -> list[Group]:
    """Prompts that people answered with one token again and again."""
    found = []
    for i in range(count):
        group = Group((i + 1, i + 2))
        group.demonstrations.append(group.index((LIKED, LIKED, EOS)))
        found.append(group)
    return found


@pytest.mark.parametrize(
    ("written", "share", "texts"), [(9, 0.1, 1), (18, 0.1, 2), (4, 0.5, 4), (9, 0.0, 0)]
)
def test_so_large_a_share_of_the_rows_is_text(written: int, share: float, texts: int) -> None:
    rows = mixed_rows(shown(written), TEXTS, share)
    assert len(rows) == written + texts
    assert len(rows) * share == pytest.approx(texts)
    assert rows[0] == Row((1, 2), ((LIKED, LIKED, EOS),))
    # A text's first token is only read; few texts are read again.
    assert rows[written:] == [
        Row(TEXTS[i % 2][:1], (TEXTS[i % 2][1:],)) for i in range(len(rows) - written)
    ]


def test_corrections_are_written_too_and_nothing_counts_twice() -> None:
    group = Group((1,))
    served, fixed = group.index((90, EOS)), group.index((LIKED, EOS))
    group.corrections.append(Correction(fixed, served, 0.5))
    group.demonstrations.append(fixed)
    judged_only = Group((2,), {(5, EOS): 0})
    assert mixed_rows([group, judged_only], TEXTS, 0.1) == [Row((1,), ((LIKED, EOS),))]
    assert mixed_rows([judged_only], TEXTS, 0.1) == []
    assert mixed_rows([group], [], 0.5) == [Row((1,), ((LIKED, EOS),))]


def start(backbone: Backbone, rows: list[Row], directory: Path, epochs: float) -> LoopResult:
    backbone.adapter.reset(0)
    optimiser = OptimiserSettings(
        learning_rate=2e-2, batch_size=4, warmup_share=0.0, final_share=0.1, min_steps=0
    )
    return train(
        RlInitObjective(PolicyScorer(backbone, EOS), backbone.adapter.parameters(), rows),
        LoopSettings(epochs, 0, optimiser, checkpoint_s=1e9),
        CheckpointStore(directory),
        NoHooks(),
        Failpoints(),
    )


def test_the_loss_is_the_mean_over_each_rows_tokens(backbone: Backbone) -> None:
    backbone.adapter.reset(0)
    rows = mixed_rows(shown(3), TEXTS, 0.25)
    scorer = PolicyScorer(backbone, EOS)
    objective = RlInitObjective(scorer, backbone.adapter.parameters(), rows)
    assert objective.sizes == [5, 5, 5, 4]
    loss, _ = objective.loss([0, 3])
    with torch.no_grad():
        first, text = scorer.policy([rows[0]]), scorer.policy([rows[3]])
    assert loss.item() == pytest.approx(-(float(first.total_A) + float(text.total_A)) / 3, rel=1e-5)


def test_two_epochs_read_every_row_twice_and_keep_the_last_state(
    backbone: Backbone, tmp_path: Path
) -> None:
    rows = mixed_rows(shown(9), TEXTS, 0.1)
    seen: Counter[int] = Counter()

    class Noted(RlInitObjective):
        def loss(self, examples):  # type: ignore[no-untyped-def]
            seen.update(examples)
            return super().loss(examples)

    backbone.adapter.reset(0)
    scorer = PolicyScorer(backbone, EOS)
    objective = Noted(scorer, backbone.adapter.parameters(), rows)
    optimiser = OptimiserSettings(learning_rate=2e-2, batch_size=4, min_steps=0)
    settings = LoopSettings(2.0, 0, optimiser, checkpoint_s=1e9)
    before = scorer.policy(rows).total_A.detach()
    result = train(objective, settings, CheckpointStore(tmp_path), NoHooks(), Failpoints())
    assert (result.steps, result.ended) == (6, "epochs")
    assert seen == Counter(dict.fromkeys(range(10), 2))
    assert objective.evaluate() == {}
    with torch.no_grad():
        after = scorer.policy(rows).total_A
    assert float((after - before)[:9].mean()) > 1.0


def test_the_start_is_where_the_policy_begins_and_what_its_kl_is_measured_from(
    backbone: Backbone, tmp_path: Path
) -> None:
    start(backbone, mixed_rows(shown(9), TEXTS, 0.1), tmp_path, 2.0)
    tensors = {n: p.detach().clone() for n, p in backbone.adapter.parameters().items()}
    backbone.adapter.reset(5)
    heads = Heads(2, backbone.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.17, generator=torch.Generator().manual_seed(6))
    networks = Networks(RewardModel(backbone, heads), seed=3, start=tensors)
    rollout = Rollout((1, 2), (LIKED, EOS), (-1.0, -1.0), True)
    item = (Row((1, 2), ((LIKED, EOS),)), (rollout,))
    judged = judge(networks, [item])
    assert torch.equal(judged.old_N, judged.reference_N)
    backbone.adapter.enable(False)
    with torch.no_grad():
        base = Networks(RewardModel(backbone, heads), seed=3).reference_logprobs(judged.batch)
    assert float((judged.reference_N - base).sum()) > 1.0
