"""Packed weights keep exactly the numbers of the GGUF blocks or floats that they came from."""

import pytest
import torch
from heedful_kernels.cpu import (
    Arena,
    pack_q4_1,
    pack_q8_0,
    packed_bytes,
    quantize_q4,
    quantize_q8,
    unpack,
)
from heedful_kernels.cpu.packing import unpack_parts


def random_blocks(n: int, k: int, block_bytes: int, num_halves: int) -> torch.Tensor:
    blocks = torch.randint(0, 256, (n * k // 32, block_bytes), dtype=torch.uint8)
    halves = torch.randn(n * k // 32, num_halves).half()
    blocks[:, : 2 * num_halves] = halves.view(torch.uint8)
    return blocks


@pytest.mark.parametrize(("n", "k"), [(1, 32), (16, 64), (37, 96), (48, 576)])
def test_q4_1_blocks_are_repacked_without_loss(n, k):
    blocks = random_blocks(n, k, 20, 2)
    scales = blocks[:, :4].contiguous().view(torch.float16).float()
    nibbles = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1).float()
    expected = (nibbles * scales[:, :1] + scales[:, 1:]).reshape(n, k)
    packed = pack_q4_1(blocks.flatten(), n, k)
    assert torch.equal(unpack(packed), expected)
    assert packed.num_bytes == packed_bytes("q4", n, k)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (16, 64), (37, 96), (48, 576)])
def test_q8_0_blocks_are_repacked_without_loss(n, k):
    blocks = random_blocks(n, k, 34, 1)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    expected = (blocks[:, 2:].contiguous().view(torch.int8).float() * d).reshape(n, k)
    assert torch.equal(unpack(pack_q8_0(blocks, n, k)), expected)


def test_quantize_q4_is_within_half_a_step_of_every_weight_it_did_not_clip():
    weight_NK = torch.randn(40, 128)
    packed = quantize_q4(weight_NK)
    q, d, _ = unpack_parts(packed)
    error = (unpack(packed) - weight_NK).abs().reshape(q.shape)
    inside = (q > 0) & (q < 15)
    # Half a step, and the rounding of the minimum to fp16 (2^-11 relative, |w| < 6 here).
    assert (error <= 0.5 * d[..., None] * 1.001 + 6 * 2**-11)[inside].all()
    plain_step = (weight_NK.reshape(q.shape).amax(-1) - weight_NK.reshape(q.shape).amin(-1)) / 15
    assert error.square().mean() < plain_step.square().mean() / 12


def test_quantize_q8_is_within_half_a_step():
    weight_NK = torch.randn(40, 96)
    q, d, _ = unpack_parts(quantize_q8(weight_NK))
    error = (unpack(quantize_q8(weight_NK)) - weight_NK).abs().reshape(q.shape)
    assert (error <= 0.5 * d[..., None] + weight_NK.abs().max() * 2**-11).all()


def test_groups_of_equal_weights_survive_quantization():
    weight_NK = torch.zeros(16, 64)
    weight_NK[3] = 0.5
    assert torch.equal(unpack(quantize_q4(weight_NK)), weight_NK)
    assert torch.allclose(unpack(quantize_q8(weight_NK)), weight_NK, rtol=2**-10, atol=0)


def test_an_arena_holds_several_weights_side_by_side():
    blocks = random_blocks(20, 64, 20, 2)
    arena = Arena(2 * packed_bytes("q4", 20, 64) + 64)
    first = pack_q4_1(blocks, 20, 64, arena=arena)
    second = pack_q4_1(blocks.flip(0), 20, 64, arena=arena)
    alone = unpack(pack_q4_1(blocks, 20, 64))
    del arena
    assert torch.equal(unpack(first), alone)
    assert first.data.data_ptr() % 64 == 0
    assert second.data.data_ptr() % 64 == 0


def test_a_full_arena_says_so():
    with pytest.raises(ValueError, match="arena is full"):
        Arena(1).take(4 << 20)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_q4(torch.zeros(16, 40))
    with pytest.raises(ValueError, match="uint8"):
        pack_q4_1(torch.zeros(19, dtype=torch.uint8), 1, 32)
    with pytest.raises(ValueError, match="not finite"):
        quantize_q8(torch.full((16, 32), float("inf")))
