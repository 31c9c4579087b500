"""Named sets of settings: a paper's own numbers, to be had by one word.

Owns the sets, as values by dotted path below ``[trainer]``. They are defaults: whatever is set
beside them wins. What differs from the paper all the same, and why, is one table in
`docs/explanation/instructgpt.md`. Pure, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

Preset = Literal["none", "instructgpt"]

# The paper trains all weights of its models and we an adapter, which takes larger steps. The factor
# is a rule of thumb and was not measured here.
_ADAPTER_RATE: Final = 10.0

# Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, appendix C, for the 1.3B and 6B models.
_INSTRUCTGPT: Final[Mapping[str, object]] = {
    "method": "ppo_ptx",
    "lora.rank": 64,
    "lora.alpha": 64.0,
    "lora.trained_share": 1.0,
    # C.1: 16 epochs, cosine to 10 %, no warm-up, residual dropout 0.2, chosen by reward.
    "sft.epochs": 16.0,
    "sft.residual_dropout": 0.2,
    "sft.choose_by": "reward",
    "sft.optimiser.learning_rate": 9.65e-6 * _ADAPTER_RATE,
    "sft.optimiser.batch_size": 32,
    "sft.optimiser.warmup_share": 0.0,
    "sft.optimiser.final_share": 0.1,
    "sft.optimiser.min_steps": 0,
    # C.2: one epoch, cosine to 10 %, 64 prompts of a batch, demonstrations at 0, one head, ties
    # dropped; nothing but rankings.
    "reward.heads": 1,
    "reward.epochs": 1.0,
    "reward.patience": 1000,
    "reward.centre_weight": 0.0,
    "reward.drop_ties": True,
    "reward.thumb_weight": 0.0,
    "reward.correction_weight": 0.0,
    "reward.optimiser.learning_rate": 9e-6 * _ADAPTER_RATE,
    "reward.optimiser.batch_size": 64,
    "reward.optimiser.warmup_share": 0.0,
    "reward.optimiser.final_share": 0.1,
    "reward.optimiser.min_steps": 0,
    # C.3: two epochs on demonstrations with 10 % language-model data; start and reference of PPO.
    "ppo.start.kind": "sft",
    "ppo.start.epochs": 2.0,
    "ppo.start.text_share": 0.1,
    "ppo.start.learning_rate": 5e-6 * _ADAPTER_RATE,
    # C.4: 256k episodes in batches of 512, 8 minibatches, one inner epoch, warm-up of 10.
    "ppo.iterations": 500,
    "ppo.batch_episodes": 512,
    "ppo.samples_per_prompt": 1,
    "ppo.minibatches": 8,
    "ppo.inner_epochs": 1,
    "ppo.value_only_iterations": 0,
    "ppo.max_answer_tokens": 1024,
    "ppo.policy_learning_rate": 8.05e-6 * _ADAPTER_RATE,
    "ppo.value_learning_rate": 9e-6 * _ADAPTER_RATE,
    "ppo.warmup_iterations": 10,
    "ppo.clip": 0.2,
    "ppo.lam": 0.95,
    "ppo.overlap": False,
    "ppo.kl.beta": 0.02,
    "ppo.kl.target_nats": 0.0,
    "ppo.kl.max_nats": 1000.0,
    "ppo.ptx.weight": "gamma",
    "ppo.ptx.gamma": 27.8,
    "ppo.ptx.texts_per_episode": 8.0,
    "ppo.ptx.texts": 4096,
    "ppo.ptx.max_tokens": 1024,
    "ppo.reward.scale": "model",
    "ppo.reward.missing_end_penalty": 0.0,
    "ppo.reward.length_penalty": 0.0,
    "ppo.ema.decay": 0.992,
    "ppo.stopping.evaluate_every": 25,
    "ppo.stopping.patience": 1000,
}

PRESETS: Final[Mapping[str, Mapping[str, object]]] = {"none": {}, "instructgpt": _INSTRUCTGPT}
