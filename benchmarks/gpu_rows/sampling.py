"""`sample` at [256, 128256] fp32 over a read of the logits, beside a sort, FlashInfer and vLLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from heedful_kernels.sample import SampleEdits, SampleSettings, sample

from gpu_rows.common import Row, copy_bandwidth, graph_seconds, in_units, peer_seconds

RESULTS, VOCAB, EDITS = 256, 128_256, 64


def rows() -> Iterator[Row]:
    """Peaked and flat logits with top-p, penalties and log-probs."""
    yield _row("peaked", 4.0, "≤ 1.5 x the one-read time")
    yield _row("flat, N(0, 1)", 1.0, "≤ 3 x the one-read time")


def _row(name: str, scale: float, target: str) -> Row:
    # 131 MB each: three are more than any cache.
    logits = [torch.randn(RESULTS, VOCAB, device="cuda") * scale for _ in range(3)]
    settings = _settings()
    seconds = graph_seconds([lambda x=x: sample(x, settings) for x in logits])
    # What the logits' bytes take at the speed of a copy, which counts reads and writes.
    floor = logits[0].nbytes / copy_bandwidth()
    peers = {
        "sort-based": peer_seconds(lambda: [lambda x=x: _by_sorting(x) for x in logits]),
        "FlashInfer": peer_seconds(lambda: _flashinfer(logits)),
        "vLLM": peer_seconds(lambda: _vllm(logits)),
    }
    return Row(
        "sample",
        f"[{RESULTS}, {VOCAB}] fp32, {name}, top-p 0.9, penalties, log-probs",
        "µs",
        figure=seconds * 1e6,
        floor=floor * 1e6,
        peers={key: in_units(value, 1e6) for key, value in peers.items()},
        target=target,
        note=f"{seconds / floor:.2f} x the one-read time; FlashInfer and vLLM apply neither "
        "penalties nor log-probs here",
    )


def _settings() -> SampleSettings:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((RESULTS,), value, dtype=dtype, device="cuda")

    ids = torch.stack([torch.randperm(VOCAB, device="cuda")[:EDITS] for _ in range(RESULTS)])
    edits = SampleEdits(
        ids.to(torch.int32),
        torch.zeros(RESULTS, EDITS, device="cuda"),
        torch.ones(RESULTS, EDITS, dtype=torch.int32, device="cuda"),
        torch.ones(RESULTS, EDITS, dtype=torch.bool, device="cuda"),
        full(1.1, torch.float64),
        full(0.1, torch.float64),
        full(0.1, torch.float64),
    )
    keys = torch.randint(-(2**31), 2**31, (RESULTS, 2), device="cuda").to(torch.int32)
    return SampleSettings(
        keys,
        full(0.8, torch.float32),
        full(0, torch.int32),
        full(0.9, torch.float64),
        full(-math.inf, torch.float32),
        edits,
    )


def _by_sorting(logits: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits, dim=-1)
    probs, ids = torch.softmax(logits / 0.8, dim=-1).sort(dim=-1, descending=True)
    probs = torch.where(probs.cumsum(dim=-1) - probs < 0.9, probs, 0.0)
    noise = torch.empty_like(probs).exponential_()
    token = ids.gather(1, (probs / noise).argmax(dim=-1, keepdim=True))
    return logp.gather(1, token)


def _flashinfer(logits: list[torch.Tensor]) -> list[Callable[[], object]]:
    import flashinfer

    top_p = torch.full((RESULTS,), 0.9, device="cuda")
    return [
        lambda x=x: flashinfer.sampling.top_p_sampling_from_probs(
            torch.softmax(x / 0.8, dim=-1), top_p
        )
        for x in logits
    ]


def _vllm(logits: list[torch.Tensor]) -> list[Callable[[], object]]:
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    top_p = torch.full((RESULTS,), 0.9, device="cuda")

    def call(x: torch.Tensor) -> torch.Tensor:
        # It masks its input in place.
        kept = apply_top_k_top_p_triton((x / 0.8), None, top_p)
        probs = torch.softmax(kept, dim=-1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)

    return [lambda x=x: call(x) for x in logits]
