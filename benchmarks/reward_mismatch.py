"""Case `mismatch` of benchmarks/reward_model.py: log-probs of the server beside the trainer's.

The same answers, token by token, as a server scores them and as the trainer does on the weights
that this server serves, dequantized, in fp32 and in bf16. Beside them stands what transformers
itself differs by between its two attention paths in bf16, on the same weights and texts.
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import heedful
import numpy as np
import torch
from heedful_trainer.backbone import BackboneOptions, load_backbone
from heedful_trainer.base import dequantize_command
from heedful_trainer.packing import Row
from loop_support import loop_server, model_path, say
from reward_samples import Bench
from transformers import AutoModelForCausalLM

FORMS = ("float32", "bfloat16", "int4")
_SCORED_AT_ONCE = 16
_TIMES_SELF = 1.5
_FP32_NATS = 1e-4


def mismatch(bench: Bench) -> dict[str, Any]:
    """Return mean and 99th percentile of the differences, in nats a token."""
    args = bench.args
    samples = [sample.first(1) for sample in bench.pool("votes", 0, args.mismatch_prompts)]
    rows = [sample.row for sample in samples]
    row: dict[str, Any] = {"answers": len(rows), "tokens": sum(len(r.answers[0]) for r in rows)}
    forms = {}
    for form in FORMS:
        directory = bench.work / f"{form}-weights"
        served = _served(form, rows, directory, bench.work / f"{form}-home", args)
        forms[form] = {
            dtype: _figures(served, _trained(directory, dtype, rows), rows)
            for dtype in ("float32", "bfloat16")
        }
        say(f"{form}: {forms[form]}")
    directory = bench.work / "bfloat16-weights"
    paths = [_transformers(directory, attention, rows) for attention in ("sdpa", "eager")]
    itself = _figures(*paths, rows)
    bf16 = forms["bfloat16"]["bfloat16"]["mean"]
    return row | {
        "forms": forms,
        "transformers_sdpa_against_eager_bfloat16": itself,
        "fp32_mean": forms["float32"]["float32"]["mean"],
        "bf16_ratio_to_self_mismatch": bf16 / itself["mean"],
        "target": f"fp32 mean <= {_FP32_NATS}; bf16 <= {_TIMES_SELF} x self-mismatch",
    }


def _served(
    form: str, rows: Sequence[Row], weights: Path, home: Path, args: argparse.Namespace
) -> list[float]:
    """Return log-probs of all tokens by a server of this form, and write its weights."""
    command = dequantize_command(str(model_path(args.model)), form, weights, "float32", home)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    items = [(list(row.prompt), list(row.answers[0])) for row in rows]
    found: list[float] = []
    with (
        loop_server(args.model, home, (f"model.quantize={form}",)) as server,
        heedful.Client(server.target, timeout_s=600) as client,
    ):
        for start in range(0, len(items), _SCORED_AT_ONCE):
            for score in client.score(items[start : start + _SCORED_AT_ONCE]):
                found += score.logprobs
    return found


def _trained(directory: Path, dtype: str, rows: Sequence[Row]) -> list[float]:
    """Return the same by the trainer's own functions; the adapter is off."""
    backbone = load_backbone(directory, BackboneOptions(dtype))
    found: list[float] = []
    with torch.no_grad():
        for row in rows:
            batch = backbone.batch([row], keep=False)
            hidden = backbone.hidden(batch, with_adapter=False)
            found += backbone.answer_logprobs(batch, hidden).tolist()
    return found


def _transformers(directory: Path, attention: str, rows: Sequence[Row]) -> list[float]:
    """Return the same by transformers alone, in bf16."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
    found: list[float] = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.answers[0]]])
            start = len(row.prompt)
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float()
            found += logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0].tolist()
    return found


def _figures(
    first: Sequence[float], second: Sequence[float], rows: Sequence[Row]
) -> dict[str, Any]:
    differences = np.abs(np.subtract(first, second))
    sums, start = [], 0
    for row in rows:
        end = start + len(row.answers[0])
        sums.append(differences[start:end].mean())
        start = end
    draws = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    means = np.asarray(sums)[draws].mean(1)
    return {
        "mean": float(differences.mean()),
        "mean_interval": tuple(float(v) for v in np.quantile(means, (0.025, 0.975))),
        "p99": float(np.quantile(differences, 0.99)),
        "max": float(differences.max()),
    }
