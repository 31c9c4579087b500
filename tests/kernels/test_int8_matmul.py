from collections.abc import Callable

import pytest
import torch
from heedful_kernels.bnb_layout import Int8Weight, dequantize_int8_reference, quantize_int8
from heedful_kernels.int8_matmul import int8_matmul
from heedful_kernels.launch import RefusedInputError
from torch import Tensor

Roundoff = Callable[[torch.dtype], float]


def within(y: Tensor, x: Tensor, weight: Int8Weight, bias: Tensor | None, roundoff: float) -> bool:
    w = dequantize_int8_reference(weight, torch.float64)
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ w.abs().T
    # Integers are exact in every dtype and sums are fp32: one rounding, of the result.
    return bool(((y.double() - exact).abs() <= roundoff * exact.abs() + 2**-20 * sizes).all())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 20, 128), (18, 33, 95), (3, 1, 7)])
def test_products_are_those_of_the_dequantized_weight(
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Roundoff,
) -> None:
    weight = quantize_int8(torch.randn(outputs, columns))
    weight = Int8Weight(weight.data.to(device), weight.scale.to(device))
    x = torch.randn(rows, columns).to(dtype).to(device)
    bias = torch.randn(outputs, device=device)
    assert within(int8_matmul(x, weight, bias), x, weight, bias, roundoff(dtype))
    assert within(int8_matmul(x, weight), x, weight, None, roundoff(dtype))


@pytest.mark.triton
def test_strides_many_rows_and_none(device: torch.device, roundoff: Roundoff) -> None:
    weight = quantize_int8(torch.randn(10, 40))
    weight = Int8Weight(weight.data.to(device), weight.scale.to(device))
    x = torch.randn(40, 70, device=device).T
    bias = torch.randn(10, device=device)
    assert within(int8_matmul(x, weight, bias), x, weight, bias, roundoff(torch.float32))
    assert within(int8_matmul(x[:5], weight), x[:5], weight, None, roundoff(torch.float32))
    assert int8_matmul(x[:0], weight).shape == (0, 10)


@pytest.mark.triton
def test_with_fixed_tiles_a_row_is_the_same_bits_in_any_batch(device: torch.device) -> None:
    weight = quantize_int8(torch.randn(40, 200))
    weight = Int8Weight(weight.data.to(device), weight.scale.to(device))
    x = torch.randn(80, 200, device=device).bfloat16()
    together = int8_matmul(x, weight, fixed_tiles=True)
    for row in (0, 33, 79):
        alone = int8_matmul(x[row : row + 1], weight, fixed_tiles=True)
        assert torch.equal(alone[0], together[row])


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    weight = quantize_int8(torch.randn(8, 24))
    torch.library.opcheck(
        torch.ops.heedful.int8_matmul.default,
        (
            torch.randn(2, 24, device=device),
            weight.data.to(device),
            weight.scale.to(device),
            None,
            False,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_misfits_are_refused_by_name() -> None:
    weight = quantize_int8(torch.randn(8, 24))
    x = torch.randn(2, 24)
    with pytest.raises(RefusedInputError, match="x must be"):
        int8_matmul(x[:, 1:], weight)
    with pytest.raises(RefusedInputError, match="contiguous int8"):
        int8_matmul(x, Int8Weight(weight.data.float(), weight.scale))
    with pytest.raises(RefusedInputError, match="scale must be"):
        int8_matmul(x, Int8Weight(weight.data, weight.scale[1:]))
    with pytest.raises(RefusedInputError, match="bias"):
        int8_matmul(x, weight, torch.randn(7))
