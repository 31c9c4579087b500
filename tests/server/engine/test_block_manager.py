"""The pool of KV blocks: holders are counted exactly, known contents are found again."""

from array import array
from collections import Counter

import pytest
from heedful_server.engine.block_manager import BlockManager, extend_digests
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

BLOCK_SIZE = 2


def digests(tokens: list[int], salt: bytes = b"", block_size: int = BLOCK_SIZE) -> list[bytes]:
    chain: list[bytes] = []
    extend_digests(chain, tokens, block_size, len(tokens) // block_size, salt)
    return chain


def cached_chain(manager: BlockManager, tokens: list[int]) -> list[int]:
    """Blocks that were computed, registered and released by a sequence that is gone."""
    chain = digests(tokens)
    table = manager.allocate(len(chain))
    for block, digest in zip(table, chain, strict=True):
        manager.register(block, digest)
    manager.release(table)
    return table


def test_a_digest_depends_on_the_salt_and_on_every_token_up_to_the_end_of_its_block():
    first, second = digests([1, 2, 3, 4])
    assert digests([1, 2, 3, 4]) == [first, second]
    assert digests([1, 2, 3, 5]) == [first, digests([1, 2, 3, 5])[1]]
    assert len({second, *digests([1, 2, 3, 5]), *digests([1, 5, 3, 4])}) == 5
    assert not {first, second} & set(digests([1, 2, 3, 4], salt=b"other"))
    assert not {first, second} & set(digests([1, 2, 3, 4], block_size=1))


def test_a_salt_cannot_be_chosen_so_that_it_continues_anothers_chain():
    victim = digests([1, 2, 3, 4, 5, 6])
    hashed_into_second = victim[0] + array("q", [3, 4]).tobytes()
    assert digests([5, 6], salt=hashed_into_second)[0] != victim[2]


def test_digests_are_extended_in_place_and_only_as_far_as_asked():
    chain: list[bytes] = []
    tokens = [1, 2, 3, 4, 5]
    extend_digests(chain, tokens, BLOCK_SIZE, 1, b"")
    assert chain == digests([1, 2])
    extend_digests(chain, tokens, BLOCK_SIZE, 2, b"")
    assert chain == digests([1, 2, 3, 4])
    extend_digests(chain, tokens, BLOCK_SIZE, 1, b"")
    assert chain == digests([1, 2, 3, 4])


def test_known_blocks_are_found_up_to_the_first_unknown_one():
    manager = BlockManager(4, BLOCK_SIZE)
    table = cached_chain(manager, [1, 2, 3, 4])
    assert manager.match(digests([1, 2, 3, 4, 5, 6])) == table
    assert manager.match(digests([1, 2, 9, 9])) == table[:1]
    assert manager.match(digests([9, 9, 3, 4])) == []
    assert manager.match(digests([1, 2], salt=b"other")) == []


def test_the_tail_of_the_least_recently_released_chain_is_evicted_first():
    manager = BlockManager(4, BLOCK_SIZE)
    old = cached_chain(manager, [1, 1, 2, 2])
    new = cached_chain(manager, [3, 3, 4, 4])
    assert manager.allocate() == [old[1]]
    assert manager.match(digests([1, 1, 2, 2])) == old[:1]
    manager.share(old[:1])
    manager.release(old[:1])
    assert manager.allocate(2) == [new[1], new[0]]
    assert manager.match(digests([1, 1])) == old[:1]


def test_blank_blocks_are_used_up_before_known_ones():
    manager = BlockManager(3, BLOCK_SIZE)
    (known,) = cached_chain(manager, [1, 1])
    assert known not in manager.allocate(2)
    assert manager.num_free == 1
    assert manager.allocate() == [known]
    assert manager.num_cached == 0


def test_a_held_block_stays_known_and_is_never_evicted():
    manager = BlockManager(2, BLOCK_SIZE)
    (known,) = cached_chain(manager, [1, 1])
    manager.share([known])
    (other,) = manager.allocate()
    assert (manager.num_free, manager.num_cached) == (0, 1)
    assert manager.match(digests([1, 1])) == [known]
    with pytest.raises(AssertionError, match="1 blocks are wanted, 0 are free"):
        manager.allocate()
    manager.check_integrity([[known], [other]])


def test_of_two_blocks_with_equal_contents_the_first_is_known():
    manager = BlockManager(2, BLOCK_SIZE)
    (digest,) = digests([1, 1])
    first, second = manager.allocate(2)
    manager.register(first, digest)
    manager.register(second, digest)
    assert manager.match([digest]) == [first]
    manager.release([second])
    assert manager.num_cached == 1
    manager.check_integrity([[first]])


def test_without_prefix_cache_nothing_is_known():
    manager = BlockManager(2, BLOCK_SIZE, prefix_cache=False)
    cached_chain(manager, [1, 1])
    assert manager.num_cached == 0
    assert manager.match(digests([1, 1])) == []


def test_a_shared_block_is_replaced_for_one_holder_only():
    manager = BlockManager(3, BLOCK_SIZE)
    (shared,) = manager.allocate()
    manager.share([shared])
    own = manager.replace_shared(shared)
    assert own != shared
    assert not manager.is_shared(shared)
    with pytest.raises(AssertionError, match="not shared"):
        manager.replace_shared(shared)
    manager.check_integrity([[shared], [own]])


def test_blocks_freed_together_are_counted_once_their_last_holder_is_released():
    manager = BlockManager(4, BLOCK_SIZE)
    prompt = manager.allocate(2)
    manager.share(prompt)
    tables = [[*prompt, *manager.allocate()], prompt]
    released: Counter[int] = Counter()
    assert manager.num_freed(tables[0], released) == 1
    assert manager.num_freed(tables[1], released) == 2
    assert manager.num_freed(tables[1], Counter()) == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0), (-1, 16)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int):
    with pytest.raises(ValueError, match="must be positive"):
        BlockManager(num_blocks, block_size)


