"""The policy losses: values worked by hand, gradients, and equality with TRL on one batch."""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from heedful_trainer import losses
from torch import Tensor

BETA = 0.25


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_log_probs_of_masked_tokens_are_left_out_and_have_no_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -torch.inf, -9.0]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    sums = losses.sequence_logprobs(logprobs, mask)
    assert sums.tolist() == [-5.0, -0.5]
    (grad,) = torch.autograd.grad(sums.sum(), logprobs)
    assert grad.tolist() == [[0, 1, 1], [1, 0, 0]]


def test_the_form_in_one_row_gives_the_same_sums() -> None:
    flat = torch.tensor([-1.0, -2.0, -4.0, -0.5])
    sums = losses.segment_logprobs(flat, torch.tensor([2, 0, 2, 0]), 3)
    assert sums.tolist() == [-2.5, 0.0, -5.0]


def test_sft_is_the_mean_over_all_tokens_of_the_batch() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-6.0, -100.0]])
    assert losses.sft_loss(logprobs, torch.tensor([[1, 1], [1, 0]])).item() == 3.0
    assert losses.sft_loss(logprobs, torch.zeros(2, 2)).item() == 0.0


def test_the_margin_is_negated_by_a_swap() -> None:
    win, lose, rw, rl = (torch.tensor([value]) for value in (-3.0, -7.0, -4.0, -5.0))
    assert losses.dpo_margin(win, lose, rw, rl).item() == 3.0
    assert losses.dpo_margin(lose, win, rl, rw).item() == -3.0


def test_dpo_by_hand() -> None:
    margin = torch.tensor([4.0])
    assert losses.dpo_loss(margin, beta=0.5).item() == pytest.approx(-math.log(sigmoid(2.0)))
    smoothed = -0.9 * math.log(sigmoid(2.0)) - 0.1 * math.log(sigmoid(-2.0))
    assert losses.dpo_loss(margin, beta=0.5, label_smoothing=0.1).item() == pytest.approx(smoothed)


def test_a_tie_is_least_at_no_margin() -> None:
    margin = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    loss = losses.dpo_loss(margin, beta=1.0, target_B=torch.full((3,), 0.5))
    (grad,) = torch.autograd.grad(loss.sum(), margin)
    assert loss.tolist() == pytest.approx([loss[2].item(), math.log(2), loss[0].item()])
    assert grad.tolist() == pytest.approx([0.5 - sigmoid(1.0), 0.0, sigmoid(1.0) - 0.5])


def test_a_smoothing_that_would_reverse_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.dpo_loss(torch.zeros(1), beta=1.0, label_smoothing=0.5)


def test_kto_by_hand() -> None:
    policy, reference = torch.tensor([-2.0, -2.0]), torch.tensor([-4.0, -4.0])
    up = torch.tensor([True, False])
    loss = losses.kto_loss(
        policy,
        reference,
        up,
        torch.tensor(0.5),
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert loss.tolist() == pytest.approx([2 * (1 - sigmoid(1.5)), 3 * (1 - sigmoid(-1.5))])


def test_the_reference_point_has_no_gradient_and_is_never_negative() -> None:
    policy = torch.tensor([-1.0, -3.0], requires_grad=True)
    point = losses.kto_reference_point(policy, torch.tensor([-2.0, -5.0]))
    assert point.item() == 1.5
    assert not point.requires_grad
    assert losses.kto_reference_point(torch.tensor([-9.0]), torch.tensor([0.0])).item() == 0.0


@pytest.mark.parametrize(("up", "down"), [(10, 10), (3, 30), (30, 3), (40, 30), (0, 5), (5, 0)])
def test_class_weights_keep_the_papers_ratio(up: int, down: int) -> None:
    desirable, undesirable = losses.kto_weights(up, down)
    assert min(desirable, undesirable) >= 1
    if up and down:
        assert 1 - 1e-9 <= up * desirable / (down * undesirable) <= 4 / 3 + 1e-9


class Logits(torch.nn.Module):
    """Answers as TRL's patched heads do: log-probs of the labels, 0 where they are masked."""

    is_gradient_checkpointing = False
    training = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(11, 11, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor, **ignored: Any) -> Any:
        logprobs = self.token_logprobs(input_ids)
        return SimpleNamespace(
            log_probs=torch.where(labels[:, 1:] != -100, logprobs, 0.0),
            entropy=torch.zeros_like(logprobs),
            mean_logits=torch.zeros_like(logprobs),
            is_top1=torch.zeros_like(logprobs, dtype=torch.bool),
        )

    def token_logprobs(self, input_ids: Tensor) -> Tensor:
        logits = self.table[input_ids[:, :-1]].log_softmax(-1)
        return logits.gather(-1, input_ids[:, 1:, None])[..., 0]


def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, KTOTrainer, RewardTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, reward=RewardTrainer)


