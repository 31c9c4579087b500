from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.rope_cache import rope_cache, rope_cache_reference
from torch import Tensor


def step(
    tokens: int, heads: int, kv_heads: int, d: int, pairs: int, device: torch.device
) -> dict[str, Tensor]:
    positions = torch.arange(tokens) * 37 % 1000
    angles = positions[:, None] * 0.9 ** torch.arange(pairs)[None]
    tensors = {
        "qkv_TQ": torch.randn(tokens, (heads + 2 * kv_heads) * d),
        "cos_TP": angles.cos(),
        "sin_TP": angles.sin(),
        "slots_T": torch.randperm(5 * 4)[:tokens],
        "cache": torch.full((5, 4, 2, kv_heads, d), float("nan")),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "pairs"), [(4, 2, 16, 8), (3, 1, 20, 5), (2, 2, 8, 0)]
)
def test_queries_and_cache_are_the_formula_s(
    heads: int,
    kv_heads: int,
    d: int,
    pairs: int,
    neighbours: bool,
    dtype: torch.dtype,
    device: torch.device,
    roundoff: Callable[[torch.dtype], float],
) -> None:
    inputs = step(7, heads, kv_heads, d, pairs, device)
    inputs["qkv_TQ"], inputs["cache"] = inputs["qkv_TQ"].to(dtype), inputs["cache"].to(dtype)
    inputs["slots_T"][3] = -1
    weights = torch.rand(heads + kv_heads, d, device=device) + 0.5
    for norm in (None, weights):
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        exact = rope_cache_reference(
            **wide, num_heads=heads, neighbours=neighbours, norm_weight_ND=norm, eps=1e-6
        )
        mine = {**inputs, "cache": inputs["cache"].clone()}
        q = rope_cache(
            **mine, num_heads=heads, neighbours=neighbours, norm_weight_ND=norm, eps=1e-6
        )
        # One rounding of a value, and a few of fp32 on terms of the size of a head's largest entry.
        size = float(wide["qkv_TQ"].abs().max()) * 1.5
        limit = roundoff(dtype) * exact.abs() + 2**-24 * 12 * size
        assert ((q.double() - exact).abs() <= limit).all()
        untouched = wide["cache"].isnan()
        assert torch.equal(mine["cache"].isnan(), untouched)
        assert int((~untouched).sum()) == 6 * 2 * kv_heads * d
        error = (mine["cache"].double() - wide["cache"]).abs()[~untouched]
        cached = wide["cache"].abs()[~untouched]
        assert (error <= roundoff(dtype) * cached + 2**-24 * 12 * size).all()


@pytest.mark.triton
def test_rows_of_a_wider_matrix_and_none_at_all(device: torch.device) -> None:
    inputs = step(6, 2, 1, 16, 8, device)
    q = rope_cache(**inputs, num_heads=2, neighbours=False)
    wide = torch.randn(6, 100, device=device)
    wide[:, 20:84] = inputs["qkv_TQ"]
    again = rope_cache(**{**inputs, "qkv_TQ": wide[:, 20:84]}, num_heads=2, neighbours=False)
    assert torch.equal(q, again)
    none = {n: t[:0] if n != "cache" else t for n, t in inputs.items()}
    assert rope_cache(**none, num_heads=2, neighbours=False).shape == (0, 2, 16)


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    inputs = step(3, 2, 1, 8, 4, device)
    inputs["cache"].zero_()
    torch.library.opcheck(
        torch.ops.heedful.rope_cache.default,
        (*inputs.values(), 2, True, None, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rotations_keep_scores_a_function_of_distance() -> None:
    d, frequencies = 8, torch.tensor([1.0, 0.5, 0.1, 0.01])
    x = torch.randn(1, 8).expand(6, 8).repeat(1, 3)
    scores = []
    for shift in (0, 11):
        angles = (torch.arange(6) + shift)[:, None] * frequencies
        cache = torch.zeros(2, 3, 2, 1, d)
        q = rope_cache(
            x, angles.cos(), angles.sin(), torch.arange(6), cache, num_heads=1, neighbours=False
        )
        scores.append(q[:, 0] @ cache.view(6, 2, d)[:, 0].T)
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache", torch.zeros(5, 4, 1, 2, 16), "cache must be"),
        ("qkv_TQ", torch.zeros(7, 100), "qkv must be"),
        ("slots_T", torch.zeros(7, dtype=torch.int32), "slots must be int64"),
        ("cos_TP", torch.zeros(7, 9), "cos"),
        ("qkv_TQ", torch.zeros(7, 128, dtype=torch.float16), "qkv torch.float16"),
    ],
)
def test_misfits_are_refused_by_name(name: str, value: Tensor, message: str) -> None:
    inputs = step(7, 4, 2, 16, 8, torch.device("cpu"))
    with pytest.raises(RefusedInputError, match=message):
        rope_cache(**{**inputs, name: value}, num_heads=4, neighbours=True)
