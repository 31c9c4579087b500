"""Residual dropout: none while gradients are off, the mean kept, the same draws after a kill."""

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
from heedful_trainer.methods.dropout import residual_dropout
from heedful_trainer.methods.hooks import NoHooks
from heedful_trainer.methods.policy import train_policy
from heedful_trainer.methods.scores import PolicyScorer
from heedful_trainer.packing import Row
from torch import Tensor

EOS = 258
ROWS = [Row((5, 6, 7), ((8, 9, 10, EOS), (11, 12, EOS))), Row((20, 21), ((22, EOS),))]


def hidden(backbone: Backbone) -> Tensor:
    return backbone.hidden(backbone.batch(ROWS)).detach()


def test_validation_sees_the_whole_model_and_so_does_what_follows(backbone: Backbone) -> None:
    backbone.adapter.reset(1)
    whole = hidden(backbone)
    with residual_dropout(backbone, 0.5, seed=3):
        with torch.no_grad():
            assert torch.equal(hidden(backbone), whole)
        assert not torch.allclose(hidden(backbone), whole, atol=1e-2)
    assert torch.equal(hidden(backbone), whole)


def test_no_share_changes_neither_model_nor_generator(backbone: Backbone) -> None:
    state, whole = torch.get_rng_state(), hidden(backbone)
    with residual_dropout(backbone, 0.0, seed=3):
        assert torch.equal(hidden(backbone), whole)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("branch", ["self_attn", "mlp"])
def test_what_a_branch_adds_is_dropped_or_scaled_so_that_its_mean_stays(
    branch: str, backbone: Backbone
) -> None:
    share, draws = 0.25, 200
    plain: list[Tensor] = []
    dropped: list[Tensor] = []

    def note(into: list[Tensor]) -> Any:
        def look(_: Any, __: Any, output: Any) -> None:
            into.append((output if isinstance(output, Tensor) else output[0]).detach())

        return look

    (block,) = backbone.trained_blocks
    module = block.get_submodule(branch)
    # Hooks run in the order in which they were put on: one sees what comes before, one after.
    module.register_forward_hook(note(plain))
    with residual_dropout(backbone, share, seed=3):
        module.register_forward_hook(note(dropped))
        for _ in range(draws):
            hidden(backbone)
    before, after = torch.stack(plain), torch.stack(dropped)
    there = before != 0  # padding adds nothing
    kept = there & (after != 0)
    torch.testing.assert_close(after[kept], before[kept] / (1 - share))
    # (1 - share) · x / (1 - share) = x, so that the share of zeros decides the mean.
    zeros = 1 - float(kept.sum()) / float(there.sum())
    assert zeros == pytest.approx(share, abs=4 * (share * (1 - share) / int(there.sum())) ** 0.5)


def sft(
    model_dir: Path, directory: Path, config: TrainerConfig, examples: Any, traps: str = ""
) -> str:
    model = load_backbone(model_dir, BackboneOptions("float32", 8, 16.0, 0.5, 1 << 28))
    scorer, store = PolicyScorer(model, EOS), CheckpointStore(directory)
    torch.manual_seed(99)  # whatever was drawn before does not matter
    train_policy(model, scorer, examples, "sft", config, store, NoHooks(), Failpoints(traps))
    return hash_of({n: p.detach() for n, p in model.adapter.parameters().items()})


def test_a_killed_training_draws_the_same_when_it_goes_on(
    tiny_model_dir: Path, config: TrainerConfig, make_pairs: Any, tmp_path: Path
) -> None:
    examples = [
        replace(e, kind="demonstration", answers=(), ranks=(), corrected=e.answers[0].ids)
        for e in make_pairs(24, split="train")
    ]
    dropping = {"sft.residual_dropout": "0.2", "run.checkpoint_s": "1e-9", "sft.epochs": "2"}
    often = with_overrides(config, dropping)
    whole = sft(tiny_model_dir, tmp_path / "whole", often, examples)
    without = with_overrides(often, {"sft.residual_dropout": "0"})
    assert sft(tiny_model_dir, tmp_path / "without", without, examples) != whole
    other = with_overrides(often, {"run.seed": "1"})
    assert sft(tiny_model_dir, tmp_path / "other", other, examples) != whole
    for step in (1, 5):
        cut = tmp_path / f"cut{step}"
        with pytest.raises(FailpointError):
            sft(tiny_model_dir, cut, often, examples, f"trainer_step={step}:raise")
        assert sft(tiny_model_dir, cut, often, examples) == whole
