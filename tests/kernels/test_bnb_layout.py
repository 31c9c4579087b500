"""Our layout against bytes that bitsandbytes wrote (see make_bnb_golden.py; no need to have it)."""

import json
from pathlib import Path

import pytest
import torch
from heedful_kernels.bnb_layout import (
    Int8Weight,
    Nf4Weight,
    check_nf4,
    dequantize_int8_reference,
    dequantize_nf4_reference,
    nf4_absmax,
    nf4_from_checkpoint,
    quantize_int8,
    quantize_nf4,
)
from heedful_kernels.launch import RefusedInputError
from safetensors.torch import load_file

NAMES = ["whole", "tail", "odd", "many"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "data" / "bnb_golden.safetensors")


def nf4(golden: dict[str, torch.Tensor], prefix: str) -> Nf4Weight:
    start = f"{prefix}.weight."
    state = {key.removeprefix(start): golden[key] for key in golden if key.startswith(start)}
    return nf4_from_checkpoint(golden[f"{prefix}.weight"], state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "nested"])
def test_checkpoints_are_read_as_bitsandbytes_reads_them(
    golden: dict[str, torch.Tensor], name: str, form: str
) -> None:
    weight = nf4(golden, f"{name}.{form}")
    assert (weight.nested_absmax is not None) == (form == "nested")
    expected = golden[f"{name}.{form}.dequantized"]
    assert torch.equal(dequantize_nf4_reference(weight, expected.dtype), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "nested"])
def test_we_quantize_to_the_same_bytes(
    golden: dict[str, torch.Tensor], name: str, form: str
) -> None:
    theirs = nf4(golden, f"{name}.{form}")
    nested = form == "nested"
    ours = quantize_nf4(golden[f"{name}.original"], blocksize=theirs.blocksize, nested=nested)
    assert torch.equal(ours.packed, theirs.packed)
    torch.testing.assert_close(ours.absmax, theirs.absmax, rtol=0, atol=0)
    assert torch.equal(ours.code, theirs.code)
    if nested:
        assert ours.nested_code is not None
        assert theirs.nested_code is not None
        assert torch.equal(ours.nested_code, theirs.nested_code)
        torch.testing.assert_close(nf4_absmax(ours), nf4_absmax(theirs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_int8_rows_are_the_same_bytes(golden: dict[str, torch.Tensor], name: str) -> None:
    ours = quantize_int8(golden[f"{name}.original"].half())
    assert torch.equal(ours.data, golden[f"{name}.CB"])
    assert torch.equal(ours.scale, golden[f"{name}.SCB"].float())
    back = dequantize_int8_reference(ours, torch.float32)
    step = ours.scale[:, None] / 127
    # Half a step, and the fp16 in which bitsandbytes divides.
    assert ((back - golden[f"{name}.original"].float()).abs() <= 0.56 * step).all()


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(4, 64)
    for nested in (False, True):
        weight = quantize_nf4(zeros, nested=nested)
        assert torch.equal(dequantize_nf4_reference(weight, torch.float32), zeros)
    assert torch.equal(dequantize_int8_reference(quantize_int8(zeros), torch.float32), zeros)


def test_damaged_or_foreign_states_are_refused_by_name(golden: dict[str, torch.Tensor]) -> None:
    weight = nf4(golden, "whole.nested")
    start = "whole.nested.weight."
    state = {key.removeprefix(start): golden[key] for key in golden if key.startswith(start)}
    packed = golden["whole.nested.weight"]
    with pytest.raises(RefusedInputError, match="no quant_state"):
        nf4_from_checkpoint(packed, {"absmax": weight.absmax})
    with pytest.raises(RefusedInputError, match="bytes"):
        nf4_from_checkpoint(packed[:-1], state)
    with pytest.raises(RefusedInputError, match="need"):
        nf4_from_checkpoint(packed, {k: v for k, v in state.items() if k != "nested_absmax"})
    values = json.loads(bytes(state["quant_state.bitsandbytes__nf4"].tolist()))
    values["quant_type"] = "fp4"
    foreign = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    with pytest.raises(RefusedInputError, match="fp4"):
        nf4_from_checkpoint(packed, {**state, "quant_state.bitsandbytes__nf4": foreign})
    with pytest.raises(RefusedInputError, match="blocksize"):
        quantize_nf4(torch.zeros(2, 2), blocksize=48)
    with pytest.raises(RefusedInputError, match="absmax"):
        check_nf4(Nf4Weight(weight.packed, weight.absmax[:-1], weight.code, (48, 128), 64))


def test_moving_keeps_every_tensor() -> None:
    weight = quantize_nf4(torch.randn(8, 64))
    moved = weight.to(torch.device("meta"))
    assert moved.packed.device.type == moved.absmax.device.type == "meta"
    assert moved.num_bytes == weight.num_bytes
    assert Int8Weight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)).num_bytes == 14
