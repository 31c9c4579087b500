"""A Llama-3.1-8B-shaped decoder with random weights, and steps of it as the engine makes them.

Owns shapes and sizes. What a step costs here is the decoder's work, the draw and the reading of
the ids; scheduling and text are not in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from heedful_kernels.bnb_layout import NF4_CODE, Nf4Weight
from heedful_kernels.sample import SampleSettings
from heedful_server.model.batch import Draws, ForwardBatch
from heedful_server.model.cuda_decoder import CudaDecoder
from heedful_server.model.cuda_draws import read_drawn
from heedful_server.model.cuda_linear import Nf4Linear
from heedful_server.model.decoder import DecoderWeights, LayerWeights
from heedful_server.model.embedding import EmbeddingTable
from heedful_server.model.linear import DenseLinear, Linear
from heedful_server.model.norm import Norm
from heedful_server.model.spec import DecoderSpec, RopeSpec

BLOCK_SIZE = 16
CONTEXT = 512
SPEC = DecoderSpec(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14_336,
    context_tokens=8192,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=RopeSpec(500_000.0, 128),
)

Form = Literal["nf4", "bitsandbytes", "bf16"]


@dataclass(frozen=True)
class BitsandbytesLinear:
    """The same packed weight through bitsandbytes' own product."""

    weight: Nf4Weight
    state: object

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] to [T, N]."""
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.weight.packed, quant_state=self.state)


def make_decoder(form: Form, *, deterministic: bool = False) -> CudaDecoder:
    """The decoder, all weights random."""
    torch.manual_seed(0)
    q, kv, hidden, ffn = SPEC.q_size, SPEC.kv_size, SPEC.hidden_size, SPEC.ffn_size
    norm = Norm(torch.ones(hidden, device="cuda"), None, SPEC.norm_eps)
    layers = tuple(
        LayerWeights(
            attn_norm=norm,
            qkv=_linear(form, q + 2 * kv, hidden, deterministic),
            attn_out=_linear(form, hidden, q, deterministic),
            mlp_norm=norm,
            mlp_in=_linear(form, 2 * ffn, hidden, deterministic),
            mlp_out=_linear(form, hidden, ffn, deterministic),
        )
        for _ in range(SPEC.num_layers)
    )
    weights = DecoderWeights(
        embed=EmbeddingTable("dense", _random(SPEC.vocab_size, hidden)),
        positions=None,
        embed_in=None,
        layers=layers,
        final_norm=norm,
        embed_out=None,
        head=DenseLinear(_random(SPEC.vocab_size, hidden), None, deterministic),
    )
    return CudaDecoder(
        SPEC,
        weights,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        quantization=form,
        deterministic=deterministic,
    )


def step_batch(rows: int, *, adapters: bool = False) -> ForwardBatch:
    """A decode step of sequences with CONTEXT positions each, half of them sampled."""
    blocks = CONTEXT // BLOCK_SIZE
    tables = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
    last = CONTEXT - 1
    sampled = (torch.arange(rows) % 2 == 1).float()
    settings = SampleSettings(
        torch.randint(0, 1 << 30, (rows, 2), dtype=torch.int32),
        sampled * 0.8,
        torch.zeros(rows, dtype=torch.int32),
        torch.full((rows,), 0.9, dtype=torch.float64),
        torch.full((rows,), -math.inf),
    )
    return ForwardBatch(
        token_ids_T=torch.randint(0, SPEC.vocab_size, (rows,)),
        positions_T=torch.full((rows,), last),
        slot_mapping_T=tables[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1,
        block_tables_SN=tables,
        query_starts=tuple(range(rows + 1)),
        context_lens=(CONTEXT,) * rows,
        logit_rows_R=torch.arange(rows),
        adapter_slots=tuple(row % 8 for row in range(rows)) if adapters else None,
        draws=Draws(settings),
    )


def step_bytes(decoder: CudaDecoder, rows: int) -> int:
    """Bytes that a step has to read."""
    cache = rows * CONTEXT * decoder.kv_bytes_per_block(BLOCK_SIZE) // BLOCK_SIZE
    return decoder.step_weight_bytes + cache


def make_cache(decoder: CudaDecoder, rows: int) -> object:
    """A cache for steps of so many rows, filled."""
    cache = decoder.allocate_kv_cache(rows * CONTEXT // BLOCK_SIZE, BLOCK_SIZE)
    cache.data.normal_()
    return cache


def step_seconds(
    decoder: CudaDecoder, batch: ForwardBatch, cache: object, steps: int = 40
) -> float:
    """Seconds of a step from the batch to the ids on the host, in a row of steps."""
    run = step_call(decoder, batch, cache)
    for _ in range(4):
        run()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(steps):
        run()
    return (time.perf_counter() - started_s) / steps


def step_call(decoder: CudaDecoder, batch: ForwardBatch, cache: object) -> Callable[[], list[int]]:
    """One step, read."""

    def run() -> list[int]:
        drawn = decoder.forward(batch, cache).drawn_6D
        assert drawn is not None
        return read_drawn(drawn).token_ids

    return run


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02


def _linear(form: Form, rows: int, columns: int, deterministic: bool) -> Linear:
    if form == "bf16":
        return DenseLinear(_random(rows, columns), None, deterministic)
    weight = Nf4Weight(
        torch.randint(0, 256, (rows * columns // 2,), device="cuda", dtype=torch.uint8),
        torch.full((rows * columns // 64,), 0.02, device="cuda"),
        torch.tensor(NF4_CODE, device="cuda"),
        (rows, columns),
        64,
    )
    if form == "nf4":
        return Nf4Linear(weight, None, deterministic)
    import bitsandbytes

    state = bitsandbytes.functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=weight.code,
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    return BitsandbytesLinear(weight, state)