def test_releasing_a_block_twice_is_an_error():
    manager = BlockManager(1, BLOCK_SIZE)
    table = manager.allocate()
    manager.release(table)
    with pytest.raises(AssertionError, match="nobody holds it"):
        manager.release(table)


@pytest.mark.parametrize("tables", [[], [[0, 1]], [[0], [0]], [[1]]])
def test_integrity_fails_when_tables_and_counts_differ(tables: list[list[int]]):
    manager = BlockManager(2, BLOCK_SIZE)
    assert manager.allocate() == [0]
    manager.check_integrity([[0]])
    with pytest.raises(AssertionError, match="holders counted"):
        manager.check_integrity(tables)


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls against a model that keeps the tables and the contents by block."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 6), prefix_cache=st.booleans())
    def start(self, num_blocks: int, prefix_cache: bool) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, prefix_cache)
        self.held: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @precondition(lambda self: self.manager.num_free > 0)
    @rule(target=tables, data=st.data())
    def allocate(self, data: st.DataObject) -> list[int]:
        table = self.manager.allocate(data.draw(st.integers(1, self.manager.num_free)))
        assert not {block for held in self.held for block in held} & set(table)
        for block in table:
            self.contents.pop(block, None)
        self.held.append(table)
        return table

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), max_size=8))
    def match(self, tokens: list[int]) -> object:
        table = self.manager.match(digests(tokens))
        assert [self.contents[block] for block in table] == digests(tokens)[: len(table)]
        if not table:
            return multiple()
        num_free = self.manager.num_free - self.manager.num_unheld(table)
        self.manager.share(table)
        assert self.manager.num_free == num_free
        self.held.append(table)
        return table

    @rule(table=tables, tokens=st.lists(st.integers(0, 1), max_size=8))
    def register(self, table: list[int], tokens: list[int]) -> None:
        for block, digest in zip(table, digests(tokens), strict=False):
            if self.manager.prefix_cache and block not in self.contents:
                known = digest in self.contents.values()
                self.manager.register(block, digest)
                if not known:
                    self.contents[block] = digest

    @rule(target=tables, table=tables)
    def fork(self, table: list[int]) -> list[int]:
        self.manager.share(table)
        self.held.append(table.copy())
        return self.held[-1]

    @precondition(lambda self: self.manager.num_free > 0)
    @rule(table=tables, data=st.data())
    def write(self, table: list[int], data: st.DataObject) -> None:
        idx = data.draw(st.integers(0, len(table) - 1))
        if self.manager.is_shared(table[idx]):
            table[idx] = self.manager.replace_shared(table[idx])
            self.contents.pop(table[idx], None)

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        freed = self.manager.num_freed(table, Counter())
        num_free = self.manager.num_free
        self.manager.release(table)
        assert self.manager.num_free == num_free + freed
        self.held = [other for other in self.held if other is not table]

    @invariant()
    def nothing_leaks(self) -> None:
        self.manager.check_integrity(self.held)
        holders = Counter(block for table in self.held for block in table)
        assert self.manager.num_free == self.manager.num_blocks - len(holders)
        assert self.manager.num_cached == len(self.contents)
        assert all(self.manager.is_shared(block) == (n > 1) for block, n in holders.items())


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_calls_keeps_the_pool_whole = PoolMachine.TestCase
