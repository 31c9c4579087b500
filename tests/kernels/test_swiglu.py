from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.swiglu import GateActivation, gated, gated_reference, geglu, swiglu


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 130), (2, 600)])
def test_products_are_the_formula_s(
    shape: tuple[int, int],
    activation: GateActivation,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Callable[[torch.dtype], float],
) -> None:
    x = (torch.randn(shape) * 3).to(dtype).to(device)
    exact = gated_reference(x.double(), activation)
    # One rounding to dtype; inside, a few fp32 operations of values of the size of gate * up.
    size = (x.double().chunk(2, 1)[0] * x.double().chunk(2, 1)[1]).abs()
    limit = roundoff(dtype) * exact.abs() + 2**-24 * 12 * size + 1e-7
    assert ((gated(x, activation).double() - exact).abs() <= limit).all()


@pytest.mark.triton
def test_extremes_strides_and_empty_inputs(device: torch.device) -> None:
    x = torch.tensor([[-1e30, -200.0, 200.0, 0.0] + [1.0] * 4], device=device)
    assert torch.equal(swiglu(x), torch.tensor([[0.0, 0.0, 200.0, 0.0]], device=device))
    assert torch.equal(geglu(x, tanh=True)[0, 1:], torch.tensor([0.0, 200.0, 0.0], device=device))
    wide = torch.randn(20, 7, device=device)
    assert torch.equal(geglu(wide.T), geglu(wide.T.contiguous()))
    assert swiglu(wide.T[:0]).shape == (0, 10)


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    torch.library.opcheck(
        torch.ops.heedful.gated.default,
        (torch.randn(3, 8, device=device), "silu"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_misfits_are_refused_by_name() -> None:
    with pytest.raises(RefusedInputError, match="must be a float"):
        swiglu(torch.randn(3, 7))
    with pytest.raises(RefusedInputError, match="no activation"):
        gated(torch.randn(3, 8), "mish")  # type: ignore[arg-type]
