"""In deterministic mode the GPU's kernels give a row the same bits whatever else is in the step.

The kernels run in Triton's interpreter, in a process of their own, or on a GPU; torch's operators,
which compute elsewhere, promise nothing of the kind.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heedful_kernels import launch
from heedful_server.model import cuda_decoder
from heedful_server.model import load as loading
from heedful_server.model.adapter import read_adapter
from heedful_server.model.cuda_decoder import CudaDecoder, why_not_cuda_kernels
from heedful_server.model.errors import UnsupportedModel
from heedful_server.model.families import read_spec
from heedful_server.model.load import load_best_decoder
from heedful_server.model.loader import load_weights
from heedful_server.model.weight_modes import mode_of
from heedful_server.protocol import EngineConfig
from torch import Tensor

NATIVE = torch.cuda.is_available() and not launch.INTERPRETED
DEVICE = torch.device("cuda" if NATIVE else "cpu")
KERNELS = pytest.mark.skipif(
    not (NATIVE or launch.INTERPRETED), reason="runs where Triton kernels do"
)


def deterministic(model_dir: Path, quantize: str) -> CudaDecoder:
    spec, mode = read_spec(model_dir), mode_of(model_dir, quantize, torch.device("cuda"))
    weights, form = load_weights(
        model_dir,
        spec,
        mode,
        DEVICE,
        lambda stage, share: None,
        gpu_kernels=True,
        fixed_tiles=True,
    )
    return CudaDecoder(
        spec, weights, dtype=mode.dtype, device=DEVICE, quantization=form, deterministic=True
    )


@pytest.mark.gpu
@KERNELS
@pytest.mark.parametrize("quantize", ["bfloat16", "nf4", "int8"])
def test_rows_are_bit_equal_alone_and_among_others_however_prompts_are_cut(
    quantize: str,
    llama_dir: Path,
    save_adapter: Callable[..., Path],
    stepper,
    random_ids,
) -> None:
    decoder = deterministic(llama_dir, quantize)
    decoder.reserve_adapters(2, 16)
    adapter = read_adapter(save_adapter(llama_dir), decoder.spec, "policy", 16)
    decoder.load_adapter(1, adapter)
    ids = {name: random_ids(6, seed=seed) for seed, name in enumerate("ab")}
    alone: dict[str, Tensor] = {}
    for name, slot in (("a", 1), ("b", -1)):
        runner = stepper(decoder)
        runner.adapters[name] = slot
        prompt = runner.step({name: ids[name][:5]})[name]
        alone[name] = torch.cat((prompt, runner.step({name: ids[name][5:]})[name]))
    runner = stepper(decoder)
    runner.adapters.update(a=1, b=-1, c=0)
    parts: dict[str, list[Tensor]] = {"a": [], "b": []}
    for chunks in (
        {"c": [7, 4], "a": ids["a"][:2], "b": ids["b"][:1]},
        {"a": ids["a"][2:3], "b": ids["b"][1:5], "c": [5]},
        {"c": [9], "b": ids["b"][5:], "a": ids["a"][3:]},
    ):
        for name, logits in runner.step(chunks).items():
            if name in parts:
                parts[name].append(logits)
    for name, expected in alone.items():
        assert torch.equal(torch.cat(parts[name]), expected), name


@pytest.mark.timeout(900)
@pytest.mark.skipif(launch.INTERPRETED, reason="this process interprets already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels natively")
@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_are_deterministic_in_the_interpreter() -> None:
    # Two at once: the interpreter takes one core.
    running = []
    for part in ("bit_equal and not bfloat16", "bit_equal and bfloat16"):
        command = [sys.executable, "-P", "-m", "pytest", __file__, "-q", "-x", "-k", part]
        command += ["-W", "ignore::RuntimeWarning", "-o", "timeout=600", "-p", "no:cacheprovider"]
        running.append(
            subprocess.Popen(
                command,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[3],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process, expected in zip(running, ("2 passed", "1 passed"), strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-6000:]
        assert expected in output, output[-500:]


def nothing(stage: str, share: float) -> None:
    """Progress that nobody looks at."""


def test_dense_weights_on_a_cpu_are_refused_by_name(llama_dir: Path) -> None:
    for quantize in ("float32", "nf4", "auto"):
        config = EngineConfig(str(llama_dir), quantize, device="cpu", deterministic=True)
        with pytest.raises(UnsupportedModel, match=r"engine\.deterministic.*--quantize int8"):
            load_best_decoder(config, nothing)
    packed = EngineConfig(
        str(llama_dir), "int4", device="cpu", deterministic=True, native_kernels=False
    )
    assert load_best_decoder(packed, nothing).quantization == "q4_1"


def test_a_gpu_without_the_kernels_is_refused_by_name(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "why_not_cuda_kernels", lambda *given: "compute_capability")
    config = EngineConfig(str(llama_dir), "nf4", device="cuda", deterministic=True)
    with pytest.raises(UnsupportedModel, match=r"engine\.deterministic.*compute_capability"):
        load_best_decoder(config, nothing)


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "reason"),
    [
        ({}, torch.bfloat16, (9, 0), None),
        ({}, torch.bfloat16, (7, 5), "compute_capability"),
        ({}, torch.float64, (9, 0), "dtype"),
        ({"head_dim": 512}, torch.bfloat16, (9, 0), "head_size"),
    ],
)
def test_why_a_gpu_computes_with_torch_is_named(
    changes: dict[str, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str | None,
    llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(read_spec(llama_dir), **changes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not_cuda_kernels(spec, torch.device("cuda"), dtype) == reason


def test_without_triton_a_gpu_computes_with_torch(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_decoder, "HAS_TRITON", False)
    spec = read_spec(llama_dir)
    assert why_not_cuda_kernels(spec, torch.device("cuda"), torch.bfloat16) == "no_triton"
