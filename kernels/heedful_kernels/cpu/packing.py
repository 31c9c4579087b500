"""Packed weights of the native CPU kernels: from GGUF blocks or float weights, and back to fp32.

Owns the byte layout that `src/linear.inc.h` reads. Knows nothing of models, threads or ops. Plain
torch, used at load time by whichever process builds a program.

Layout. Output rows go in tiles of 16, inputs in groups of 32, 4 inputs of one row make a dword, and
the 16 dwords of a tile's rows stand side by side. One tile of q4 and one group take 320 bytes:
four 64-byte lines of nibbles (line j holds inputs 4j..4j+3 in the low nibbles, 16+4j..16+4j+3 in
the high ones), 16 fp16 scales, 16 fp16 minima. One tile of q8 and *two* groups take 1088 bytes:
8 + 8 lines of int8 + 128, then 2 x 16 fp16 scales; an odd last group is followed by one of zeros.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 16
GROUP = 32
Q4_TILE_BYTES = 320
Q8_PAIR_BYTES = 1088
Q4_1_BLOCK_BYTES = 20
Q8_0_BLOCK_BYTES = 34
_HUGE_PAGE_BYTES = 2 << 20
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class PackedWeight:
    """A linear's weight [n, k] as the kernels read it; `data` is uint8, 64-byte aligned."""

    kind: Literal["q4", "q8"]
    n: int
    k: int
    data: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return self.data.numel()


