from collections.abc import Callable

import pytest
import torch
from heedful_kernels.bnb_layout import Nf4Weight, dequantize_nf4_reference, quantize_nf4
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.nf4_matmul import dequantize_nf4, nf4_matmul
from torch import Tensor

Roundoff = Callable[[torch.dtype], float]


def product(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The exact product with the dequantized weight, and the sum of its terms' sizes."""
    w = dequantize_nf4_reference(weight, torch.float64)
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    return exact, x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())


def within(y: Tensor, exact: Tensor, sizes: Tensor, roundoff: float) -> Tensor:
    # Each code is rounded once to the dtype of x (in the interpreter it is not), sums are fp32, and
    # the result is rounded once.
    return (y.double() - exact).abs() <= roundoff * exact.abs() + (roundoff + 2**-20) * sizes


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 20, 128), (17, 33, 192), (3, 16, 64)])
def test_products_are_those_of_the_dequantized_weight(
    rows: int,
    outputs: int,
    columns: int,
    nested: bool,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Roundoff,
) -> None:
    weight = quantize_nf4(torch.randn(outputs, columns), nested=nested).to(device)
    x = torch.randn(rows, columns).to(dtype).to(device)
    bias = torch.randn(outputs, device=device) if rows > 1 else None
    y = nf4_matmul(x, weight, bias)
    assert y.dtype == dtype
    assert y.shape == (rows, outputs)
    exact, sizes = product(x, weight, bias)
    assert within(y, exact, sizes, roundoff(dtype)).all()


@pytest.mark.triton
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_blocks_that_straddle_rows_and_strided_inputs(
    blocksize: int, device: torch.device, roundoff: Roundoff
) -> None:
    # 96 columns hold one and a half blocks of 64: the chunk does not divide them, unless it is 32.
    weight = quantize_nf4(torch.randn(24, 192), blocksize=blocksize).to(device)
    x = torch.randn(192, 5, device=device).bfloat16().T
    exact, sizes = product(x, weight, None)
    assert within(nf4_matmul(x, weight), exact, sizes, roundoff(torch.bfloat16)).all()
    odd = quantize_nf4(torch.randn(9, 50), blocksize=blocksize).to(device)
    x = torch.randn(3, 50, device=device)
    exact, sizes = product(x, odd, None)
    assert within(nf4_matmul(x, odd), exact, sizes, roundoff(torch.float32)).all()


@pytest.mark.triton
def test_many_rows_go_through_the_dequantized_weight(
    device: torch.device, roundoff: Roundoff
) -> None:
    weight = quantize_nf4(torch.randn(10, 64)).to(device)
    x = torch.randn(70, 64, device=device).half()
    exact, sizes = product(x, weight, None)
    assert within(nf4_matmul(x, weight), exact, sizes, roundoff(torch.float16)).all()


@pytest.mark.triton
def test_with_fixed_tiles_a_row_is_the_same_bits_in_any_batch(device: torch.device) -> None:
    weight = quantize_nf4(torch.randn(40, 256)).to(device)
    x = torch.randn(80, 256, device=device).bfloat16()
    together = nf4_matmul(x, weight, fixed_tiles=True)
    for row in (0, 33, 79):
        assert torch.equal(nf4_matmul(x[row : row + 1], weight, fixed_tiles=True)[0], together[row])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(6, 128, 64), (7, 33, 32), (1, 1, 64)])
def test_dequantized_values_are_rounded_once(
    rows: int,
    columns: int,
    blocksize: int,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Roundoff,
) -> None:
    for nested in (False, True):
        weight = quantize_nf4(torch.randn(rows, columns), blocksize=blocksize, nested=nested)
        exact = dequantize_nf4_reference(weight, torch.float64)
        mine = dequantize_nf4(weight.to(device), dtype).double().cpu()
        # Nested statistics are three fp32 operations, of which the sum may cancel.
        assert ((mine - exact).abs() <= (roundoff(dtype) + 2**-21) * exact.abs() + 1e-6).all()


@pytest.mark.triton
def test_nothing_in_nothing_out_and_neighbours_do_not_leak(device: torch.device) -> None:
    weight = quantize_nf4(torch.randn(20, 64)).to(device)
    x = torch.randn(3, 64, device=device)
    assert nf4_matmul(x[:0], weight).shape == (0, 20)
    poisoned = x.clone()
    poisoned[1] = float("nan")
    assert torch.equal(nf4_matmul(poisoned, weight)[[0, 2]], nf4_matmul(x, weight)[[0, 2]])


@pytest.mark.triton
def test_operators_are_registered_as_torch_wants_them(device: torch.device) -> None:
    weight = quantize_nf4(torch.randn(8, 64)).to(device)
    tensors = (
        weight.packed,
        weight.absmax,
        weight.code,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
    )
    checks = ("test_schema", "test_faketensor")
    x = torch.randn(2, 64, device=device)
    torch.library.opcheck(
        torch.ops.heedful.nf4_matmul.default,
        (x, *tensors, None, [8, 64, 64, 256], False),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.heedful.dequantize_nf4.default,
        (*tensors, [8, 64, 64, 256], torch.bfloat16),
        test_utils=checks,
    )


def test_misfits_are_refused_by_name() -> None:
    weight = quantize_nf4(torch.randn(8, 64))
    with pytest.raises(RefusedInputError, match="x must be"):
        nf4_matmul(torch.randn(2, 63), weight)
    with pytest.raises(RefusedInputError, match="x must be"):
        nf4_matmul(torch.randn(2, 64).double(), weight)
    with pytest.raises(RefusedInputError, match="bias"):
        nf4_matmul(torch.randn(2, 64), weight, torch.randn(7))
    with pytest.raises(RefusedInputError, match="dtype"):
        dequantize_nf4(weight, torch.int8)
