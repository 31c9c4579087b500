"""Weights in GGUF's block formats: what the bytes mean, and how float weights become them.

Owns Q4_1 and Q8_0, the two formats that are kept packed, and Q4_0, which Q4_1 holds without loss. A
row of K weights is K / 32 blocks one after another; a Q4_1 block is fp16 scale d, fp16 minimum m
and 32 nibbles q (w = d q + m), a Q8_0 block is fp16 d and 32 int8 q (w = d q). Pure functions over
tensors; knows no files and no kernels. Runs while loading.
"""

from typing import Final, Literal

import torch
from torch import Tensor

BlockKind = Literal["q4_1", "q8_0"]

GROUP: Final = 32
BLOCK_BYTES: Final[dict[BlockKind, int]] = {"q4_1": 20, "q8_0": 34}
Q4_0_BYTES: Final = 18
_FP16_MAX: Final = 65504.0
_REFITS: Final = 3


def block_row_bytes(kind: BlockKind, k: int) -> int:
    """Bytes of one row of k weights, k a multiple of 32."""
    return k // GROUP * BLOCK_BYTES[kind]


def unpack_q4_1(blocks_NB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nibbles uint8 [N, K] in 0..15, scales and minima fp32 [N, K / 32]."""
    n = blocks_NB.shape[0]
    blocks = blocks_NB.view(n, -1, BLOCK_BYTES["q4_1"])
    d_and_m = blocks[..., :4].contiguous().view(torch.float16).float()
    packed = blocks[..., 4:]
    q = torch.empty(n, packed.shape[1], GROUP, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=q[..., :16])
    torch.bitwise_right_shift(packed, 4, out=q[..., 16:])
    return q.view(n, -1), d_and_m[..., 0], d_and_m[..., 1]


def unpack_q8_0(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Weights int8 [N, K] and scales fp32 [N, K / 32]."""
    n = blocks_NB.shape[0]
    blocks = blocks_NB.view(n, -1, BLOCK_BYTES["q8_0"])
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    return blocks[..., 2:].contiguous().view(torch.int8).reshape(n, -1), d[..., 0]


def dequantize_blocks(kind: BlockKind, blocks_NB: Tensor) -> Tensor:
    """The weights fp32 [N, K] that blocks uint8 [N, bytes] stand for."""
    n = blocks_NB.shape[0]
    if kind == "q4_1":
        q, d, m = unpack_q4_1(blocks_NB)
        return (q.view(n, -1, GROUP) * d[..., None] + m[..., None]).view(n, -1)
    q, d = unpack_q8_0(blocks_NB)
    return (q.view(n, -1, GROUP) * d[..., None]).view(n, -1)


def q4_1_from_q4_0(blocks_NB: Tensor) -> Tensor:
    """Q4_1 blocks with the weights of Q4_0 blocks (d (q - 8)): the minimum is -8 d.

    Raises:
        ValueError: -8 d is no fp16 number, which a scale of sane weights never causes.
    """
    n = blocks_NB.shape[0]
    blocks = blocks_NB.view(n, -1, Q4_0_BYTES)
    d = blocks[..., :2].contiguous().view(torch.float16)
    m = -8 * d
    if not torch.isfinite(m).all():
        raise ValueError("a Q4_0 scale is too large for Q4_1")
    return torch.cat((blocks[..., :2], m.view(torch.uint8), blocks[..., 2:]), dim=-1).view(n, -1)


def quantize_blocks(kind: BlockKind, weight_NK: Tensor) -> Tensor:
    """Blocks uint8 [N, bytes] that approximate float weights; K must be a multiple of 32.

    Raises:
        ValueError: a weight is not finite, or beyond what fp16 scales hold.
    """
    groups = weight_NK.float().view(weight_NK.shape[0], -1, GROUP)
    if not torch.isfinite(groups).all() or groups.abs().max() > _FP16_MAX:
        raise ValueError("weights are not finite or too large to quantize")
    return _quantize_q4_1(groups) if kind == "q4_1" else _quantize_q8_0(groups)


def _quantize_q8_0(groups: Tensor) -> Tensor:
    d = (groups.abs().amax(-1, keepdim=True) / 127).half()
    q = (groups * _reciprocal(d.float())).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((d.view(torch.uint8), q.view(torch.uint8)), dim=-1).flatten(1)


def _quantize_q4_1(groups: Tensor) -> Tensor:
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    d, m = ((high - low) / 15).half(), low.half()
    q, error = _round_to_nibbles(groups, d, m)
    for _ in range(_REFITS):
        # Alternate: the best scale and minimum for these nibbles, then the best nibbles for those.
        new_d, new_m = _least_squares(groups, q)
        new_q, new_error = _round_to_nibbles(groups, new_d, new_m)
        better = new_error < error
        d, m, q = (
            torch.where(better, new, old) for new, old in ((new_d, d), (new_m, m), (new_q, q))
        )
        error = torch.minimum(error, new_error)
    nibbles = q.to(torch.uint8)
    packed = nibbles[..., :16] | nibbles[..., 16:] << 4
    return torch.cat((d.view(torch.uint8), m.view(torch.uint8), packed), dim=-1).flatten(1)


def _round_to_nibbles(groups: Tensor, d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    d, m = d.float(), m.float()
    q = ((groups - m) * _reciprocal(d)).round().clamp(0, 15)
    return q, (q * d + m - groups).square().sum(-1, keepdim=True)


def _least_squares(groups: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    centred = q - q.mean(-1, keepdim=True)
    spread = centred.square().sum(-1, keepdim=True)
    d = (centred * groups).sum(-1, keepdim=True) * _reciprocal(spread)
    m = groups.mean(-1, keepdim=True) - d * q.mean(-1, keepdim=True)
    return d.half(), m.half()


def _reciprocal(x: Tensor) -> Tensor:
    # A group of equal weights has scale 0; its nibbles do not matter then.
    return torch.where(x == 0, 0.0, 1 / x)
