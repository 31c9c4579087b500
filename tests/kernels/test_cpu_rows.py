"""Row ops: norms, quantization, activations, embeddings, gathering, greedy choice."""

import pytest
import torch
from heedful_kernels.cpu import (
    Activation,
    QuantizedRows,
    quantize_q4,
    quantize_q8,
    reference,
    unpack,
)

ROWS = (1, 2, 3, 7, 33, 64, 100)
EPS = 2**-23


def poisoned_rows(rows: int, k: int) -> QuantizedRows:
    x = QuantizedRows.empty(rows, k)
    x.values.fill_(-77)
    x.scale.fill_(float("nan"))
    x.sums.fill_(float("nan"))
    return x


def assert_quantizes(x: QuantizedRows, of_TK: torch.Tensor) -> None:
    """x is a right quantization of these fp32 values."""
    expected = reference.quantize_rows(of_TK)
    assert torch.equal(x.values, expected.values)
    assert torch.equal(x.sums, expected.sums)
    assert torch.allclose(x.scale, expected.scale, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("k", [32, 576, 1536])
def test_quantize_equals_the_reference(cpu, rows_batch, k):
    for rows in ROWS:
        x_TK = torch.randn(rows, k) * torch.logspace(-6, 6, rows)[:, None]
        x_TK[:, ::5] = 0.0
        out = poisoned_rows(rows, k)
        cpu.run(rows_batch(rows), lambda program, x=x_TK, out=out: program.quantize(x, out))
        assert_quantizes(out, x_TK)


def test_quantize_of_zeros_tiny_and_huge_values(cpu, rows_batch):
    x_TK = torch.zeros(4, 64)
    x_TK[1] = 1e-38
    x_TK[2] = 3e38
    x_TK[3, :32] = -1.0
    out = poisoned_rows(4, 64)
    cpu.run(rows_batch(4), lambda program: program.quantize(x_TK, out))
    assert_quantizes(out, x_TK)
    assert out.scale[:2].count_nonzero() == 0


def test_a_nan_or_infinity_becomes_its_groups_scale(cpu, rows_batch):
    x_TK = torch.randn(2, 96)
    x_TK[0, 33], x_TK[1, 70] = float("nan"), float("-inf")
    out = poisoned_rows(2, 96)
    cpu.run(rows_batch(2), lambda program: program.quantize(x_TK, out))
    assert out.scale.isfinite().tolist() == [[True, False, True], [True, True, False]]
    assert out.scale[0, 1].isnan()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("h", [64, 576])
def test_norm_equals_the_reference_and_quantizes_what_it_returns(
    cpu, rows_batch, poison, centered, h
):
    weight_H, bias_H = torch.randn(h), torch.randn(h) if centered else None
    for rows in ROWS:
        x_TH = torch.randn(rows, h) * 3 + 0.5
        out, plain = poisoned_rows(rows, h), poison(rows, h)

        def ops(program, x=x_TH, out=out, plain=plain):
            program.norm(
                x, weight_H, 1e-5, out=out, out_fp32_TH=plain, bias_H=bias_H, centered=centered
            )

        cpu.run(rows_batch(rows), ops)
        expected = reference.norm(x_TH.double(), weight_H, 1e-5, bias_H=bias_H, centered=centered)
        # The mean of h squares carries at most h / lanes + log2(lanes) roundings.
        assert torch.allclose(plain.double(), expected, rtol=h / 4 * EPS, atol=40 * EPS)
        assert_quantizes(out, plain)


@pytest.mark.parametrize("kind", list(Activation))
def test_activations_equal_the_reference(cpu, rows_batch, poison, kind):
    f = 96
    for rows in (1, 7, 33):
        x = torch.randn(rows, 2 * f if kind.gated else f) * 4
        x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
        out, plain = poisoned_rows(rows, f), poison(rows, f)

        def ops(program, x=x, out=out, plain=plain):
            program.activation(x, kind, out=out, out_fp32_TF=plain)

        cpu.run(rows_batch(rows), ops)
        expected = reference.activation(x.double(), kind)
        # exp is good to 2e-7 relative, the error function to 2e-7 absolute times |x * up|.
        assert torch.allclose(plain.double(), expected, rtol=2e-6, atol=6e-6)
        assert_quantizes(out, plain)


@pytest.mark.parametrize("table_format", ["fp32", "bf16", "q8", "q4"])
def test_embedding_returns_the_tables_rows(cpu, rows_batch, poison, table_format):
    table_VH = torch.randn(50, 96)
    table, rows_VH = {
        "fp32": lambda: (table_VH, table_VH),
        "bf16": lambda: (table_VH.bfloat16(), table_VH.bfloat16().float()),
        "q8": lambda: (quantize_q8(table_VH), unpack(quantize_q8(table_VH))),
        "q4": lambda: (quantize_q4(table_VH), unpack(quantize_q4(table_VH))),
    }[table_format]()
    token_ids = torch.tensor([0, 49, 16, 15, 16, 31, 48], dtype=torch.int32)
    out = poison(7, 96)
    cpu.run(rows_batch(7, token_ids=token_ids), lambda program: program.embed(table, out))
    # q * d + m is one rounding apart where the compiler may not fuse it and torch does not.
    assert torch.allclose(out, rows_VH[token_ids.long()], rtol=2 * EPS, atol=1e-7)


def test_learned_positions_are_added(cpu, rows_batch):
    table_PH, x_TH = torch.randn(20, 64), torch.randn(3, 64)
    positions = torch.tensor([19, 0, 7], dtype=torch.int32)
    expected = x_TH + table_PH[positions.long()]
    batch = rows_batch(3, positions=positions)
    cpu.run(batch, lambda program: program.add_position(table_PH, x_TH))
    assert torch.equal(x_TH, expected)


def test_gather_takes_the_selected_rows(cpu, rows_batch, poison):
    x_TH, out = torch.randn(9, 64), poison(4, 64)
    selected = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    batch = rows_batch(9, selected_rows=selected)
    cpu.run(batch, lambda program: program.gather_rows(x_TH, out))
    assert torch.equal(out, x_TH[selected.long()])


def run_argmax(cpu, rows_batch, logits_RV):
    rows = logits_RV.shape[0]
    argmax = torch.full((rows,), -99, dtype=torch.int32)
    best, lse = torch.full((rows,), 7.0), torch.full((rows,), 7.0)
    cpu.run(rows_batch(rows), lambda program: program.argmax_lse(logits_RV, argmax, best, lse))
    return argmax, best, lse


@pytest.mark.parametrize("vocabulary", [1, 50, 8192, 20011])
def test_argmax_and_lse_equal_the_reference(cpu, rows_batch, vocabulary):
    for rows in (1, 2, 7, 33):
        logits_RV = torch.randn(rows, vocabulary) * 5
        argmax, best, lse = run_argmax(cpu, rows_batch, logits_RV)
        expected = reference.argmax_lse(logits_RV)
        assert torch.equal(argmax, expected[0])
        assert torch.equal(best, expected[1])
        assert torch.allclose(lse, expected[2], rtol=1e-6, atol=2e-6)


def test_ties_go_to_the_lowest_id(cpu, rows_batch):
    logits_RV = torch.zeros(3, 20000)
    logits_RV[1, [19999, 8200, 8199]] = 3.0
    logits_RV[2] = float("-inf")
    argmax, best, lse = run_argmax(cpu, rows_batch, logits_RV)
    assert argmax.tolist() == [0, 8199, 0]
    assert best[2] == float("-inf")
    assert lse[2] == float("-inf")


def test_masked_logits_weigh_nothing(cpu, rows_batch):
    logits_RV = torch.full((1, 20000), float("-inf"))
    logits_RV[0, 12345] = -2.0
    argmax, best, lse = run_argmax(cpu, rows_batch, logits_RV)
    assert (argmax.item(), best.item(), lse.item()) == (12345, -2.0, -2.0)


def test_a_row_with_a_nan_is_reported_and_its_neighbours_are_not(cpu, rows_batch):
    for bad_column in (0, 9000, 19999):
        logits_RV = torch.randn(3, 20000)
        logits_RV[1, bad_column] = float("nan")
        argmax, best, lse = run_argmax(cpu, rows_batch, logits_RV)
        assert argmax[1] == -1
        assert best[1].isnan()
        assert lse[1].isnan()
        assert (argmax[[0, 2]] >= 0).all()
