"""Cutting examples into micro-batches."""

from heedful_trainer.packing import cut
from hypothesis import given
from hypothesis import strategies as st


def test_groups_are_of_like_size_and_filled_to_the_limit() -> None:
    assert cut([3, 9, 4, 20, 5], 12) == [[3], [1], [4, 2, 0]]
    assert cut([], 12) == []


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_every_example_is_in_one_group_within_the_limit(sizes: list[int], most: int) -> None:
    groups = cut(sizes, most)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[i] for i in group) <= most
