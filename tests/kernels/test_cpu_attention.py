"""Rotary embedding with the cache write, and paged attention over whatever was written."""

import itertools

import pytest
import torch
from heedful_kernels.cpu import Batch, KVCache, RopeTable, reference


def poisoned_cache(num_blocks: int, kv_heads: int, block_size: int, head_dim: int) -> KVCache:
    cache = KVCache.empty(num_blocks, kv_heads, block_size, head_dim)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def copy_of(cache: KVCache) -> KVCache:
    return KVCache(cache.keys.clone(), cache.values.clone(), cache.head_dim)


def rope_table(positions: int, rotary_dim: int) -> RopeTable:
    frequency = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(positions)[:, None] * frequency
    return RopeTable(angle.cos().contiguous(), angle.sin().contiguous())


def paged_batch(spans, block_size: int, num_blocks: int) -> Batch:
    """Rows first..last-1 of each sequence, on blocks dealt out in a shuffled order."""
    free = torch.randperm(num_blocks).tolist()
    max_blocks = max(-(-last // block_size) for _, last in spans)
    tables = torch.full((len(spans), max_blocks), -1, dtype=torch.int32)
    positions, sequence, slots = [], [], []
    for row, (first, last) in enumerate(spans):
        blocks = [free.pop() for _ in range(-(-last // block_size))]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(first, last):
            block, offset = blocks[position // block_size], position % block_size
            slots.append(block * block_size + offset)
            positions.append(position)
            sequence.append(row)
    rows = len(positions)
    return Batch(
        token_ids=torch.zeros(rows, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        sequence=torch.tensor(sequence, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        selected_rows=torch.empty(0, dtype=torch.int32),
    )


def rows_of(batch: Batch, keep: torch.Tensor) -> Batch:
    return Batch(
        token_ids=batch.token_ids[keep],
        positions=batch.positions[keep],
        sequence=batch.sequence[keep],
        block_tables=batch.block_tables,
        slot_mapping=batch.slot_mapping[keep],
        selected_rows=batch.selected_rows,
    )


def fill_cache(cache: KVCache, batch: Batch) -> None:
    """Random keys and values at every position before the batch's rows and at them."""
    heads, d, size = cache.kv_heads, cache.head_dim, cache.block_size
    for row in range(batch.block_tables.shape[0]):
        last = int(batch.positions[batch.sequence == row].max())
        for position in range(last + 1):
            block = int(batch.block_tables[row, position // size])
            stripe, lane = divmod(position % size, 16)
            cache.keys[block, :, stripe, :, lane] = torch.randn(heads, d // 2, 2).bfloat16()
            cache.values[block, :, position % size] = 0
            cache.values[block, :, position % size, :d] = torch.randn(heads, d).bfloat16()


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "block_size"),
    [(64, 64, 16), (32, 32, 32), (80, 32, 16), (96, 0, 16), (128, 128, 32)],
)
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_rotates_and_writes_the_cache(cpu, head_dim, rotary_dim, block_size, with_norms):
    q_heads, kv_heads, num_blocks = 4, 2, 12
    batch = paged_batch([(0, 7), (15, 18), (40, 41)], block_size, num_blocks)
    batch.slot_mapping[4] = -1
    rows = batch.positions.shape[0]
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim)
    cache = poisoned_cache(num_blocks, kv_heads, block_size, head_dim)
    expected_cache = copy_of(cache)
    rope = rope_table(64, rotary_dim) if rotary_dim else None
    norms = {}
    if with_norms:
        norms = {"q_norm_D": torch.randn(head_dim), "k_norm_D": torch.randn(head_dim), "eps": 1e-6}
    expected = reference.rope_kv(qkv, expected_cache, batch, q_heads=q_heads, rope=rope, **norms)
    cpu.run(batch, lambda program: program.rope_kv(qkv, cache, q_heads=q_heads, rope=rope, **norms))
    assert torch.allclose(qkv, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((cache.keys, expected_cache.keys), (cache.values, expected_cache.values)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        # One bf16 step where the two fp32 values straddle a rounding boundary.
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 32), (4, 2, 80), (4, 1, 96), (7, 1, 64), (8, 1, 128)],
)
def test_attention_equals_the_reference(cpu, poison, q_heads, kv_heads, head_dim, block_size):
    num_blocks = 80
    batch = paged_batch(
        [(0, 5), (15, 17), (63, 65), (299, 300), (511, 514)], block_size, num_blocks
    )
    rows = batch.positions.shape[0]
    cache = poisoned_cache(num_blocks, kv_heads, block_size, head_dim)
    fill_cache(cache, batch)
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim) * 2
    out = poison(rows, q_heads * head_dim)
    cpu.run(
        batch,
        lambda program: program.attention(qkv, cache, out, q_heads=q_heads, max_positions=1024),
    )
    expected = reference.attention(qkv, cache, batch, q_heads=q_heads)
    # Scores reach about 40 here: their fp32 rounding is what exp turns into relative error.
    assert torch.allclose(out, expected, rtol=1e-4, atol=2e-5)


def test_one_position_returns_its_own_value(cpu, poison):
    batch = paged_batch([(0, 1)], 16, 4)
    cache = poisoned_cache(4, 1, 16, 32)
    fill_cache(cache, batch)
    qkv, out = torch.randn(1, 96), poison(1, 32)
    cpu.run(batch, lambda program: program.attention(qkv, cache, out, q_heads=1, max_positions=64))
    block = int(batch.block_tables[0, 0])
    assert torch.equal(out[0], cache.values[block, 0, 0].float())


def test_large_scores_neither_overflow_nor_vanish(cpu, poison):
    batch = paged_batch([(300, 301)], 16, 32)
    cache = poisoned_cache(32, 1, 16, 32)
    fill_cache(cache, batch)
    qkv, out = torch.randn(1, 96) * 1000, poison(1, 32)
    cpu.run(batch, lambda program: program.attention(qkv, cache, out, q_heads=1, max_positions=512))
    expected = reference.attention(qkv, cache, batch, q_heads=1)
    assert torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_a_row_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(cpu, poison):
    """Few rows with a long context split it between threads, many rows do not."""
    batch = paged_batch([(1000, 1003), (0, 12), (255, 258), (30, 40)], 16, 160)
    rows = batch.positions.shape[0]
    cache = poisoned_cache(160, 3, 16, 64)
    fill_cache(cache, batch)
    qkv, together = torch.randn(rows, 15 * 64), poison(rows, 9 * 64)

    def run(some, qkv, out, threads):
        cpu.run(
            some,
            lambda program: program.attention(qkv, cache, out, q_heads=9, max_positions=2048),
            threads=threads,
        )

    run(batch, qkv, together, 2)
    for keep, threads in itertools.product([[0], [2, 1], [15, 3], list(range(10))], (1, 2)):
        index = torch.tensor(keep)
        out = poison(len(keep), 9 * 64)
        run(rows_of(batch, index), qkv[index].contiguous(), out, threads)
        assert torch.equal(out, together[index])


def test_a_nan_query_spoils_its_own_row_only(cpu, poison):
    batch = paged_batch([(5, 6), (20, 21)], 16, 8)
    cache = poisoned_cache(8, 1, 16, 32)
    fill_cache(cache, batch)
    qkv, out = torch.randn(2, 96), torch.zeros(2, 32)
    qkv[0, 3] = float("nan")
    cpu.run(batch, lambda program: program.attention(qkv, cache, out, q_heads=1, max_positions=64))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
