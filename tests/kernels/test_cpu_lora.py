"""Adapters: several in one batch, several segments, bf16 and fp32; rows stay independent."""

import itertools

import pytest
import torch
from heedful_kernels.cpu import LoraSlots, reference


def make_slots(dtype, ranks, *, max_rank, k, ends) -> LoraSlots:
    widths = [end - start for start, end in itertools.pairwise((0, *ends))]
    slots = LoraSlots.empty(len(ranks), k, tuple(widths), max_rank, dtype)
    for slot, rank in enumerate(ranks):
        a = [torch.randn(rank, k) for _ in widths]
        b = [torch.randn(width, rank) for width in widths]
        slots.load(slot, a, b, 0.5 + slot)
    return slots


def run_lora(cpu, rows_batch, x_TK, slots, lora_slot, y_TN, threads=2):
    segments = len(slots.segment_ends)
    scratch = torch.full((x_TK.shape[0], segments, slots.max_rank), float("nan"))

    def ops(program):
        program.lora_shrink(x_TK, slots, scratch)
        program.lora_expand(scratch, slots, y_TN)

    batch = rows_batch(x_TK.shape[0], lora_slot=torch.tensor(lora_slot, dtype=torch.int32))
    cpu.run(batch, ops, threads=threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [(48,), (32, 48, 96), (640, 1280)])
def test_mixed_adapters_equal_the_reference(cpu, rows_batch, dtype, ends):
    k = 96
    slots = make_slots(dtype, [16, 5, 0, 20], max_rank=32, k=k, ends=ends)
    for lora_slot in ([1], [-1, 0, 3], [3, 0, 0, -1, 1, 0, 2, 0, 0, 3, 0, 3]):
        rows = len(lora_slot)
        x_TK, y_TN = torch.randn(rows, k), torch.randn(rows, ends[-1])
        expected = reference.lora(x_TK, slots, torch.tensor(lora_slot), y_TN)
        run_lora(cpu, rows_batch, x_TK, slots, lora_slot, y_TN)
        # Products of two sums of k and rank terms of size about 1.
        assert torch.allclose(y_TN, expected, rtol=1e-5, atol=1e-5 * (k * 32) ** 0.5)


def test_a_row_has_the_same_bits_whatever_the_other_rows_use(cpu, rows_batch):
    slots = make_slots(torch.bfloat16, [8, 8, 8], max_rank=8, k=64, ends=(32, 64))
    x_TK, base = torch.randn(9, 64), torch.randn(9, 64)
    mixed = base.clone()
    run_lora(cpu, rows_batch, x_TK, slots, [0, 1, 0, 0, 2, 0, 0, -1, 1], mixed)
    alone = base[3:4].clone()
    run_lora(cpu, rows_batch, x_TK[3:4].clone(), slots, [0], alone, threads=1)
    assert torch.equal(mixed[3:4], alone)
    assert torch.equal(mixed[7], base[7])


def test_without_adapters_nothing_is_touched(cpu, rows_batch):
    slots = make_slots(torch.float32, [4], max_rank=4, k=32, ends=(16,))
    y_TN = torch.randn(3, 16)
    before = y_TN.clone()
    run_lora(cpu, rows_batch, torch.randn(3, 32), slots, [-1, -1, -1], y_TN)
    assert torch.equal(y_TN, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_is_the_one_that_was_given(cpu, rows_batch, dtype):
    """The plain formula on PEFT's own shapes, so that a wrong layout cannot cancel out."""
    slots = LoraSlots.empty(2, 64, (16, 48), 8, dtype)
    a = [torch.randint(-3, 4, (5, 64)).float() for _ in range(2)]
    b = [torch.randint(-3, 4, (width, 5)).float() for width in (16, 48)]
    slots.load(0, a, b, 9.0)
    slots.load(1, a, b, 0.5)
    x_TK, y_TN = torch.randint(-3, 4, (3, 64)).float(), torch.zeros(3, 64)
    expected = torch.cat([0.5 * (x_TK @ a[i].T @ b[i].T) for i in range(2)], dim=1)
    run_lora(cpu, rows_batch, x_TK, slots, [1, 1, 1], y_TN)
    assert torch.equal(y_TN, expected)


def test_an_adapter_that_does_not_fit_is_refused():
    slots = LoraSlots.empty(1, 64, (16,), 16)
    with pytest.raises(ValueError, match="adapter shapes"):
        slots.load(0, [torch.zeros(17, 64)], [torch.zeros(16, 17)], 1.0)
    with pytest.raises(ValueError, match="adapter shapes"):
        slots.load(0, [torch.zeros(4, 32)], [torch.zeros(16, 4)], 1.0)
    with pytest.raises(ValueError, match="bf16 or fp32"):
        LoraSlots.empty(1, 64, (16,), 16, torch.float16)


def test_a_slot_is_overwritten_by_adapters_of_any_rank(cpu, rows_batch):
    slots = LoraSlots.empty(2, 64, (32, 16), 48)
    other = ([torch.randn(33, 64)] * 2, [torch.randn(32, 33), torch.randn(16, 33)])
    slots.load(1, *other, 1.0)
    x_TK, base = torch.randn(2, 64), torch.randn(2, 48)
    for rank in (48, 3, 17, 16, 0):
        a = [torch.randn(rank, 64) for _ in range(2)]
        b = [torch.randn(32, rank), torch.randn(16, rank)]
        slots.load(0, a, b, 2.0)
        y_TN = base.clone()
        run_lora(cpu, rows_batch, x_TK, slots, [0, 1], y_TN)
        expected = reference.lora(x_TK, slots, torch.tensor([0, 1]), base)
        assert torch.allclose(y_TN, expected, rtol=1e-5, atol=1e-3)
