from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.rmsnorm import add_rmsnorm_, rmsnorm, rmsnorm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bound(roundoff: float, exact: torch.Tensor, size: int) -> torch.Tensor:
    # One rounding at the end, and fp32's roundings along the sum of squares (half in the root).
    return exact.abs() * (roundoff + 2**-24 * (size**0.5 + 8)) + 1e-30


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 576), (2, 1000)])
def test_rows_are_normalised(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Callable[[torch.dtype], float],
) -> None:
    x = (torch.randn(shape) * 3).to(dtype).to(device)
    weight = torch.randn(shape[1], device=device)
    exact = rmsnorm_reference(x.double(), weight.double(), 1e-5, torch.float64)
    for out_dtype in (None, torch.float32):
        y = rmsnorm(x, weight, 1e-5, out_dtype=out_dtype)
        assert y.dtype == (out_dtype or dtype)
        assert ((y.double() - exact).abs() <= bound(roundoff(y.dtype), exact, shape[1])).all()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_kept_and_normalised_before_it_is_rounded(
    dtype: torch.dtype, device: torch.device, roundoff: Callable[[torch.dtype], float]
) -> None:
    x = torch.randn(4, 100).to(dtype).to(device)
    residual = (torch.randn(4, 100) * 5).to(device)
    kept, weight = residual.clone(), torch.randn(100, device=device)
    y = add_rmsnorm_(x, residual, weight, 1e-6, out_dtype=dtype)
    assert torch.equal(residual, kept + x.float())
    exact = rmsnorm_reference(kept.double() + x.double(), weight.double(), 1e-6, torch.float64)
    assert ((y.double() - exact).abs() <= bound(roundoff(dtype), exact, 100) + 1e-6).all()
    short = kept.to(torch.bfloat16)
    before = short.clone()
    add_rmsnorm_(x, short, weight, 1e-6)
    total = before.float() + x.float()
    assert ((short.float() - total).abs() <= roundoff(torch.bfloat16) * total.abs()).all()


@pytest.mark.triton
def test_heads_are_normalised_by_themselves_and_strides_do_not_matter(
    device: torch.device,
) -> None:
    wide = torch.randn(6, 200, device=device)
    x = wide[:, 20:110].view(6, 3, 30)
    weight = torch.randn(3, 30, device=device)
    y = rmsnorm(x, weight, 1e-6)
    for head in range(3):
        alone = rmsnorm(x[:, head], weight[head], 1e-6)
        assert torch.equal(y[:, head], alone)
    assert torch.equal(rmsnorm(wide[:, ::2], weight[0, :1].expand(100), 1e-6).isnan().any(),
                       torch.tensor(False, device=device))  # fmt: skip
    torch.testing.assert_close(
        rmsnorm(wide.T, torch.ones(6, device=device), 1e-6),
        rmsnorm(wide.T.contiguous(), torch.ones(6, device=device), 1e-6),
        atol=0,
        rtol=0,
    )


@pytest.mark.triton
def test_rows_do_not_see_each_other_and_may_be_none(device: torch.device) -> None:
    x, weight = torch.randn(5, 77, device=device), torch.randn(77, device=device)
    poisoned = x.clone()
    poisoned[1:4] = float("nan")
    assert torch.equal(rmsnorm(poisoned, weight, 1e-6)[[0, 4]], rmsnorm(x, weight, 1e-6)[[0, 4]])
    assert rmsnorm(x[:0], weight, 1e-6).shape == (0, 77)
    assert add_rmsnorm_(x[:0], x[:0].clone(), weight, 1e-6).shape == (0, 77)


@pytest.mark.triton
def test_operators_are_registered_as_torch_wants_them(device: torch.device) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.heedful.rmsnorm.default, (x, weight, 1e-6, torch.bfloat16), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.heedful.add_rmsnorm_.default,
        (x, x.clone(), weight, 1e-6, torch.float32),
        test_utils=checks,
    )


def test_the_plain_process_computes_the_reference() -> None:
    x, weight = torch.randn(3, 10, dtype=torch.float64), torch.randn(10)
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rmsnorm(x, weight, 1e-6), expected)
    residual = torch.randn(3, 10, dtype=torch.float64)
    total = residual + x
    y = add_rmsnorm_(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    torch.testing.assert_close(y, rmsnorm(total, weight, 1e-6))


def test_misfits_are_refused_by_name() -> None:
    x, weight = torch.randn(3, 10), torch.randn(10)
    with pytest.raises(RefusedInputError, match="does not fit"):
        rmsnorm(x, weight[1:], 1e-6)
    with pytest.raises(RefusedInputError, match="must be"):
        rmsnorm(x[0], weight, 1e-6)
    with pytest.raises(RefusedInputError, match="alike"):
        add_rmsnorm_(x, x[:2], weight, 1e-6)
    with pytest.raises(RefusedInputError, match="contiguous"):
        add_rmsnorm_(x, torch.randn(10, 3).T, weight, 1e-6)
