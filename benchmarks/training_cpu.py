"""Tokens a second of DPO training with LoRA on a CPU, beside plain transformers and PEFT.

The peer is what one writes first: PEFT's LoRA on all linears of all layers, autocast to bf16, both
answers of a pair as rows of their own with their prompt, logits of every position. Ours is the
trainer's own loop body. A token counts as the peer computes it (prompt and answer, for each
answer), so that the figures are about the same work; "computed" are the tokens that ours touches.
Timed in turns in one process; the best of the rounds counts, since others may share the cores. The
reference's log-probs are in no figure: both need them once. The trunk below the upper half is not
either, since it is computed once for all epochs; its time stands beside, as does the figure with it
for one epoch.

    python benchmarks/training_cpu.py --model DIR [--pairs 16] [--prompt 50] [--answer 64]
                                      [--rounds 5] [--threads 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from heedful_trainer import losses
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.packing import Row
from peft import LoraConfig, get_peft_model
from torch import Tensor

BETA = 0.1
RANK = 16
Step = Callable[[], Tensor]


def make_rows(args: argparse.Namespace, vocab: int) -> list[Row]:
    """Return pairs of random answers, all of one length."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocab - 5, (count,), generator=generator).tolist())

    return [Row(ids(args.prompt), (ids(args.answer), ids(args.answer))) for _ in range(args.pairs)]


def our_logprobs(backbone: Backbone, rows: list[Row], with_adapter: bool = True) -> Tensor:
    """Return log π(y|x) of every answer, by the trainer's own functions."""
    batch = backbone.batch(rows)
    found = backbone.answer_logprobs(batch, backbone.hidden(batch, with_adapter=with_adapter))
    return losses.segment_logprobs(found, batch.packed.owner_N, batch.packed.num_answers)


def our_step(backbone: Backbone, rows: list[Row], reference: Tensor) -> Step:
    """Return one training step of ours."""
    optimiser = torch.optim.AdamW(backbone.adapter.parameters().values(), lr=2e-4, foreach=False)

    def step() -> Tensor:
        return train(our_logprobs(backbone, rows), reference, optimiser)

    return step


def peer_logprobs(model: torch.nn.Module, rows: list[Row]) -> Tensor:
    """Return the same from the logits of every position."""
    answers = [(row.prompt, answer) for row in rows for answer in row.answers]
    ids = torch.tensor([[*prompt, *answer] for prompt, answer in answers])
    start = len(rows[0].prompt)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    mask = torch.zeros_like(logprobs)
    mask[:, start - 1 :] = 1
    return losses.sequence_logprobs(logprobs, mask)


def peer_step(model: torch.nn.Module, rows: list[Row], reference: Tensor) -> Step:
    """Return one training step of the peer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-4, foreach=False)

    def step() -> Tensor:
        return train(peer_logprobs(model, rows), reference, optimiser)

    return step


def train(logprobs_A: Tensor, reference_A: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
    """Take one DPO step and return its loss."""
    gain_A = logprobs_A - reference_A
    loss = losses.dpo_loss(gain_A[::2] - gain_A[1::2], beta=BETA).mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return loss.detach()


def load_peer(directory: Path) -> torch.nn.Module:
    """Return the model with PEFT on it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(model, config)


def check(ours: Tensor, theirs: Tensor, tokens: int) -> float:
    """Exit unless the untrained policies agree as well as bf16 allows; return the difference."""
    difference = float((ours - theirs).abs().mean()) / tokens
    # transformers' own attention paths differ by 0.043 nats a token in bf16 on this model.
    if difference > 0.065:
        sys.exit(f"log-probs differ by {difference:.3f} nats a token: no figure is printed")
    return difference


def device_name() -> str:
    """Return what the processor calls itself and whether it multiplies bf16."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in text]
    return ", ".join([names[0] if names else platform.machine(), *units])


def main() -> None:
    """Run the check, then the timings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=50)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer = load_peer(args.model)
    rows = make_rows(args, peer.get_input_embeddings().num_embeddings)
    plain = sum(len(row.prompt) + len(answer) for row in rows for answer in row.answers)
    computed = sum(row.num_tokens for row in rows)
    with torch.no_grad():
        theirs = peer_logprobs(peer, rows)
    steps: dict[str, Step] = {"peer": peer_step(peer, rows, theirs)}
    differences, trunk_s = {}, dict[str, float]()
    for name, share in (("ours, all layers", 1.0), ("ours, upper half", 0.5)):
        backbone = load_backbone(args.model, BackboneOptions("bfloat16", RANK, 2 * RANK, share))
        backbone.adapter.reset(0)
        backbone.batch(rows[:1])
        backbone.free_trunks()
        started = time.perf_counter()
        backbone.batch(rows)
        trunk_s[name] = time.perf_counter() - started
        with torch.no_grad():
            reference = our_logprobs(backbone, rows, with_adapter=False)
        differences[name] = check(reference, theirs, args.answer)
        steps[name] = our_step(backbone, rows, reference)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(values[1:]) for name, values in seconds.items()}
    result = {
        "benchmark": "training_cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"benchmarks/training_cpu.py --model {args.model.name}",
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
        "shape": {"pairs": args.pairs, "prompt": args.prompt, "answer": args.answer},
        "plain_tokens": plain,
        "computed_tokens": computed,
        "tokens_per_second": {name: plain / value for name, value in best.items()},
        "tokens_per_second_one_epoch_with_trunk": {
            name: plain / (best[name] + value) for name, value in trunk_s.items()
        },
        "ratio_to_peer": {name: best["peer"] / value for name, value in best.items()},
        "nats_per_token_from_peer": differences,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
