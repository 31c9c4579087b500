from collections.abc import Callable

import pytest
import torch
from heedful_kernels.dense_matmul import dense_matmul
from heedful_kernels.launch import RefusedInputError
from torch import Tensor

Roundoff = Callable[[torch.dtype], float]


def within(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, roundoff: float) -> bool:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T
    # Sums are fp32: one rounding, of the result.
    return bool(((y.double() - exact).abs() <= roundoff * exact.abs() + 2**-20 * sizes).all())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 20, 128), (18, 33, 95), (3, 1, 7)])
def test_products_are_exact_up_to_fp32_sums(
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Roundoff,
) -> None:
    weight = torch.randn(outputs, columns, device=device).to(dtype)
    x = torch.randn(columns, rows, device=device).to(dtype).T
    bias = torch.randn(outputs, device=device)
    assert within(dense_matmul(x, weight, bias), x, weight, bias, roundoff(dtype))
    assert within(dense_matmul(x, weight), x, weight, None, roundoff(dtype))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_the_same_bits_in_any_batch(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(40, 600, device=device).to(dtype)
    x, bias = torch.randn(80, 600, device=device).to(dtype), torch.randn(40, device=device)
    together = dense_matmul(x, weight, bias)
    for row in (0, 33, 79):
        assert torch.equal(dense_matmul(x[row : row + 1], weight, bias)[0], together[row])
    assert torch.equal(dense_matmul(x[20:37], weight, bias), together[20:37])


@pytest.mark.triton
def test_empty_products_and_neighbours_do_not_leak(device: torch.device) -> None:
    weight, x = torch.randn(20, 64, device=device), torch.randn(3, 64, device=device)
    assert dense_matmul(x[:0], weight).shape == (0, 20)
    bias = torch.randn(20, device=device)
    nothing = dense_matmul(x[:, :0], weight[:, :0].contiguous(), bias)
    assert torch.equal(nothing, bias.expand(3, 20))
    poisoned = x.clone()
    poisoned[1] = float("nan")
    assert torch.equal(dense_matmul(poisoned, weight)[[0, 2]], dense_matmul(x, weight)[[0, 2]])


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    x, weight = torch.randn(2, 24, device=device), torch.randn(8, 24, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.heedful.dense_matmul.default, (x, weight, None), test_utils=checks
    )


def test_misfits_are_refused_by_name() -> None:
    weight, x = torch.randn(8, 24), torch.randn(2, 24)
    with pytest.raises(RefusedInputError, match="x must be"):
        dense_matmul(x[:, 1:], weight)
    with pytest.raises(RefusedInputError, match="x must be"):
        dense_matmul(x.half(), weight)
    with pytest.raises(RefusedInputError, match="weight must be"):
        dense_matmul(x, torch.randn(24, 8).T)
    with pytest.raises(RefusedInputError, match="bias"):
        dense_matmul(x, weight, torch.randn(7))
