"""Both linear forms compute x W^T + b of the weights they were given, row by row."""

import pytest
import torch
from heedful_server.model.blocks import quantize_blocks, unpack_q4_1
from heedful_server.model.linear import DenseLinear, PackedLinear, make_linear
from heedful_server.model.weights import NamedWeight

CPU = torch.device("cpu")


def packed_weight(kind: str, n: int, k: int, seed: int = 0) -> NamedWeight:
    generator = torch.Generator().manual_seed(seed)
    blocks = quantize_blocks(kind, torch.randn(n, k, generator=generator) * 0.05)
    return NamedWeight("w", kind, blocks, (n, k))


def kernel_terms(weight: NamedWeight) -> torch.Tensor:
    """Sizes of what the kernel adds up to one weight: |scale * (q - 8)| + |zero|."""
    if weight.kind == "q8_0":
        return weight.dequantize().abs()
    q, d, m = unpack_q4_1(weight.data)
    centred = (q.float().view(*d.shape, 32) - 8) * d[..., None]
    return (centred.abs() + (m + 8 * d)[..., None].abs()).flatten(1)


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
@pytest.mark.parametrize("n", [1, 40, 64, 200])
@pytest.mark.parametrize("rows", [1, 3, 64, 100])
def test_packed_linear_is_exact_but_for_bf16_rounding(kind: str, n: int, rows: int) -> None:
    weight = packed_weight(kind, n, 96)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-1, 1, n)
    linear = make_linear([weight], [bias], torch.bfloat16, CPU)
    assert isinstance(linear, PackedLinear)
    expected = x.double() @ weight.dequantize().double().T + bias.bfloat16().double()
    # Scale and zero are rounded once each, the result twice (before and after the bias).
    magnitude = x.abs().double() @ kernel_terms(weight).double().T
    magnitude += 2 * (expected.abs() + bias.abs())
    assert ((linear(x).double() - expected).abs() <= magnitude * 2**-8 * 1.01).all()


def test_q8_planes_equal_q8_weights_with_scales_rounded_to_bf16() -> None:
    weight = packed_weight("q8_0", 64, 64)
    linear = make_linear([weight], [], torch.bfloat16, CPU)
    unit = torch.eye(64).bfloat16()
    exact = weight.dequantize()
    # One rounding of the scale and one of the result, 2^-8 each.
    assert ((linear(unit).float().T - exact).abs() <= exact.abs() * 2**-7 * 1.01).all()


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
@pytest.mark.parametrize(("n", "k"), [(960, 576), (576, 1536)])
def test_packed_rows_do_not_depend_on_the_number_of_rows(kind: str, n: int, k: int) -> None:
    linear = make_linear([packed_weight(kind, n, k)], [], torch.bfloat16, CPU)
    x = torch.randn(130, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = linear(x)
    for rows in (1, 2, 3, 5, 8, 31, 32, 64, 129):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[-rows:]), whole[-rows:]), rows


def test_packing_in_runs_equals_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_weight("q4_1", 320, 64)
    at_once = make_linear([weight], [], torch.bfloat16, CPU)
    monkeypatch.setattr("heedful_server.model.linear._PACK_ROWS", 128)
    in_runs = make_linear([weight], [], torch.bfloat16, CPU)
    assert torch.equal(at_once.packed, in_runs.packed)
    assert torch.equal(at_once.scales_and_zeros, in_runs.scales_and_zeros)


def test_fused_parts_lie_side_by_side() -> None:
    parts = [packed_weight("q4_1", n, 64, seed=n) for n in (64, 32, 96)]
    fused = make_linear(parts, [], torch.bfloat16, CPU)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    apart = [make_linear([part], [], torch.bfloat16, CPU)(x) for part in parts]
    assert torch.equal(fused(x), torch.cat(apart, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_become_dense_where_the_kernel_cannot_run(dtype: torch.dtype) -> None:
    weight = packed_weight("q4_1", 64, 64)
    linear = make_linear([weight], [], dtype, CPU)
    assert isinstance(linear, DenseLinear)
    assert torch.equal(linear.weight, weight.dequantize().to(dtype))


def test_parts_of_different_kinds_become_dense() -> None:
    parts = [packed_weight("q4_1", 64, 64), packed_weight("q8_0", 64, 64)]
    linear = make_linear(parts, [], torch.bfloat16, CPU)
    assert isinstance(linear, DenseLinear)
    expected = torch.cat([part.dequantize().bfloat16() for part in parts])
    assert torch.equal(linear.weight, expected)
