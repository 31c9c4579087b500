"""TRL's PPO on the task of `ppo.py`, in an environment with trl 1.12.0 (the last one that has it).

Usage: python trl_ppo_peer.py SPEC.json OUT_DIR
Reads model, prompts as token ids and sizes; leaves OUT_DIR/adapter (PEFT) and OUT_DIR/result.json.

The policy is a LoRA adapter on the model, the reference the model without it; the value function is
a model of its own, as TRL wants it, with a head of zeros. Both have a learning rate of their own.
The reward is a program: the module around it gives TRL's `get_reward` what it asks of a model.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from brief_reward import reward_of_ids
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl.experimental.ppo import PPOConfig, PPOTrainer

PAD = "<|heedful-pad|>"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ids(nn.Module):
    """Passes token ids and mask through as hidden states."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Return them as two channels."""
        pair = torch.stack([input_ids, attention_mask.to(input_ids.dtype)], dim=-1)
        return SimpleNamespace(hidden_states=[pair])


class Program(nn.Module):
    """A reward model whose score is a program's.

    An answer begins behind the last turn's opening, which prompts hold a known number of times.
    """

    base_model_prefix = "ids"

    def __init__(self, tokenizer: Any, turn_token_id: int, num_turns: int, opening: int) -> None:
        super().__init__()
        self.ids = Ids()
        self._tokenizer, self._turn = tokenizer, turn_token_id
        self._num_turns, self._opening = num_turns, opening
        self.seconds = 0.0

    def score(self, pair_BT2: Tensor) -> Tensor:
        """Return each row's reward at all of its positions, [B, T, 1]."""
        started = time.perf_counter()
        rewards = [self._reward(*row.unbind(-1)) for row in pair_BT2]
        self.seconds += time.perf_counter() - started
        rewards_B = torch.tensor(rewards)
        return rewards_B[:, None, None].expand(*pair_BT2.shape[:2], 1)

    def _reward(self, ids_T: Tensor, mask_T: Tensor) -> float:
        ids = ids_T[mask_T.bool()].tolist()
        turns = [place for place, token in enumerate(ids) if token == self._turn]
        answer = ids[turns[self._num_turns - 1] + self._opening :]
        return reward_of_ids(answer, self._decode, self._tokenizer.eos_token_id)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Noted(transformers.TrainerCallback):
    """Keeps what TRL logs after each batch."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take reward and KL of a batch, and the time at its end."""
        self.history.append(
            {
                "episodes": float(logs["episode"]),
                "reward": float(logs["objective/scores"]),
                "kl_nats": float(logs["objective/kl"]),
                "seconds": time.perf_counter() - self.started,
            }
        )


def main() -> None:
    """Train once and leave adapter and result."""
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    # TRL takes the first pad token for an answer's end, so that it must not be the end token.
    tokenizer.add_special_tokens({"pad_token": PAD})
    dtype = DTYPES[spec["dtype"]]
    auto = transformers.AutoModelForCausalLM
    config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear")
    policy = get_peft_model(auto.from_pretrained(spec["model"], dtype=dtype), config)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(
        spec["model"], dtype=torch.float32, num_labels=1
    )
    nn.init.zeros_(value.score.weight)
    program = Program(tokenizer, spec["turn_token_id"], spec["num_turns"], spec["opening"])
    noted = Noted()
    trainer = PPOTrainer(
        args=_arguments(spec, out),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=program,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": spec["prompts"]}),
        eval_dataset=Dataset.from_dict({"input_ids": spec["prompts"][: spec["batch"]]}),
        optimizers=_optimisers(policy, value, spec),
        callbacks=[noted],
    )
    noted.started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - noted.started
    policy.save_pretrained(out / "adapter")
    result = {
        "peer": f"trl {trl.__version__} PPOTrainer, transformers {transformers.__version__}",
        "seconds": seconds,
        "reward_program_s": program.seconds,
        "episodes": int(noted.history[-1]["episodes"]),
        "history": noted.history,
    }
    (out / "result.json").write_text(json.dumps(result))


def _arguments(spec: dict[str, Any], out: Path) -> PPOConfig:
    return PPOConfig(
        output_dir=str(out / "trl"),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=spec["seed"],
        total_episodes=spec["episodes"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"],
        local_rollout_forward_batch_size=spec["batch"],
        num_ppo_epochs=1,
        num_sample_generations=0,
        logging_steps=1,
        response_length=spec["answer_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=spec["beta"],
        cliprange=spec["clip"],
        lam=spec["lam"],
    )


def _optimisers(policy: nn.Module, value: nn.Module, spec: dict[str, Any]) -> Any:
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": trained, "lr": spec["policy_learning_rate"]},
        {"params": value.parameters(), "lr": spec["peer_value_learning_rate"]},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    return optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)


if __name__ == "__main__":
    main()
