"""Decode attention over a paged cache of over 500 MB, beside SDPA on gathered keys and vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from heedful_kernels.paged_attention import paged_attention

from gpu_rows.common import Row, copy_bandwidth, graph_seconds, in_units, peer_seconds

HEADS, KV_HEADS, D, BLOCK = 32, 8, 128, 16


def rows() -> Iterator[Row]:
    """Many sequences of middling length, and few long ones."""
    for sequences, context in ((64, 4096), (4, 65_536)):
        yield _row(sequences, context)


def _row(sequences: int, context: int) -> Row:
    blocks = context // BLOCK
    shape = (sequences * blocks, BLOCK, 2, KV_HEADS, D)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(sequences * blocks, device="cuda", dtype=torch.int32)
    tables = tables.view(sequences, blocks)
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    lens = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    q = torch.randn(sequences, HEADS, D, device="cuda", dtype=torch.bfloat16)
    kwargs = {"scale": D**-0.5, "max_query_tokens": 1, "max_context_tokens": context}

    def ours() -> torch.Tensor:
        return paged_attention(q, cache, tables, starts, lens, **kwargs)

    keys, values = cache[tables.long()].flatten(1, 2).permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    torch.testing.assert_close(ours(), sdpa()[:, :, 0], rtol=0.05, atol=0.02)
    seconds = graph_seconds([ours])
    peers = {
        "SDPA, gathered K/V": peer_seconds(lambda: [sdpa]),
        "vLLM": peer_seconds(lambda: _vllm(q, cache, tables, starts, lens, context)),
    }
    return Row(
        "paged decode attention",
        f"{sequences} x {context} positions, {HEADS}/{KV_HEADS} heads of {D}, "
        f"{cache.nbytes / 1e6:.0f} MB",
        "µs",
        figure=seconds * 1e6,
        floor=cache.nbytes / copy_bandwidth() * 1e6,
        peers={key: in_units(value, 1e6) for key, value in peers.items()},
        target="≥ 85 % of the measured bandwidth; never below SDPA",
        note=f"{cache.nbytes / copy_bandwidth() / seconds:.2f} of the measured bandwidth",
    )


def _vllm(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    context: int,
) -> list[Callable[[], object]]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    keys, values = (part.contiguous() for part in cache.unbind(2))
    out = torch.empty_like(q)

    def call() -> object:
        return unified_attention(
            q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lens,
            max_seqlen_k=context, softmax_scale=D**-0.5, causal=True, window_size=(-1, -1),
            block_table=tables, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip

    call()
    return [call]
