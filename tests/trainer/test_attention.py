"""Attention by segments against one table over all tokens, with gradients."""

import itertools

import pytest
import torch
from heedful_trainer.attention import Blocks, Segment, block_attention, make_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

ROWS = [(4, (3, 1, 2)), (1, (5,)), (7, ()), (2, (1, 1, 9, 2))]


def segments_of(rows: list[tuple[int, tuple[int, ...]]]) -> list[Segment]:
    found, at = [], 0
    for prompt, answers in rows:
        context = at, at + prompt
        found.append(Segment(*context, (0, 0)))
        at += prompt
        for answer in answers:
            found.append(Segment(at, at + answer, context))
            at += answer
    return found


def visible(segments: list[Segment]) -> Tensor:
    """Who sees whom, token by token."""
    size = max(segment.end for segment in segments)
    table = torch.zeros(size, size, dtype=torch.bool)
    for segment in segments:
        for query in range(segment.start, segment.end):
            table[query, segment.context[0] : segment.context[1]] = True
            table[query, segment.start : query + 1] = True
    return table


def operands(size: int, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)

    def make(count: int) -> Tensor:
        # As models hand them over: heads before tokens, not contiguous.
        x = torch.randn(1, size, count, 8, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2).requires_grad_()

    return make(heads), make(key_heads), make(key_heads)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, *, fused: bool) -> Tensor:
    found, weights = block_attention(
        nn.Identity(), query, key, value, None, scaling=0.3, blocks=blocks, fused=fused
    )
    assert weights is None
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [(1, ())], [(30, (40, 1, 39, 38))]])
def test_it_is_attention_over_what_each_token_may_see(
    rows: list[tuple[int, tuple[int, ...]]], heads: int, key_heads: int, fused: bool
) -> None:
    segments = segments_of(rows)
    table = visible(segments)
    ours = operands(len(table), heads, key_heads)
    theirs = tuple(x.detach().clone().requires_grad_() for x in ours)
    got = attend(*ours, make_blocks(segments), fused=fused)
    query, key, value = theirs
    shared = heads // key_heads
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~table, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).double()
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_token_may_not_see_does_not_reach_it(fused: bool) -> None:
    segments = segments_of([(3, (4, 5))])
    query, key, value = (x.detach() for x in operands(12, 2, 2))
    before = attend(query, key, value, make_blocks(segments), fused=fused)
    for x in (query, key, value):
        x[:, :, 7:] = torch.nan  # the second answer
    after = attend(query, key, value, make_blocks(segments), fused=fused)
    assert torch.equal(before[:, :7], after[:, :7])


lengths = st.integers(1, 60)
many_rows = st.lists(st.tuples(lengths, st.lists(lengths, max_size=5).map(tuple)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(rows=many_rows)
def test_every_token_has_one_place_and_little_is_padded(
    rows: list[tuple[int, tuple[int, ...]]],
) -> None:
    segments = segments_of(rows)
    made = make_blocks(segments)
    queries = torch.cat([block.query_SL.flatten() for block in made.blocks])
    size = max(segment.end for segment in segments)
    assert queries[made.place_T].tolist() == list(range(size))
    computed = sum(block.visible_S1LC.numel() for block in made.blocks)
    needed = sum(itertools.starmap(int.__mul__, (segment.size for segment in segments)))
    assert needed <= computed <= 1.3 * needed
