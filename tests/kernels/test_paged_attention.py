from collections.abc import Callable

import pytest
import torch
from heedful_kernels.launch import RefusedInputError
from heedful_kernels.paged_attention import paged_attention, paged_attention_reference
from torch import Tensor

Batch = dict[str, Tensor]


def batch(
    sequences: list[tuple[int, int]],
    device: torch.device,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Sequences are (new tokens, context); blocks nobody owns and padding of tables are poison."""
    needed = [-(-context // block_size) for _, context in sequences]
    order = torch.randperm(sum(needed) + 3) + 1
    cache = torch.full((len(order) + 1, block_size, 2, kv_heads, d), float("nan"))
    tables = torch.full((len(sequences), max([*needed, 1]) + 2), 10**6, dtype=torch.int32)
    used = 0
    for idx, blocks in enumerate(needed):
        mine = order[used : used + blocks]
        tables[idx, :blocks] = mine
        written = torch.randn(blocks * block_size, 2, kv_heads, d)
        written[sequences[idx][1] :] = float("nan")
        cache[mine] = written.view(blocks, block_size, 2, kv_heads, d)
        used += blocks
    starts = torch.tensor([0, *(new for new, _ in sequences)]).cumsum(0).int()
    tensors = {
        "q_THD": torch.randn(int(starts[-1]), heads, d).to(dtype),
        "cache": cache.to(dtype),
        "block_tables_SN": tables,
        "query_starts_S1": starts,
        "context_lens_S": torch.tensor([context for _, context in sequences], dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def attend(tensors: Batch, *, split_tokens: int = 0, context: int = 0) -> Tensor:
    lens = tensors["context_lens_S"]
    return paged_attention(
        **tensors,
        scale=0.3,
        max_query_tokens=int(tensors["query_starts_S1"].diff().max()),
        max_context_tokens=max(context, int(lens.max())),
        split_tokens=split_tokens,
    )


def exact(tensors: Batch) -> Tensor:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    return paged_attention_reference(**wide, scale=0.3)


DECODES = [(1, 1), (1, 17), (1, 70), (1, 64)]
MIXED = [(1, 33), (7, 7), (0, 5), (5, 21), (1, 2), (19, 40)]


@pytest.mark.triton
@pytest.mark.parametrize("sequences", [DECODES, MIXED, [(40, 40)]])
@pytest.mark.parametrize("split_tokens", [0, 64])
def test_every_row_sees_its_own_context(
    sequences: list[tuple[int, int]], split_tokens: int, device: torch.device
) -> None:
    tensors = batch(sequences, device)
    out = attend(tensors, split_tokens=split_tokens, context=130)
    # An average of values of size one, with weights of fp32 accuracy.
    torch.testing.assert_close(out.double(), exact(tensors), atol=3e-6, rtol=0)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_lose_a_rounding_of_the_weights_and_one_of_the_result(
    dtype: torch.dtype, device: torch.device, roundoff: Callable[[torch.dtype], float]
) -> None:
    tensors = batch(MIXED, device, dtype=dtype)
    error = (attend(tensors).double() - exact(tensors)).abs()
    largest = float(tensors["cache"].float().nan_to_num().abs().max())
    assert error.max() < 3 * roundoff(dtype) * largest


@pytest.mark.triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "block_size"), [(9, 3, 20, 16), (2, 2, 8, 1), (6, 1, 48, 5)]
)
def test_odd_groups_heads_and_blocks(
    heads: int, kv_heads: int, d: int, block_size: int, device: torch.device
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "d": d, "block_size": block_size}
    tensors = batch([(1, 9), (6, 14)], device, **shape)
    torch.testing.assert_close(attend(tensors).double(), exact(tensors), atol=3e-6, rtol=0)


@pytest.mark.triton
def test_a_row_is_the_same_bits_in_any_batch_with_fixed_parts(device: torch.device) -> None:
    tensors = batch([(1, 90), (1, 33), (1, 150)], device)
    together = attend(tensors, split_tokens=64, context=400)
    for idx in range(3):
        alone = {
            **tensors,
            "q_THD": tensors["q_THD"][idx : idx + 1],
            "block_tables_SN": tensors["block_tables_SN"][idx : idx + 1],
            "query_starts_S1": tensors["query_starts_S1"][:2],
            "context_lens_S": tensors["context_lens_S"][idx : idx + 1],
        }
        assert torch.equal(attend(alone, split_tokens=64)[0], together[idx])


@pytest.mark.triton
@pytest.mark.parametrize("split_tokens", [0, 64])
def test_padding_rows_get_zeros_and_strides_do_not_matter(
    split_tokens: int, device: torch.device
) -> None:
    tensors = batch([(1, 70), (1, 9), (1, 0), (1, 0)], device)
    out = attend(tensors, split_tokens=split_tokens)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    wide = torch.randn(4, 200, device=device)
    wide[:, 7:71] = tensors["q_THD"].flatten(1)
    view = {**tensors, "q_THD": wide[:, 7:71].view(4, 4, 16)}
    assert torch.equal(attend(view, split_tokens=split_tokens), out)
    none = {**tensors, "q_THD": tensors["q_THD"][:0]}
    assert paged_attention(**none, scale=1.0, max_query_tokens=1, max_context_tokens=70).shape == (
        0,
        4,
        16,
    )


@pytest.mark.triton
def test_large_scores_do_not_overflow(device: torch.device) -> None:
    tensors = batch([(3, 40)], device)
    tensors["q_THD"] *= 300
    torch.testing.assert_close(attend(tensors).double(), exact(tensors), atol=2e-4, rtol=0)


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    tensors = batch([(1, 5)], device)
    torch.library.opcheck(
        torch.ops.heedful.paged_attention.default,
        (*tensors.values(), 1.0, 1, 5, 0),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_reference_attends_causally_over_the_block_table() -> None:
    tensors = batch([(3, 5)], torch.device("cpu"), heads=2, kv_heads=1, d=4, block_size=2)
    out = attend(tensors)
    blocks = tensors["block_tables_SN"][0, :3].long()
    k, v = tensors["cache"][blocks].flatten(0, 1)[:5, :, 0].unbind(1)
    for row in range(3):
        weights = (0.3 * k[: row + 3] @ tensors["q_THD"][row, 1]).softmax(0)
        torch.testing.assert_close(out[row, 1], weights @ v[: row + 3])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache", torch.zeros(5, 4, 2, 2, 8), "q must be"),
        ("q_THD", torch.zeros(3, 3, 16), "no multiple"),
        ("q_THD", torch.zeros(3, 4, 16, dtype=torch.float16), "q torch.float16"),
        ("context_lens_S", torch.zeros(1, dtype=torch.int64), "must be int32"),
    ],
)
def test_misfits_are_refused_by_name(name: str, value: Tensor, message: str) -> None:
    tensors = {**batch([(3, 5)], torch.device("cpu")), name: value}
    with pytest.raises(RefusedInputError, match=message):
        paged_attention(**tensors, scale=1.0, max_query_tokens=3, max_context_tokens=5)
    with pytest.raises(RefusedInputError, match="split_tokens"):
        attend(batch([(1, 1)], torch.device("cpu")), split_tokens=10)
