"""Checkpoints that bitsandbytes has quantized: their packed weights are served as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_kernels.bnb_layout import (
    dequantize_int8_reference,
    dequantize_nf4_reference,
    nf4_from_checkpoint,
    quantize_int8,
    quantize_nf4,
)
from heedful_server.model.cuda_decoder import CudaDecoder
from heedful_server.model.cuda_linear import Int8Linear, Nf4Linear
from heedful_server.model.decoder import TorchDecoder
from heedful_server.model.dequantize import dequantized_state_dict
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.families import read_spec
from heedful_server.model.load import load_best_decoder
from heedful_server.model.loader import load_weights
from heedful_server.model.weight_modes import mode_of, resolve_mode
from heedful_server.protocol import EngineConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_4bit": False, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
}
Tensors = dict[str, Tensor]


def pack_nf4(name: str, weight: Tensor, nested: bool) -> tuple[Tensors, Tensor]:
    """The tensors that bitsandbytes writes for a weight, from our quantizer; and the values."""
    packed = quantize_nf4(weight.bfloat16(), blocksize=64, nested=nested)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    tensors = {
        name: packed.packed[:, None].contiguous(),
        f"{name}.absmax": packed.absmax,
        f"{name}.quant_map": packed.code,
    }
    if nested:
        assert packed.nested_absmax is not None
        assert packed.nested_code is not None
        assert packed.nested_offset is not None
        state |= {"nested_blocksize": 256, "nested_offset": float(packed.nested_offset)}
        tensors |= {
            f"{name}.nested_absmax": packed.nested_absmax,
            f"{name}.nested_quant_map": packed.nested_code,
        }
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, dequantize_nf4_reference(packed, torch.float32)


def pack_nf4_by_bitsandbytes(name: str, weight: Tensor, nested: bool) -> tuple[Tensors, Tensor]:
    """The same by bitsandbytes itself."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    beside = {key: value.clone() for key, value in state.as_dict(packed=True).items()}
    tensors = {name: packed} | {f"{name}.{key}": value for key, value in beside.items()}
    if weight.shape[1] % 64:
        # On a CPU bitsandbytes 0.50.2 gives other values than were packed for such rows.
        read = nf4_from_checkpoint(packed, beside)
        return tensors, dequantize_nf4_reference(read, torch.float32)
    return tensors, functional.dequantize_4bit(packed, state).float()


