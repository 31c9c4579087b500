from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.lora import (
    LoraWeights,
    add_lora_,
    add_lora_reference_,
    plan_lora,
)
from torch import Tensor


def adapters(
    bounds: tuple[int, ...],
    columns: int,
    rank: int,
    device: torch.device,
    *,
    slots: int = 4,
    dtype: torch.dtype = torch.float32,
) -> LoraWeights:
    segments = len(bounds) - 1
    return LoraWeights(
        torch.randn(slots, segments * rank, columns).to(dtype).to(device),
        torch.randn(slots, bounds[-1], rank).to(dtype).to(device),
        (torch.rand(slots) + 0.5).to(device),
        bounds,
    )


def slots_of(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([(row * 7) % 5 - 1 for row in range(rows)], dtype=torch.int32).to(device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bounds", "columns", "rank", "rows"),
    [((0, 20), 40, 8, 1), ((0, 33, 50, 67), 70, 3, 19), ((0, 40, 80), 33, 16, 6)],
)
def test_every_row_gets_its_adapter(
    bounds: tuple[int, ...],
    columns: int,
    rank: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Callable[[torch.dtype], float],
) -> None:
    weights = adapters(bounds, columns, rank, device, dtype=dtype)
    x = torch.randn(rows, columns).to(dtype).to(device)
    y = torch.randn(rows, bounds[-1]).to(dtype).to(device)
    slots = slots_of(rows, device)
    exact, mine = y.double(), y.clone()
    add_lora_reference_(exact, x.double(), weights, slots)
    add_lora_(mine, x, weights, plan_lora(slots, 4))
    # h is a sum of `columns` products, rounded once to the dtype of b, and meets `rank` weights.
    delta = (exact - y.double()).abs()
    sizes = 3.5 * columns**0.5 * 3 * rank
    limit = roundoff(dtype) * (exact.abs() + sizes) + 2**-20 * sizes
    assert ((mine.double() - exact).abs() <= limit).all()
    assert torch.equal(mine[slots < 0], y[slots < 0])
    assert delta[slots >= 0].min(dim=1).values.sum() > 0 or rows == 1


@pytest.mark.triton
def test_a_row_is_the_same_bits_in_any_batch(device: torch.device) -> None:
    weights = adapters((0, 30, 60), 90, 4, device)
    x, y = torch.randn(25, 90, device=device), torch.randn(25, 60, device=device)
    slots = slots_of(25, device)
    together = y.clone()
    add_lora_(together, x, weights, plan_lora(slots, 4))
    for row in (0, 1, 24):
        alone = y[row : row + 1].clone()
        add_lora_(alone, x[row : row + 1], weights, plan_lora(slots[row : row + 1], 4))
        assert torch.equal(alone[0], together[row])


@pytest.mark.triton
def test_empty_batches_no_adapters_and_views(device: torch.device) -> None:
    weights = adapters((0, 12), 20, 4, device)
    none = torch.full((3,), -1, dtype=torch.int32, device=device)
    x, y = torch.randn(3, 20, device=device), torch.randn(3, 12, device=device)
    kept = y.clone()
    add_lora_(y, x, weights, plan_lora(none, 4))
    assert torch.equal(y, kept)
    add_lora_(y[:0], x[:0], weights, plan_lora(none[:0], 4))
    wide_x, wide_y = torch.zeros(3, 50, device=device), torch.zeros(3, 40, device=device)
    wide_x[:, 9:29], wide_y[:, 5:17] = x, y
    slots = torch.tensor([2, 0, 2], dtype=torch.int32, device=device)
    add_lora_(wide_y[:, 5:17], wide_x[:, 9:29], weights, plan_lora(slots, 4))
    add_lora_(y, x, weights, plan_lora(slots, 4))
    assert torch.equal(wide_y[:, 5:17], y)
    assert not wide_y[:, :5].any()
    assert not wide_y[:, 17:].any()


@pytest.mark.triton
def test_poison_in_other_slots_and_rows_does_not_spread(device: torch.device) -> None:
    weights = adapters((0, 12), 20, 4, device)
    x, y = torch.randn(3, 20, device=device), torch.randn(3, 12, device=device)
    slots = torch.tensor([1, 3, 1], dtype=torch.int32, device=device)
    clean = y.clone()
    add_lora_(clean, x, weights, plan_lora(slots, 4))
    weights.a[0], weights.b[3], x[1] = float("nan"), float("nan"), float("nan")
    add_lora_(y, x, weights, plan_lora(slots, 4))
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    weights = adapters((0, 12), 20, 4, device)
    plan = plan_lora(torch.tensor([1, -1], dtype=torch.int32, device=device), 4)
    torch.library.opcheck(
        torch.ops.heedful.add_lora_.default,
        (
            torch.randn(2, 12, device=device),
            torch.randn(2, 20, device=device),
            weights.a,
            weights.b,
            weights.scale,
            plan.order_T,
            plan.starts_S1,
            plan.slots_T,
            [0, 12],
            False,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_plan_lists_the_rows_of_each_slot() -> None:
    plan = plan_lora(torch.tensor([2, -1, 0, 2, -1], dtype=torch.int32), 4)
    assert plan.starts_S1.tolist() == [2, 3, 3, 5, 5]
    assert plan.order_T.tolist() == [1, 4, 2, 0, 3]


def test_misfits_are_refused_by_name() -> None:
    device = torch.device("cpu")
    weights = adapters((0, 12), 20, 4, device)
    plan = plan_lora(torch.tensor([1, -1], dtype=torch.int32), 4)
    x, y = torch.randn(2, 20), torch.randn(2, 12)
    with pytest.raises(RefusedInputError, match="do not go with x"):
        add_lora_(y, x[:, 1:], weights, plan)
    with pytest.raises(RefusedInputError, match="the plan is for"):
        add_lora_(y[:1], x[:1], weights, plan)
    with pytest.raises(RefusedInputError, match="bounds"):
        add_lora_(y, x, LoraWeights(weights.a, weights.b, weights.scale, (0, 11)), plan)
    with pytest.raises(RefusedInputError, match=r"must be \[T, K\]"):
        add_lora_(y[:, 1:], x, weights, plan)
    with pytest.raises(RefusedInputError, match="slots must be int32"):
        plan_lora(torch.tensor([1, -1]), 4)