class Accelerator:
    device = torch.device("cpu")

    @staticmethod
    def gather_for_metrics(value: Tensor) -> Tensor:
        return value

    gather = gather_for_metrics


def trl_self(reference: Logits, **more: Any) -> Any:
    return SimpleNamespace(
        model=reference,
        ref_model=reference,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        **more,
    )


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, 11, (6, 9))
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[:, :3] = 0
    mask[1, 7:] = 0
    mask[4, 5:] = 0
    return ids, mask


def ours(model: Logits, ids: Tensor, mask: Tensor) -> Tensor:
    return losses.sequence_logprobs(model.token_logprobs(ids), mask[:, 1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_trl(smoothing: float) -> None:
    policy, reference = Logits(0), Logits(1)
    ids, mask = batch()
    me = trl_self(
        reference,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["robust" if smoothing else "sigmoid"],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        use_weighting=False,
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    theirs = trl().dpo._compute_loss(me, policy, inputs, return_outputs=False)
    win, lose = ours(policy, ids, mask).chunk(2)
    rw, rl = ours(reference, ids, mask).detach().chunk(2)
    margin = losses.dpo_margin(win, lose, rw, rl)
    if smoothing:
        # TRL's "robust" is (clean - flipped) / (1 - 2e); conservative DPO is their sum.
        clean = losses.dpo_loss(margin, beta=BETA)
        flipped = losses.dpo_loss(-margin, beta=BETA)
        loss = ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
    else:
        loss = losses.dpo_loss(margin, beta=BETA)
    assert loss.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    (mine,) = torch.autograd.grad(loss.mean(), policy.table, retain_graph=True)
    (other,) = torch.autograd.grad(theirs, policy.table)
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-6)


def test_kto_equals_trl() -> None:
    policy, reference = Logits(0), Logits(1)
    ids, mask = batch()
    mismatched = torch.cat([ids[:, :3], ids.roll(1, 0)[:, 3:]], dim=1)
    mismatched_mask = torch.cat([mask[:, :3], mask.roll(1, 0)[:, 3:]], dim=1)
    up = torch.tensor([True, False, True, True, False, False])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "KL_input_ids": mismatched,
        "KL_attention_mask": torch.ones_like(ids),
        "KL_completion_mask": mismatched_mask,
        "label": up,
    }
    kto = trl().kto
    me = trl_self(
        reference,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=1.5,
    )
    me._compute_kl_logps = lambda model, inner: kto._compute_kl_logps(me, model, inner)
    theirs = kto._compute_loss(me, policy, inputs, return_outputs=False)
    point = losses.kto_reference_point(
        ours(policy, mismatched, mismatched_mask), ours(reference, mismatched, mismatched_mask)
    )
    loss = losses.kto_loss(
        ours(policy, ids, mask),
        ours(reference, ids, mask).detach(),
        up,
        point,
        beta=BETA,
        desirable_weight=1.2,
        undesirable_weight=1.5,
    )
    assert loss.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
    (mine,) = torch.autograd.grad(loss.mean(), policy.table, retain_graph=True)
    (other,) = torch.autograd.grad(theirs, policy.table)
    torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-6)