def pack_int8(name: str, weight: Tensor, nested: bool) -> tuple[Tensors, Tensor]:
    packed = quantize_int8(weight.half())
    stem = name.removesuffix(".weight")
    tensors = {
        name: packed.data,
        f"{stem}.SCB": packed.scale,
        f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, dequantize_int8_reference(packed, torch.float32)


def write(source: Path, target: Path, form: str, pack: Callable[..., Any], nested: bool) -> Tensors:
    """Quantize all linears of a checkpoint but the head; return all its values."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"} | CONFIGS[form]
    (target / "config.json").write_text(json.dumps(config))
    tensors: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        values[name] = tensor
        tensors[name] = tensor
        is_linear = ".layers." in name and tensor.ndim == 2
        if is_linear:
            del tensors[name]
            packed, values[name] = pack(name, tensor, nested)
            tensors |= packed
    save_file(tensors, target / "model.safetensors")
    return values


FORMS = [
    pytest.param("nf4", pack_nf4, False, id="nf4"),
    pytest.param("nf4", pack_nf4, True, id="nf4-nested"),
    pytest.param("nf4", pack_nf4_by_bitsandbytes, True, id="nf4-nested-bitsandbytes"),
    pytest.param("int8", pack_int8, False, id="int8"),
]


def load_cuda(model_dir: Path, quantize: str = "auto") -> CudaDecoder:
    """The decoder as a GPU would get it, on this CPU."""
    spec, mode = read_spec(model_dir), mode_of(model_dir, quantize, CUDA)
    weights, form = load_weights(
        model_dir, spec, mode, CPU, lambda stage, share: None, gpu_kernels=True
    )
    return CudaDecoder(spec, weights, dtype=mode.dtype, device=CPU, quantization=form)


@pytest.mark.parametrize(("form", "pack", "nested"), FORMS)
@pytest.mark.parametrize("family", ["llama-gqa-tied-llama3-rope", "gpt-neox-parallel", "qwen2"])
def test_packed_weights_are_served_as_they_are(
    family: str,
    form: str,
    pack: Callable[..., Any],
    nested: bool,
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    load,
    stepper,
    random_ids,
) -> None:
    model_dir = tmp_path / "packed"
    values = write(save_checkpoint(family), model_dir, form, pack, nested)
    save_file(values, tmp_path / "values.safetensors")
    ours = load_cuda(model_dir)
    assert ours.quantization == form
    layer = ours._weights.layers[1]
    assert isinstance(layer.qkv, Nf4Linear if form == "nf4" else Int8Linear)
    # Blocks of 64 straddle the down projection's rows of 96; int8 has no blocks.
    assert isinstance(layer.mlp_out, Int8Linear) == (form == "int8")
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "values.safetensors", plain / "model.safetensors")
    ids = random_ids(15, seed=0)
    exact = stepper(load(plain, "float32")).step({"a": ids})["a"]
    error = (stepper(ours).step({"a": ids})["a"] - exact).abs()
    # Activations are rounded to bf16 at every linear, and dense weights once.
    assert error.mean() < 0.05 * exact.std()
    on_cpu = load(model_dir, "auto")
    assert isinstance(on_cpu, TorchDecoder)
    assert on_cpu.quantization == f"{form}-bf16"
    assert ours.weight_bytes < on_cpu.weight_bytes
    exactly = stepper(load(model_dir, "float32")).step({"a": ids})["a"]
    # bitsandbytes' own values are rounded to bf16.
    assert (exactly - exact).abs().mean() < 0.01 * exact.std()


def test_tools_get_the_values_of_a_packed_checkpoint(llama_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "packed"
    values = write(llama_dir, model_dir, "int8", pack_int8, False)
    served = dequantized_state_dict(model_dir, "auto")
    for name, value in values.items():
        if "norm" not in name:
            assert torch.equal(served[name], value.bfloat16().float()), name


def test_quantizing_twice_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "packed"
    write(llama_dir, model_dir, "nf4", pack_nf4, False)
    for quantize in ("int8", "int4"):
        with pytest.raises(UnsupportedModel, match="quantized to nf4 already"):
            load_best_decoder(
                EngineConfig(str(model_dir), quantize, device="cpu"), lambda stage, share: None
            )


def test_damaged_states_are_named(llama_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "packed"
    write(llama_dir, model_dir, "nf4", pack_nf4, True)
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"

    def load_with(changed: Tensors, *dropped: str) -> None:
        kept = {key: value for key, value in (tensors | changed).items() if key not in dropped}
        save_file(kept, model_dir / "model.safetensors")
        load_cuda(model_dir)

    with pytest.raises(BadCheckpoint, match=r"up_proj.*nested_absmax"):
        load_with({}, f"{name}.nested_absmax")
    with pytest.raises(BadCheckpoint, match=r"up_proj.*absmax"):
        load_with({f"{name}.absmax": tensors[f"{name}.absmax"][1:]})
    with pytest.raises(BadCheckpoint, match=r"up_proj"):
        load_with({f"{name}.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)})
    query = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    other = tensors[query].clone()
    with pytest.raises(BadCheckpoint, match=r"up_proj"):
        load_with({f"{name}.quant_state.bitsandbytes__nf4": other})


def test_int8_scales_that_do_not_fit_are_named(llama_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "packed"
    write(llama_dir, model_dir, "int8", pack_int8, False)
    tensors = load_file(model_dir / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    save_file(tensors | {f"{stem}.SCB": torch.ones(5)}, model_dir / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="up_proj"):
        load_cuda(model_dir)
    column_wise = torch.tensor(2, dtype=torch.uint8)
    save_file(tensors | {f"{stem}.weight_format": column_wise}, model_dir / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="by rows"):
        load_cuda(model_dir)


def test_int8_of_a_float_checkpoint_stays_packed_on_a_gpu(
    llama_dir: Path, load, stepper, random_ids
) -> None:
    mode = resolve_mode("int8", is_gguf=False, device=CUDA)
    assert mode.layers == "int8"
    ours = load_cuda(llama_dir, "int8")
    assert ours.quantization == "int8"
    layers = ours._weights.layers
    assert all(isinstance(layer.mlp_out, Int8Linear) for layer in layers)
    ids = random_ids(15, seed=0)
    exact = stepper(load(llama_dir)).step({"a": ids})["a"]
    error = (stepper(ours).step({"a": ids})["a"] - exact).abs()
    assert error.mean() < 0.05 * exact.std()
    # Where the kernels are not used the same rounding is served dense.
    spec = read_spec(llama_dir)
    weights, form = load_weights(llama_dir, spec, mode, CPU, lambda stage, share: None)
    assert form == "int8-bf16"
    assert not isinstance(weights.layers[0].qkv, Int8Linear)
