"""Every Triton kernel compiles for the reference GPU, whether this machine has one or not."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from heedful_kernels import launch

KERNELS = {
    "rows": {"rmsnorm._kernel", "layernorm._kernel", "swiglu._kernel"},
    "attention": {
        "rope_cache._kernel",
        "paged_attention._attend_kernel",
        "paged_attention._join_kernel",
    },
    "products": {
        "nf4_matmul._matmul_kernel",
        "nf4_matmul._dequantize_kernel",
        "int8_matmul._kernel",
        "dense_matmul._kernel",
        "split_k._join_kernel",
        "lora._shrink_kernel",
        "lora._expand_kernel",
    },
    "sample": {
        "sample_kernels.edit_kernel",
        "sample_kernels.scan_kernel",
        "sample_kernels.decide_kernel",
        "sample_passes.histogram_kernel",
        "sample_passes.bracket_kernel",
        "sample_passes.collect_kernel",
        "sample_passes.last_kernel",
    },
    "token_logprob": {"token_logprob._forward_kernel", "token_logprob._gradient_kernel"},
}


@pytest.mark.skipif(launch.INTERPRETED, reason="this process interprets kernels")
@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler is for x86-64")
@pytest.mark.parametrize("group", list(KERNELS))
def test_every_kernel_compiles_for_the_reference_gpu(group: str, tmp_path: Path) -> None:
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", str(program), group],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == KERNELS[group]
    if group in ("products", "token_logprob"):
        assert any("wgmma.mma" in line for line in lines), "the products left the fast units"
