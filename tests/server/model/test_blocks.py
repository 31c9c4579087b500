"""Block formats mean what GGUF says they mean, and quantizing picks good blocks."""

import gguf
import numpy as np
import pytest
import torch
from heedful_server.model.blocks import (
    dequantize_blocks,
    q4_1_from_q4_0,
    quantize_blocks,
    unpack_q4_1,
)


def weights(n: int = 24, k: int = 128) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.03 + 0.01


def theirs(kind: gguf.GGMLQuantizationType, values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quantize(values.numpy().astype(np.float32), kind))


@pytest.mark.parametrize(
    ("kind", "code"),
    [("q4_1", gguf.GGMLQuantizationType.Q4_1), ("q8_0", gguf.GGMLQuantizationType.Q8_0)],
)
def test_blocks_expand_as_the_gguf_package_expands_them(kind, code) -> None:
    blocks = theirs(code, weights())
    expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), code))
    assert torch.equal(dequantize_blocks(kind, blocks), expected)


def test_q4_0_becomes_q4_1_without_loss() -> None:
    blocks = theirs(gguf.GGMLQuantizationType.Q4_0, weights())
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0)
    ours = dequantize_blocks("q4_1", q4_1_from_q4_0(blocks))
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-6, atol=1e-8)


def test_our_q8_0_blocks_are_as_good_as_half_a_step() -> None:
    values = weights()
    error = (dequantize_blocks("q8_0", quantize_blocks("q8_0", values)) - values).abs()
    step = values.view(24, -1, 32).abs().amax(-1) / 127
    # Half a step, and the rounding of the scale to fp16 times 127 steps.
    allowed = step * (0.5 + 127 * 2**-11)
    assert (error.view(24, -1, 32) <= allowed[..., None] * 1.001).all()


def test_our_q4_1_blocks_are_better_than_min_max() -> None:
    values = weights(64, 256)
    code = gguf.GGMLQuantizationType.Q4_1
    plain = torch.from_numpy(gguf.dequantize(theirs(code, values).numpy(), code))
    ours = dequantize_blocks("q4_1", quantize_blocks("q4_1", values))
    assert (ours - values).square().sum() < 0.9 * (plain - values).square().sum()


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_constant_and_zero_groups_survive(kind: str) -> None:
    values = torch.zeros(2, 64)
    values[1] = 0.25
    ours = dequantize_blocks(kind, quantize_blocks(kind, values))
    torch.testing.assert_close(ours, values, rtol=2**-10, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_beyond_fp16_are_refused(bad: float) -> None:
    values = weights()
    values[3, 5] = bad
    with pytest.raises(ValueError, match="not finite or too large"):
        quantize_blocks("q4_1", values)


def test_nibbles_come_out_in_order() -> None:
    values = torch.arange(16).repeat(2)[None].float()
    q, d, m = unpack_q4_1(quantize_blocks("q4_1", values))
    assert q[0].tolist() == values[0].int().tolist()
    assert (d.item(), m.item()) == (1.0, 0.0)
