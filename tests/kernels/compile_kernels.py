"""Compiles every Triton kernel for a Hopper GPU, to machine code, on a machine without one.

The interpreter runs kernels as Python and lets through what the compiler refuses: a variable whose
type changes in a branch, too much shared memory, an operator it lacks. Prints a line per kernel,
starting with its name. Run by test_compiles.py in a process of its own: it replaces the driver.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from heedful_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Of a multiprocessor of the reference device, for one program.
SHARED_BYTES = 227 * 1024


class _Target:
    """Stands for a device that is only compiled for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _compile_instead(kernel: JITFunction, grid: Any) -> Callable[..., None]:
    def compile_(*args: Any, **kwargs: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **kwargs)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= SHARED_BYTES, compiled.metadata
        tensor_cores = [name for name in ("wgmma.mma", "mma.sync") if name in compiled.asm["ptx"]]
        module = kernel.fn.__module__.removeprefix("heedful_kernels.")
        print(f"{module}.{kernel.fn.__name__}", compiled.metadata.shared, *tensor_cores)

    return compile_


def main(names: list[str]) -> None:
    # Before the operations are imported: each takes the function from there.
    launch.runs_triton = lambda operation, tensor, unsupported="": not unsupported
    driver.set_active(_Target())
    JITFunction.__getitem__ = _compile_instead
    for name in names or list(CALLS):
        CALLS[name]()


def _rows() -> None:
    from heedful_kernels.layernorm import add_layernorm_
    from heedful_kernels.rmsnorm import add_rmsnorm_
    from heedful_kernels.swiglu import gated

    x, residual, weight = torch.zeros(4, 4096).bfloat16(), torch.zeros(4, 4096), torch.ones(4096)
    add_rmsnorm_(x, residual, weight, 1e-6)
    add_layernorm_(x, residual, weight, weight, 1e-6)
    gated(x, "silu")
    gated(x, "gelu")


def _attention() -> None:
    from heedful_kernels.paged_attention import paged_attention
    from heedful_kernels.rope_cache import rope_cache

    cache = torch.zeros(4, 16, 2, 8, 128).bfloat16()
    qkv, angles = torch.zeros(300, 48 * 128).bfloat16(), torch.zeros(300, 64)
    slots = torch.arange(300)
    q = rope_cache(
        qkv, angles, angles, slots, cache, num_heads=32, neighbours=True,
        norm_weight_ND=torch.ones(40, 128), eps=1e-6,
    )  # fmt: skip
    for new, context in ((1, 4096), (300, 300)):
        paged_attention(
            q[:new], cache, torch.zeros(1, 256, dtype=torch.int32),
            torch.tensor([0, new], dtype=torch.int32), torch.tensor([context], dtype=torch.int32),
            scale=0.1, max_query_tokens=new, max_context_tokens=context,
        )  # fmt: skip
        paged_attention(
            q[:new], cache, torch.zeros(1, 256, dtype=torch.int32),
            torch.tensor([0, new], dtype=torch.int32), torch.tensor([context], dtype=torch.int32),
            scale=0.1, max_query_tokens=new, max_context_tokens=context, split_tokens=256,
        )  # fmt: skip


def _products() -> None:
    from heedful_kernels.bnb_layout import quantize_int8, quantize_nf4
    from heedful_kernels.dense_matmul import dense_matmul
    from heedful_kernels.int8_matmul import int8_matmul
    from heedful_kernels.lora import LoraWeights, add_lora_, plan_lora
    from heedful_kernels.nf4_matmul import nf4_matmul

    weight_NK = torch.randn(128, 1024)
    dense_matmul(torch.zeros(3, 1024).bfloat16(), weight_NK.bfloat16(), torch.zeros(128))
    dense_matmul(torch.zeros(3, 1024), weight_NK)
    nf4, int8 = quantize_nf4(weight_NK), quantize_int8(weight_NK)
    for rows in (1, 64, 65):
        x = torch.zeros(rows, 1024).bfloat16()
        nf4_matmul(x, nf4, torch.zeros(128))
        if rows < 65:
            int8_matmul(x, int8)
    weights = LoraWeights(
        torch.zeros(4, 48, 1024).bfloat16(), torch.zeros(4, 128, 16).bfloat16(),
        torch.ones(4), (0, 64, 96, 128),
    )  # fmt: skip
    plan = plan_lora(torch.zeros(4, dtype=torch.int32), 4)
    add_lora_(torch.zeros(4, 128).bfloat16(), torch.zeros(4, 1024).bfloat16(), weights, plan)


def _sample() -> None:
    from heedful_kernels.sample import SampleEdits, SampleSettings, sample

    none = torch.zeros(2, 16)
    nothing = torch.zeros(2, dtype=torch.float64)
    edits = SampleEdits(none.int(), none, none.int(), none.bool(), nothing, nothing, nothing)
    settings = SampleSettings(
        torch.zeros(2, 2).int(), torch.ones(2), torch.zeros(2).int(), nothing + 0.9,
        torch.zeros(2), edits, torch.zeros(2, 4008).int(),
    )  # fmt: skip
    sample(torch.zeros(2, 128_256), settings)


def _token_logprob() -> None:
    from heedful_kernels.token_logprob import token_logprobs_and_entropy

    hidden = torch.zeros(200, 512).bfloat16().requires_grad_()
    weight = torch.zeros(600, 512).bfloat16().requires_grad_()
    logp, entropy = token_logprobs_and_entropy(hidden, weight, torch.zeros(200, dtype=torch.int64))
    (logp.sum() + entropy.sum()).backward()


CALLS: dict[str, Callable[[], None]] = {
    "rows": _rows,
    "attention": _attention,
    "products": _products,
    "sample": _sample,
    "token_logprob": _token_logprob,
}

if __name__ == "__main__":
    main(sys.argv[1:])
