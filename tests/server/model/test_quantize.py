"""What each value of `quantize` serves, from float checkpoints."""

import sys
from pathlib import Path

import pytest
import torch
from heedful_kernels.bnb_layout import dequantize_nf4_reference, quantize_nf4
from heedful_server.model.dequantize import dequantized_state_dict
from heedful_server.model.weight_modes import resolve_mode, served_weights
from safetensors.torch import load_file

CPU = torch.device("cpu")
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("quantize", "name"),
    [
        ("float64", "fp64"),
        ("float32", "fp32"),
        ("bfloat16", "bf16"),
        ("int8", "q8_0"),
        ("int4", "q4_1"),
    ],
)
def test_quantization_is_named(quantize: str, name: str, llama_dir: Path, load) -> None:
    decoder = load(llama_dir, quantize)
    assert decoder.quantization == name
    assert decoder.kernel_path == "torch"


def test_weights_shrink_with_their_form(llama_dir: Path, load) -> None:
    sizes = [load(llama_dir, q).weight_bytes for q in ("float64", "float32", "bfloat16")]
    assert sizes[0] > 1.9 * sizes[1]
    assert sizes[1] > 1.9 * sizes[2]
    assert sizes[2] > load(llama_dir, "int4").weight_bytes


@pytest.mark.parametrize(
    ("quantize", "allowed"), [("int8", 0.03), ("int4", 0.3), ("bfloat16", 0.03)]
)
def test_quantized_logits_stay_near_the_float_ones(
    quantize: str, allowed: float, llama_dir: Path, load, stepper, random_ids
) -> None:
    ids = random_ids(30, seed=0)
    exact = stepper(load(llama_dir)).step({"a": ids})["a"]
    ours = stepper(load(llama_dir, quantize)).step({"a": ids})["a"]
    assert (ours - exact).std() < allowed * exact.std()


def test_every_family_runs_quantized(family_dir: Path, load, stepper, random_ids) -> None:
    ids = random_ids(12, seed=0)
    exact = stepper(load(family_dir)).step({"a": ids})["a"]
    for quantize in ("int8", "int4", "bfloat16"):
        ours = stepper(load(family_dir, quantize)).step({"a": ids})["a"]
        assert ours.dtype == torch.float32
        assert (ours - exact).std() < 0.5 * exact.std()


def test_state_dict_holds_the_served_weights_not_the_stored_ones(llama_dir: Path) -> None:
    stored = load_file(llama_dir / "model.safetensors")
    served = dequantized_state_dict(llama_dir, "int4")
    assert served.keys() == stored.keys()
    error = (served[UP_PROJ] - stored[UP_PROJ]).abs()
    assert error.max() > 0
    # Between the steps of a 4-bit grid over a group's range, half of one is the most.
    groups = stored[UP_PROJ].view(96, -1, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert (error.view(96, -1, 32).amax(-1) < step).all()
    norm = "model.norm.weight"
    assert torch.equal(served[norm], stored[norm])


def test_rows_that_are_no_multiple_of_32_stay_float(
    save_checkpoint, load, stepper, random_ids
) -> None:
    odd = save_checkpoint("qwen2", hidden_size=80, num_attention_heads=4, head_dim=20)
    decoder = load(odd, "int4")
    ids = random_ids(8, seed=0)
    exact = stepper(load(odd)).step({"a": ids})["a"]
    assert (stepper(decoder).step({"a": ids})["a"] - exact).std() < 0.5 * exact.std()


def test_auto_keeps_blocks_of_a_gguf_and_floats_of_a_checkpoint() -> None:
    assert resolve_mode("auto", is_gguf=True, device=CPU).keep_blocks
    mode = resolve_mode("auto", is_gguf=False, device=CPU)
    assert mode.layers == mode.tables == "dense"
    assert mode.dtype in (torch.bfloat16, torch.float32)


def test_packed_forms_expand_on_other_devices() -> None:
    for quantize, is_gguf in (("int4", False), ("int8", True), ("auto", True)):
        assert resolve_mode(quantize, is_gguf=is_gguf, device=torch.device("cuda")).expanded
    assert not resolve_mode("int8", is_gguf=False, device=torch.device("cuda")).expanded
    mode = resolve_mode("auto", is_gguf=True, device=torch.device("cuda"))
    assert (mode.dtype, mode.keep_blocks, mode.layers) == (torch.bfloat16, False, "dense")


def test_nf4_needs_no_bitsandbytes_and_serves_its_values(
    llama_dir: Path, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    decoder = load(llama_dir, "nf4")
    assert decoder.quantization == "nf4-bf16"
    spec = decoder.spec
    mode = resolve_mode("nf4", is_gguf=False, device=CPU)
    dense = resolve_mode("bfloat16", is_gguf=False, device=CPU)
    for served, stored in zip(
        served_weights(llama_dir, spec, mode), served_weights(llama_dir, spec, dense), strict=True
    ):
        if served.name == "layers.0.down":
            packed = quantize_nf4(stored.data, blocksize=64, nested=False)
            assert torch.equal(served.data, dequantize_nf4_reference(packed, torch.bfloat16))
            assert not torch.equal(served.data, stored.data)
