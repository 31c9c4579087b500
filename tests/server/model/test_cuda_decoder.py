"""The GPU's decoder against `TorchDecoder`: its operations' torch references here, its kernels in
Triton's interpreter in a process of their own (or on a GPU).
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_kernels import launch
from heedful_kernels.sample import OK
from heedful_server.model.adapter import read_adapter
from heedful_server.model.batch import Draws, ForwardBatch
from heedful_server.model.cuda_decoder import CudaDecoder
from heedful_server.model.cuda_draws import draw, empty_settings, read_drawn
from heedful_server.model.cuda_linear import Nf4Linear
from heedful_server.model.cuda_step import (
    ROW_BUCKETS,
    empty_step,
    fill_step,
    is_plain_decode,
    make_step,
    step_size,
)
from heedful_server.model.decoder import TorchDecoder
from heedful_server.model.families import read_spec
from heedful_server.model.loader import load_weights
from heedful_server.model.weight_modes import mode_of, resolve_mode
from torch import Tensor

CPU = torch.device("cpu")
# Both sum in fp32, in other orders; logits are of the size of ten.
TOLERANCE = 1e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_cuda(
    model_dir: Path, quantize: str = "float32", device: torch.device = CPU
) -> CudaDecoder:
    """The decoder as a GPU would get it, on a device."""
    spec, mode = read_spec(model_dir), mode_of(model_dir, quantize, torch.device("cuda"))
    weights, form = load_weights(
        model_dir, spec, mode, device, lambda stage, share: None, gpu_kernels=True
    )
    return CudaDecoder(spec, weights, dtype=mode.dtype, device=device, quantization=form)


def conversation(runner: Any, random_ids: Callable[..., list[int]]) -> dict[str, Tensor]:
    """Prompts in chunks beside decodes: the logits of every position, by sequence."""
    a, b = random_ids(12, seed=0), random_ids(15, seed=1)
    parts: dict[str, list[Tensor]] = {"a": [], "b": []}
    for chunks in (
        {"a": a[:5]},
        {"b": b[:9], "a": a[5:6]},
        {"a": a[6:10], "b": b[9:10]},
        {"b": b[10:11], "a": a[10:11]},
        {"a": a[11:12], "b": b[11:15]},
    ):
        for name, logits in runner.step(chunks).items():
            parts[name].append(logits)
    return {name: torch.cat(logits) for name, logits in parts.items()}


def test_every_family_computes_what_the_torch_decoder_does(
    family_dir: Path, load, stepper, random_ids
) -> None:
    ours = stepper(load_cuda(family_dir))
    theirs = stepper(load(family_dir))
    expected = conversation(theirs, random_ids)
    for name, logits in conversation(ours, random_ids).items():
        assert expected[name].std() > 0.5, "flat logits would hide differences"
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours.hidden[name], theirs.hidden[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3", [LINEARS, ["q_proj", "v_proj", "up_proj"]]),
        ("gpt-neox-parallel", [["query_key_value", "dense_h_to_4h"], ["dense", "dense_4h_to_h"]]),
    ],
)
def test_adapters_of_several_sequences_in_one_step(
    family: str,
    targets: list[list[str]],
    save_checkpoint: Callable[..., Path],
    save_adapter: Callable[..., Path],
    load,
    stepper,
    random_ids,
) -> None:
    family_dir = save_checkpoint(family)
    directories = [
        save_adapter(family_dir, target_modules=targets[0]),
        save_adapter(family_dir, target_modules=targets[1], r=3, seed=9),
    ]
    logits: list[dict[str, Tensor]] = []
    for decoder in (load_cuda(family_dir), load(family_dir)):
        decoder.reserve_adapters(3, 16)
        for slot, directory in enumerate(directories):
            decoder.load_adapter(slot, read_adapter(directory, decoder.spec, "policy", 16))
        runner = stepper(decoder)
        runner.adapters.update(a=1, b=0)
        logits.append(conversation(runner, random_ids))
    for name in ("a", "b"):
        torch.testing.assert_close(logits[0][name], logits[1][name], rtol=0, atol=TOLERANCE)
    base = conversation(stepper(load(family_dir)), random_ids)
    assert (base["a"] - logits[0]["a"]).abs().max() > 0.01
    assert (base["b"] - logits[0]["b"]).abs().max() > 0.1


def test_a_dropped_adapter_adds_nothing(
    llama_dir: Path, save_adapter: Callable[..., Path], stepper, random_ids
) -> None:
    decoder = load_cuda(llama_dir)
    decoder.reserve_adapters(1, 16)
    adapter = read_adapter(save_adapter(llama_dir), decoder.spec, "policy", 16)
    assert decoder.load_adapter(0, adapter) > 0
    decoder.drop_adapter(0)
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    ids = random_ids(6, seed=4)
    assert torch.equal(runner.step({"a": ids})["a"], stepper(decoder).step({"a": ids})["a"])


def test_nf4_weights_stay_packed_and_compute_the_served_values(
    llama_dir: Path, load, stepper, random_ids
) -> None:
    before = launch.fallback_counts().get("nf4_matmul:expanded", 0)
    ours = load_cuda(llama_dir, "nf4")
    theirs = load(llama_dir, "nf4")
    assert ours.quantization == "nf4"
    layer = ours._weights.layers[0]
    assert isinstance(layer.qkv, Nf4Linear)
    # The down projection's rows of 96 are no whole groups of 64: they stay dense.
    assert not isinstance(layer.mlp_out, Nf4Linear)
    assert ours.fallbacks["nf4_matmul:expanded"] == before + ours.spec.num_layers
    assert ours.weight_bytes < theirs.weight_bytes
    ids = random_ids(15, seed=0)
    exact = stepper(theirs).step({"a": ids})["a"]
    error = (stepper(ours).step({"a": ids})["a"] - exact).abs()
    # Both round activations to bf16 at every linear, in other places.
    assert error.mean() < 0.03 * exact.std()


def decode_batch(rows: int, **changes: Any) -> ForwardBatch:
    batch = ForwardBatch(
        token_ids_T=torch.arange(rows) + 3,
        positions_T=torch.arange(rows) * 2,
        slot_mapping_T=torch.arange(rows) * 4 + torch.arange(rows) * 2 % 4,
        block_tables_SN=torch.arange(rows * 9, dtype=torch.int32).view(rows, 9) % 60,
        query_starts=tuple(range(rows + 1)),
        context_lens=tuple(2 * row + 1 for row in range(rows)),
        logit_rows_R=torch.arange(rows),
    )
    return replace(batch, **changes)


def some_draws(rows: int) -> Draws:
    """Greedy, plain and truncated rows in turns."""
    settings = empty_settings(rows, CPU)
    settings.keys_R2.random_(generator=torch.Generator().manual_seed(5))
    settings.temperature_R.copy_((torch.arange(rows) % 3 > 0).float())
    settings.top_p_R.copy_(torch.where(torch.arange(rows) % 3 == 2, 0.7, 1.0))
    return Draws(settings)


def test_only_steps_of_single_tokens_are_replayed() -> None:
    assert is_plain_decode(decode_batch(3))
    assert not is_plain_decode(decode_batch(3, hidden_rows=(1,)))
    assert not is_plain_decode(decode_batch(3, logit_rows_R=torch.tensor([0, 2])))
    assert not is_plain_decode(decode_batch(3, logit_rows_R=torch.tensor([2, 1, 0])))
    assert not is_plain_decode(decode_batch(2, query_starts=(0, 1, 3)))
    assert not is_plain_decode(decode_batch(ROW_BUCKETS[-1] + 1))


def test_sizes_of_replayed_steps_are_few_and_large_enough() -> None:
    sizes = {step_size(decode_batch(rows), 131_072) for rows in range(1, 129)}
    assert len(sizes) == len(ROW_BUCKETS)
    size = step_size(decode_batch(3, context_lens=(5, 70_000, 2)), 100_000)
    assert (size.rows, size.context_tokens, size.adapters) == (4, 100_000, False)
    assert not size.draws
    assert step_size(decode_batch(3, draws=some_draws(3)), 4096).draws
    assert not step_size(
        decode_batch(3, draws=Draws(some_draws(3).settings, torch.tensor([0, 0, 1]))), 4096
    ).draws
    assert step_size(decode_batch(3, context_lens=(5, 4096, 2)), 100_000).context_tokens == 4096


def test_a_padded_step_is_the_step_and_writes_nowhere_else(
    llama_dir: Path, save_adapter: Callable[..., Path]
) -> None:
    decoder = load_cuda(llama_dir)
    decoder.reserve_adapters(2, 16)
    adapter = read_adapter(save_adapter(llama_dir), decoder.spec, "policy", 16)
    decoder.load_adapter(1, adapter)
    cache = decoder.allocate_kv_cache(60, 4)
    cache.data.normal_(generator=torch.Generator().manual_seed(1))
    plain, padded = cache.data.clone(), cache.data.clone()
    batch = decode_batch(5, adapter_slots=(1, -1, 1, 0, -1), draws=some_draws(5))
    cache.data.copy_(plain)
    with torch.inference_mode():
        expected = decoder._compute(make_step(batch, CPU), cache)
        plain.copy_(cache.data)
        step = empty_step(step_size(batch, 128), 4, CPU)
        assert len(step.token_ids_T) == 8
        # A fuller step went before: nothing of it may be left.
        fill_step(step, decode_batch(8, adapter_slots=(1,) * 8, draws=some_draws(8)))
        fill_step(step, batch)
        cache.data.copy_(padded)
        result = decoder._compute(step, cache)
    torch.testing.assert_close(result.logits_RV[:5], expected.logits_RV, rtol=0, atol=1e-5)
    torch.testing.assert_close(cache.data, plain, rtol=0, atol=1e-5)
    assert batch.draws is not None
    drawn = read_drawn(draw(expected.logits_RV, batch.draws, fixed_splits=False))
    assert result.drawn_6D is not None
    assert read_drawn(result.drawn_6D[:, :5]).token_ids == drawn.token_ids
    assert (result.drawn_6D[4] == OK).all(), "padding is drawn too, and nothing is wrong with it"
    assert result.logits_RV.isfinite().all()


@pytest.mark.timeout(400)
@pytest.mark.skipif(launch.INTERPRETED, reason="this process interprets already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels natively")
@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_themselves_compute_it_in_the_interpreter() -> None:
    chosen = "(every_family and gqa) or nf4 or padded"
    command = [sys.executable, "-P", "-m", "pytest", __file__, "-q", "-x", "-k", chosen]
    command += ["-W", "ignore::RuntimeWarning", "-o", "timeout=600"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout, done.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("quantize", ["float32", "bfloat16", "nf4", "int8"])
def test_a_gpu_computes_what_the_references_do(
    quantize: str, llama_dir: Path, save_adapter: Callable[..., Path], stepper, random_ids
) -> None:
    adapter_dir = save_adapter(llama_dir)
    logits = []
    for device in (torch.device("cuda"), CPU):
        decoder = load_cuda(llama_dir, quantize, device)
        decoder.reserve_adapters(2, 16)
        decoder.load_adapter(1, read_adapter(adapter_dir, decoder.spec, "policy", 16))
        runner = stepper(decoder)
        runner.adapters.update(a=1, b=-1)
        logits.append(conversation(runner, random_ids))
    for name, expected in logits[1].items():
        error = (logits[0][name].cpu() - expected).abs()
        assert error.mean() < (1e-4 if quantize == "float32" else 0.03 * expected.std())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_replays_equal_eager_steps_on_a_gpu(llama_dir: Path) -> None:
    device = torch.device("cuda")
    spec = read_spec(llama_dir)
    mode = resolve_mode("bfloat16", is_gguf=False, device=device)
    weights, form = load_weights(llama_dir, spec, mode, device, lambda stage, share: None)
    results, drawn = [], []
    for graphs in (False, True):
        decoder = CudaDecoder(
            spec, weights, dtype=mode.dtype, device=device, quantization=form, graphs=graphs
        )
        cache = decoder.allocate_kv_cache(60, 4)
        for _ in range(2):
            result = decoder.forward(decode_batch(5, draws=some_draws(5)), cache)
        results.append(result.logits_RV.clone())
        assert result.drawn_6D is not None
        drawn.append(read_drawn(result.drawn_6D).token_ids)
    assert drawn[0] == drawn[1]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0.05)


def test_torch_decoder_is_what_a_cpu_gets(load, llama_dir: Path) -> None:
    assert isinstance(load(llama_dir), TorchDecoder)
