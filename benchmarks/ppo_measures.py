"""How `ppo.py` measures: one evaluator for both policies, reward at a distance, and the floor."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from heedful_trainer.rollouts.records import Ids
from peft import PeftModel
from ppo_sides import SAMPLES, TEXT_TOKENS, TEXTS_PER_EPISODE, Task
from transformers import AutoModelForCausalLM

_MATMUL = 2048
_TIMED = 20


def evaluate(task: Task, adapter: Path | None) -> dict[str, float]:
    """Return reward and KL of a policy on the held-out prompts; None is the base."""
    torch.manual_seed(task.args.seed)
    dtype = getattr(torch, task.args.dtype)
    model = AutoModelForCausalLM.from_pretrained(task.base.directory, dtype=dtype)
    policy = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    policy.eval()
    rewards, kl, lengths = [], [], []
    for prompt in task.held_out:
        answer = _answer(policy, task, prompt)
        rewards.append(task.reward(answer))
        lengths.append(len(answer))
        kl.append(0.0 if adapter is None else _divergence(policy, prompt, answer))
    rewards_P = torch.tensor(rewards)
    return {
        "n": len(rewards),
        "reward": float(rewards_P.mean()),
        "reward_error": float(rewards_P.std() / len(rewards) ** 0.5),
        "kl_nats": sum(kl) / len(kl),
        "answer_tokens": sum(lengths) / len(lengths),
    }


def reward_at(history: Sequence[Mapping[str, float]], kl_nats: float) -> float:
    """Return the reward where a training first reached a KL, between two batches by a line."""
    before: tuple[float, float] | None = None
    for row in history:
        here = row["kl_nats"], row["reward"]
        if here[0] >= kl_nats:
            if before is None or here[0] == before[0]:
                return here[1]
            share = (kl_nats - before[0]) / (here[0] - before[0])
            return before[1] + share * (here[1] - before[1])
        before = here
    return history[-1]["reward"]


def floor(task: Task, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the least seconds of one episode: its tokens decoded, its steps computed."""
    config = json.loads((task.base.directory / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    layer = 2 * hidden * width * (heads + kv) + 3 * hidden * wide
    half, head = config["num_hidden_layers"] / 2 * layer, config["vocab_size"] * hidden
    prompt = sum(map(len, task.prompts)) / len(task.prompts)
    answer = ours["tokens"] / ours["episodes"]
    row = prompt / SAMPLES + answer  # a prompt is computed once for its answers
    # Two operations a weight forward; backward without the frozen weights' own gradients another
    # two. Once through the lower half; through the upper: policy, reference and value, then policy
    # and value with gradients. The head where log-probs are needed: twice, and with gradients.
    episode = row * half * (2 + 3 * 2 + 2 * 4) + answer * head * (2 * 2 + 4)
    text = TEXTS_PER_EPISODE * TEXT_TOKENS * (half * 4 + head * 4)  # its lower half is kept
    rate = _matmul_rate(getattr(torch, task.args.dtype), hidden, wide)
    decode_s, compute_s = answer / ours["decode_tokens_per_s"], (episode + text) / rate
    return {
        "answer_tokens": answer,
        "decode_tokens_per_s": ours["decode_tokens_per_s"],
        "matmul_operations_per_s": rate,
        "operations_per_episode": episode + text,
        "decode_s_per_episode": decode_s,
        "compute_s_per_episode": compute_s,
        "episodes_per_s": 1 / (decode_s + compute_s),
    }


def _matmul_rate(dtype: torch.dtype, hidden: int, wide: int) -> float:
    x, w = torch.randn(_MATMUL, hidden, dtype=dtype), torch.randn(hidden, wide, dtype=dtype)
    best = float("inf")
    for _ in range(_TIMED):
        started = time.perf_counter()
        torch.mm(x, w)
        best = min(best, time.perf_counter() - started)
    return 2 * _MATMUL * hidden * wide / best


@torch.inference_mode()
def _answer(policy: Any, task: Task, prompt: Ids) -> list[int]:
    ids = torch.tensor([prompt])
    found = policy.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.answer_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=task.tokenizer.eos_token_id,
        pad_token_id=task.tokenizer.eos_token_id,
    )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


@torch.inference_mode()
def _divergence(policy: PeftModel, prompt: Ids, answer: Sequence[int]) -> float:
    """Return KL(policy ‖ base) over the whole vocabulary, summed over an answer's positions."""
    ids = torch.tensor([[*prompt, *answer]])
    here = slice(len(prompt) - 1, -1)
    mine = policy(input_ids=ids).logits[0, here].float().log_softmax(-1)
    with policy.disable_adapter():
        theirs = policy(input_ids=ids).logits[0, here].float().log_softmax(-1)
    return float((mine.exp() * (mine - theirs)).sum())