class Arena:
    """One allocation on huge pages that packed weights are cut from, front to back.

    Streaming 100 MB of weights in 4 KiB pages costs a tenth of the bandwidth in page walks.
    Views keep the memory alive, the arena itself may be dropped.
    """

    def __init__(self, num_bytes: int) -> None:
        rounded = -(-max(num_bytes, 1) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        # Private: by default Python maps shared memory, which gets no huge pages.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapping = mmap.mmap(-1, rounded + _HUGE_PAGE_BYTES, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        offset = -start % _HUGE_PAGE_BYTES
        self._memory = torch.frombuffer(mapping, dtype=torch.uint8)[offset : offset + rounded]
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """The next `num_bytes` as a zeroed, 64-byte aligned uint8 tensor; ValueError when full."""
        start = -(-self._used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if start + num_bytes > self._memory.numel():
            raise ValueError(f"arena is full: {num_bytes} bytes wanted at {start}")
        self._used = start + num_bytes
        return self._memory[start : start + num_bytes]


def packed_bytes(kind: Literal["q4", "q8"], n: int, k: int) -> int:
    """Bytes of a packed [n, k] weight; ValueError unless k is a positive multiple of 32."""
    _check_shape(n, k)
    tiles, groups = -(-n // TILE), k // GROUP
    if kind == "q4":
        return tiles * groups * Q4_TILE_BYTES
    return tiles * (-(-groups // 2)) * Q8_PAIR_BYTES


def pack_q4_1(blocks: Tensor, n: int, k: int, *, arena: Arena | None = None) -> PackedWeight:
    """Repacks GGUF Q4_1 blocks without loss.

    Args:
        blocks: uint8, n * k/32 blocks of 20 bytes (fp16 d, fp16 m, 16 bytes of nibbles), row-major.
        n: outputs.
        k: inputs, a multiple of 32.
        arena: where to put the result; None allocates.

    Raises:
        ValueError: the sizes do not match.
    """
    blocks_NGb = _as_blocks(blocks, n, k, Q4_1_BLOCK_BYTES)
    return _assemble_q4(
        blocks_NGb[..., 4:], blocks_NGb[..., 0:2], blocks_NGb[..., 2:4], n, k, arena
    )


def pack_q8_0(blocks: Tensor, n: int, k: int, *, arena: Arena | None = None) -> PackedWeight:
    """Repacks GGUF Q8_0 blocks (fp16 d, 32 int8) without loss; arguments as `pack_q4_1`."""
    blocks_NGb = _as_blocks(blocks, n, k, Q8_0_BLOCK_BYTES)
    return _assemble_q8(blocks_NGb[..., 2:], blocks_NGb[..., 0:2], n, k, arena)


def quantize_q4(weight_NK: Tensor, *, arena: Arena | None = None) -> PackedWeight:
    """Quantizes a float weight to 4 bits with fp16 scale and minimum per group of 32.

    The minimum and maximum of a group are shrunk over a small grid and the pair with the least
    squared error is kept.

    Raises:
        ValueError: not 2-D, k not a multiple of 32, or not finite.
    """
    groups_NGg = _as_groups(weight_NK)
    low, high = groups_NGg.amin(-1, keepdim=True), groups_NGg.amax(-1, keepdim=True)
    best = torch.full_like(low, float("inf"))
    best_d, best_m = torch.zeros_like(low), torch.zeros_like(low)
    best_q = torch.zeros_like(groups_NGg)
    for shrink in (0.0, 0.03, 0.06, 0.1, 0.14):
        inset = (high - low) * (shrink / 2)
        m = (low + inset).half().float()
        d = ((high - low - 2 * inset) / 15).half().float()
        q = ((groups_NGg - m) / d.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
        error = (q * d + m - groups_NGg).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_d, best_m = torch.where(better, d, best_d), torch.where(better, m, best_m)
        best_q = torch.where(better, q, best_q)
    n, k = weight_NK.shape
    q_u8 = best_q.to(torch.uint8)
    nibbles_NG16 = q_u8[..., :16] | (q_u8[..., 16:] << 4)
    return _assemble_q4(nibbles_NG16, _half_bytes(best_d), _half_bytes(best_m), n, k, arena)


def quantize_q8(weight_NK: Tensor, *, arena: Arena | None = None) -> PackedWeight:
    """Quantizes to int8 with one fp16 scale per group of 32; raises as `quantize_q4`."""
    groups_NGg = _as_groups(weight_NK)
    d = (groups_NGg.abs().amax(-1, keepdim=True) / 127).half().float()
    q = (groups_NGg / d.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    n, k = weight_NK.shape
    return _assemble_q8(q.to(torch.int8).view(torch.uint8), _half_bytes(d), n, k, arena)


def unpack_parts(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The stored numbers: q [n, G, 32] int32, d [n, G] fp32, m [n, G] fp32 (0 for q8)."""
    tiles, groups = -(-weight.n // TILE), weight.k // GROUP
    if weight.kind == "q4":
        bytes_tgb = weight.data.view(tiles, groups, Q4_TILE_BYTES)
        lines = bytes_tgb[..., :256].reshape(tiles, groups, 4, TILE, 4)
        nibbles = lines.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, groups, 16)
        q_NGg = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).int()
        d_NG, m_NG = (
            bytes_tgb[..., start : start + 32].contiguous().view(torch.float16).float()
            for start in (256, 288)
        )
        d_NG, m_NG = (x.transpose(1, 2).reshape(tiles * TILE, groups) for x in (d_NG, m_NG))
        return q_NGg[: weight.n], d_NG[: weight.n], m_NG[: weight.n]
    pairs = -(-groups // 2)
    bytes_tpb = weight.data.view(tiles, pairs, Q8_PAIR_BYTES)
    lines = bytes_tpb[..., :1024].reshape(tiles, pairs * 2, 8, TILE, 4)
    q_NGg = lines.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, pairs * 2, GROUP).int() - 128
    scales = bytes_tpb[..., 1024:].contiguous().view(torch.float16).float()
    d_NG = scales.reshape(tiles, pairs * 2, TILE).transpose(1, 2).reshape(tiles * TILE, pairs * 2)
    q_NGg, d_NG = q_NGg[: weight.n, :groups], d_NG[: weight.n, :groups]
    return q_NGg, d_NG, torch.zeros_like(d_NG)


def unpack(weight: PackedWeight) -> Tensor:
    """The weight that is served, fp32 [n, k]: d * q + m, exactly as GGUF defines it."""
    q_NGg, d_NG, m_NG = unpack_parts(weight)
    return (q_NGg * d_NG[..., None] + m_NG[..., None]).reshape(weight.n, weight.k)


def _assemble_q4(
    nibbles_NGb: Tensor, d_NGb: Tensor, m_NGb: Tensor, n: int, k: int, arena: Arena | None
) -> PackedWeight:
    tiles, groups = -(-n // TILE), k // GROUP
    out = _allocate(packed_bytes("q4", n, k), arena)
    out_tgb = out.view(tiles, groups, Q4_TILE_BYTES)
    lines = _tiled(nibbles_NGb, n).reshape(tiles, TILE, groups, 4, 4).permute(0, 2, 3, 1, 4)
    out_tgb[..., :256].copy_(lines.reshape(tiles, groups, 256))
    for start, part in ((256, d_NGb), (288, m_NGb)):
        scales = _tiled(part, n).reshape(tiles, TILE, groups, 2).permute(0, 2, 1, 3)
        out_tgb[..., start : start + 32].copy_(scales.reshape(tiles, groups, 32))
    return PackedWeight("q4", n, k, out)


def _assemble_q8(q_NGb: Tensor, d_NGb: Tensor, n: int, k: int, arena: Arena | None) -> PackedWeight:
    tiles, groups = -(-n // TILE), k // GROUP
    pairs = -(-groups // 2)
    # Zero weights are 128 once they are made unsigned, so padding goes in before the flip.
    q = torch.zeros(tiles * TILE, pairs * 2, GROUP, dtype=torch.uint8)
    d = torch.zeros(tiles * TILE, pairs * 2, 2, dtype=torch.uint8)
    q[:n, :groups], d[:n, :groups] = q_NGb, d_NGb
    out = _allocate(packed_bytes("q8", n, k), arena)
    out_tpb = out.view(tiles, pairs, Q8_PAIR_BYTES)
    lines = (q ^ 128).reshape(tiles, TILE, pairs, 2, 8, 4).permute(0, 2, 3, 4, 1, 5)
    out_tpb[..., :1024].copy_(lines.reshape(tiles, pairs, 1024))
    scales = d.reshape(tiles, TILE, pairs, 2, 2).permute(0, 2, 3, 1, 4)
    out_tpb[..., 1024:].copy_(scales.reshape(tiles, pairs, 64))
    return PackedWeight("q8", n, k, out)


def _tiled(part_NGb: Tensor, n: int) -> Tensor:
    padded = -(-n // TILE) * TILE
    if padded == n:
        return part_NGb
    tail = part_NGb.new_zeros(padded - n, *part_NGb.shape[1:])
    return torch.cat([part_NGb, tail])


def _as_blocks(blocks: Tensor, n: int, k: int, block_bytes: int) -> Tensor:
    _check_shape(n, k)
    wanted = n * (k // GROUP) * block_bytes
    if blocks.dtype != torch.uint8 or blocks.numel() != wanted:
        raise ValueError(f"[{n}, {k}] takes {wanted} uint8, got {blocks.numel()} {blocks.dtype}")
    return blocks.reshape(n, k // GROUP, block_bytes)


def _as_groups(weight_NK: Tensor) -> Tensor:
    if weight_NK.dim() != 2:
        raise ValueError(f"a weight is [n, k], got {tuple(weight_NK.shape)}")
    n, k = weight_NK.shape
    _check_shape(n, k)
    if not torch.isfinite(weight_NK).all():
        raise ValueError("the weight is not finite")
    return weight_NK.detach().float().reshape(n, k // GROUP, GROUP)


def _half_bytes(x_NG1: Tensor) -> Tensor:
    return x_NG1.half().contiguous().view(torch.uint8)


def _check_shape(n: int, k: int) -> None:
    if n <= 0 or k <= 0 or k % GROUP:
        raise ValueError(f"n must be positive and k a positive multiple of {GROUP}: [{n}, {k}]")


def _allocate(num_bytes: int, arena: Arena | None) -> Tensor:
    if arena is not None:
        return arena.take(num_bytes)
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    assert out.data_ptr() % _ALIGNMENT_BYTES == 0
    return out
