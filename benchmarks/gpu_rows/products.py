"""`nf4_matmul` at layer shapes of Llama-3.1-8B and Qwen2.5-7B, beside bitsandbytes and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from heedful_kernels.bnb_layout import Nf4Weight, quantize_nf4
from heedful_kernels.nf4_matmul import nf4_matmul

from gpu_rows.common import (
    Row,
    copy_bandwidth,
    graph_seconds,
    in_units,
    num_buffers,
    peer_seconds,
    time_is_up,
)

SHAPES = {
    "Llama-3.1-8B q/o": (4096, 4096),
    "Llama-3.1-8B gate/up": (14336, 4096),
    "Llama-3.1-8B down": (4096, 14336),
    "Qwen2.5-7B q/o": (3584, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "Llama-3.1-8B k/v": (1024, 4096),
    "Qwen2.5-7B k/v": (512, 3584),
    "Qwen2.5-7B gate/up": (18944, 3584),
}
ROWS = (1, 8, 32, 64, 128)
TARGET = "≥ 2 x where bitsandbytes dequantizes, ≥ 1.1 x where it fuses; cuBLAS ≥ 0.95 (0.7 at 128)"


def rows() -> Iterator[Row]:
    """A row for every shape and number of rows, until the time is up."""
    for name, (outputs, columns) in SHAPES.items():
        for count in ROWS:
            if time_is_up():
                return
            yield _row(name, count, outputs, columns)


def _row(name: str, count: int, outputs: int, columns: int) -> Row:
    weight = torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    packed = quantize_nf4(weight, blocksize=64, nested=False)
    copies = [_copy(packed) for _ in range(num_buffers(packed.num_bytes))]
    dense = [weight.clone() for _ in range(num_buffers(weight.nbytes))]
    x = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), weight.float())
    error = (nf4_matmul(x, packed).float() - expected).std() / expected.std()
    assert error < 0.15, f"NF4 rounds, but not by {error:.3f} of the result"
    seconds = graph_seconds([lambda w=w: nf4_matmul(x, w) for w in copies])
    peers = {
        "bitsandbytes": peer_seconds(lambda: bitsandbytes_calls(x, copies)),
        "cuBLAS bf16": peer_seconds(
            lambda: [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
        ),
    }
    return Row(
        "nf4_matmul",
        f"{name}, M = {count}",
        "µs",
        figure=seconds * 1e6,
        floor=packed.num_bytes / copy_bandwidth() * 1e6,
        peers={key: in_units(value, 1e6) for key, value in peers.items()},
        target=TARGET,
    )


def _copy(weight: Nf4Weight) -> Nf4Weight:
    return Nf4Weight(
        weight.packed.clone(), weight.absmax.clone(), weight.code, weight.shape, weight.blocksize
    )


def bitsandbytes_calls(x: torch.Tensor, weights: list[Nf4Weight]) -> list[Callable[[], object]]:
    """bitsandbytes' own product of the same packed weights."""
    import bitsandbytes

    calls = []
    for weight in weights:
        state = bitsandbytes.functional.QuantState(
            absmax=weight.absmax,
            shape=torch.Size(weight.shape),
            code=weight.code,
            blocksize=weight.blocksize,
            quant_type="nf4",
            dtype=x.dtype,
        )
        bytes_ = weight.packed.reshape(-1, 1)
        calls.append(lambda b=bytes_, s=state: bitsandbytes.matmul_4bit(x, b, quant_state=s))
    mine, theirs = nf4_matmul(x, weights[0]).float(), calls[0]().float()
    assert (mine - theirs).abs().max() <= 0.05 * mine.abs().max(), "the two disagree"
    return calls
