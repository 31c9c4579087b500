"""Integer linears: exact integers, derived float bounds, and rows that ignore their neighbours."""

import pytest
import torch
from heedful_kernels.cpu import PackedWeight, QuantizedRows, quantize_q4, quantize_q8, reference
from heedful_kernels.cpu.packing import pack_q8_0, unpack_parts

ROWS = (1, 2, 3, 7, 16, 17, 33, 64, 100)


def make_weight(kind: str, n: int, k: int) -> PackedWeight:
    weight_NK = torch.randn(n, k) * 0.05
    return quantize_q4(weight_NK) if kind == "q4" else quantize_q8(weight_NK)


def error_bound(x: QuantizedRows, weight: PackedWeight) -> torch.Tensor:
    """Rounding of a sum over groups: (terms + a few operations each) ulps of the terms' sizes."""
    q, d, m = unpack_parts(weight)
    groups = weight.k // 32
    values = x.values.reshape(-1, groups, 32).float()
    dot = torch.einsum("tgi,ngi->tng", values, q.float()) * d
    size = (dot.abs() + (m * x.sums[:, None, :]).abs()) * x.scale[:, None, :].abs()
    return (groups + 4) * 2**-23 * size.sum(-1) + 1e-30


def run_linear(cpu, rows_batch, x, weight, out, *, threads=2, **options):
    rows = x.values.shape[0]
    batch = rows_batch(rows)
    cpu.run(batch, lambda program: program.linear(x, weight, out, **options), threads=threads)


@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (50, 96), (144, 576)])
def test_linear_equals_the_reference(cpu, rows_batch, poison, kind, n, k):
    weight = make_weight(kind, n, k)
    for rows in ROWS:
        x = reference.quantize_rows(torch.randn(rows, k))
        out_TN = poison(rows, n)
        run_linear(cpu, rows_batch, x, weight, out_TN)
        error = (out_TN - reference.linear(x, weight)).abs()
        assert (error <= error_bound(x, weight)).all()


@pytest.mark.parametrize("kind", ["q4", "q8"])
def test_integer_parts_are_exact(cpu, rows_batch, poison, kind):
    """With power-of-two scales and no rounding anywhere, equality is exact, extremes included."""
    n, k, rows = 32, 64, 5
    weight = make_weight(kind, n, k)
    if kind == "q4":
        tile = weight.data.view(n // 16, k // 32, 320)
        tile[..., :256] = torch.randint(0, 256, tile[..., :256].shape, dtype=torch.uint8)
        tile[:, :, 256:] = torch.tensor([0.5] * 16 + [-2.0] * 16).half().view(torch.uint8)
    else:
        blocks = torch.randint(0, 256, (n * k // 32, 34), dtype=torch.uint8)
        blocks[::3, 2:] = 128
        blocks[:, :2] = torch.tensor([0.5]).half().view(torch.uint8)
        weight = pack_q8_0(blocks, n, k)
    values = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    values[0], values[1] = 127, -127
    scale = torch.full((rows, k // 32), 0.25)
    sums = values.reshape(rows, -1, 32).int().sum(-1).float()
    x = QuantizedRows(values, scale, sums)
    out_TN = poison(rows, n)
    run_linear(cpu, rows_batch, x, weight, out_TN)
    q, d, m = unpack_parts(weight)
    exact = torch.einsum(
        "ti,ni->tn", values.double(), (q * d[..., None] + m[..., None]).flatten(1).double()
    )
    assert torch.equal(out_TN, (exact * 0.25).float())


@pytest.mark.parametrize("kind", ["q4", "q8"])
def test_a_row_has_the_same_bits_alone_and_among_others(cpu, rows_batch, poison, kind):
    n, k = 48, 192
    weight = make_weight(kind, n, k)
    x = reference.quantize_rows(torch.randn(64, k))
    together = poison(64, n)
    run_linear(cpu, rows_batch, x, weight, together)
    for count in (1, 2, 5, 15, 16, 31, 63):
        part = QuantizedRows(x.values[:count], x.scale[:count], x.sums[:count])
        out = poison(count, n)
        run_linear(cpu, rows_batch, part, weight, out)
        assert torch.equal(out, together[:count])


def test_one_thread_and_two_give_the_same_bits(cpu, rows_batch, poison):
    weight = make_weight("q4", 208, 128)
    x = reference.quantize_rows(torch.randn(7, 128))
    outs = [poison(7, 208), poison(7, 208)]
    for threads, out in zip((1, 2), outs, strict=True):
        run_linear(cpu, rows_batch, x, weight, out, threads=threads)
    assert torch.equal(*outs)


@pytest.mark.parametrize("n", [32, 41])
def test_bias_and_accumulation_are_added_last(cpu, rows_batch, poison, n):
    weight = make_weight("q4", n, 64)
    x = reference.quantize_rows(torch.randn(9, 64))
    bias_N, residual_TN = torch.randn(n), torch.randn(9, n)
    plain = poison(9, n)
    run_linear(cpu, rows_batch, x, weight, plain)
    out = residual_TN.clone()
    run_linear(cpu, rows_batch, x, weight, out, bias_N=bias_N, accumulate=True)
    assert torch.equal(out, residual_TN + (plain + bias_N))


def test_only_the_selected_rows_are_computed(cpu, rows_batch, poison):
    weight = make_weight("q8", 32, 64)
    x = reference.quantize_rows(torch.randn(3, 64))
    out = poison(3, 32)
    batch = rows_batch(8, selected_rows=torch.tensor([1, 4, 7], dtype=torch.int32))
    cpu.run(batch, lambda program: program.linear(x, weight, out, selected=True))
    assert out.isfinite().all()


def test_a_row_with_a_nan_spoils_itself_and_no_other(cpu, rows_batch, poison):
    weight = make_weight("q4", 32, 64)
    x_TK = torch.randn(4, 64)
    x_TK[2, 40] = float("nan")
    rows = QuantizedRows.empty(4, 64)
    out = poison(4, 32)

    def ops(program):
        program.quantize(x_TK, rows)
        program.linear(rows, weight, out)

    cpu.run(rows_batch(4), ops)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()
