from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.layernorm import add_layernorm_, layernorm, layernorm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 576), (2, 1000)])
def test_rows_are_normalised(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Callable[[torch.dtype], float],
) -> None:
    x = (torch.randn(shape) * 3 + 20).to(dtype).to(device)
    weight, bias = torch.randn(2, shape[1], device=device)
    exact = layernorm_reference(x.double(), weight.double(), bias.double(), 1e-5, torch.float64)
    y = layernorm(x, weight, bias, 1e-5)
    assert y.dtype == dtype
    # The mean of about 20 is known to 2^-24 of itself times the roundings of a sum, and the
    # deviation, about 3, divides that error; a single value has no deviation but eps.
    spread = 3.0 if shape[1] > 1 else 1e-5**0.5
    error = 20 * 2**-24 * (shape[1] ** 0.5 + 4) / spread * weight.abs().max() * 3
    limit = roundoff(dtype) * exact.abs() + error
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.triton
def test_the_sum_is_kept_and_normalised(device: torch.device) -> None:
    x = torch.randn(4, 100).bfloat16().to(device)
    residual = torch.randn(4, 100, device=device)
    weight, bias = torch.randn(2, 100, device=device)
    total = residual + x.float()
    y = add_layernorm_(x, residual, weight, bias, 1e-5, out_dtype=torch.float32)
    assert torch.equal(residual, total)
    torch.testing.assert_close(
        y, layernorm_reference(total, weight, bias, 1e-5, torch.float32), atol=2e-6, rtol=1e-5
    )


@pytest.mark.triton
def test_strides_empty_inputs_and_neighbours_do_not_matter(device: torch.device) -> None:
    x = torch.randn(50, 6, device=device).T
    weight, bias = torch.randn(2, 50, device=device)
    y = layernorm(x, weight, bias, 1e-5)
    assert torch.equal(y, layernorm(x.contiguous(), weight, bias, 1e-5))
    poisoned = x.clone()
    poisoned[1:] = float("nan")
    assert torch.equal(layernorm(poisoned, weight, bias, 1e-5)[0], y[0])
    assert layernorm(x[:0], weight, bias, 1e-5).shape == (0, 50)


@pytest.mark.triton
def test_operators_are_registered_as_torch_wants_them(device: torch.device) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.heedful.layernorm.default,
        (x, weight, weight, 1e-6, torch.bfloat16),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.heedful.add_layernorm_.default,
        (x, x.clone(), weight, weight, 1e-6, torch.float32),
        test_utils=checks,
    )


def test_misfits_are_refused_by_name() -> None:
    x, weight = torch.randn(3, 10), torch.randn(10)
    with pytest.raises(RefusedInputError, match="must be"):
        layernorm(x, weight, weight[1:], 1e-6)
    with pytest.raises(RefusedInputError, match="alike"):
        add_layernorm_(x, x[:2], weight, weight, 1e-6)
