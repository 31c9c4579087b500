"""The fixed pool of KV blocks: who holds each block, and which contents can be used again.

Owns reference counts and the prefix cache. It knows blocks, counts and digests only: no sequences,
no scheduling, no tensors. Pure Python without torch; runs in the engine child's main thread.

Every block is in exactly one state:
- held: its reference count is the number of block tables that it is in;
- cached: nobody holds it, but its contents are known by a digest and can be taken up again;
- blank: nobody holds it and nothing is known of it.
Free means blank or cached. Blank blocks are handed out first, then the least recently released of
the cached ones.

A digest is BLAKE2b-256 over the digest of the block before and the block's own token ids; the
chain starts at a digest of the request's salt. So equal digests mean equal salt, equal tokens and
equal history, which is all that the KV of a block depends on. Two contents with one digest would
be a break of BLAKE2b, therefore a hit is served without comparing tokens.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

_DIGEST_BYTES = 32
# Different personalization keeps a salt from ever passing for a block, whatever its bytes are.
_SALT_PERSON = b"heedful-salt"
_BLOCK_PERSON = b"heedful-block"


def extend_digests(
    digests: list[bytes], token_ids: list[int], block_size: int, num_blocks: int, salt: bytes
) -> None:
    """Append to digests until it covers the first num_blocks full blocks of token_ids."""
    if len(digests) >= num_blocks:
        return
    if digests:
        parent = digests[-1]
    else:
        parent = blake2b(salt, digest_size=_DIGEST_BYTES, person=_SALT_PERSON).digest()
    for start in range(len(digests) * block_size, num_blocks * block_size, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + tokens, digest_size=_DIGEST_BYTES, person=_BLOCK_PERSON).digest()
        digests.append(parent)


class BlockManager:
    """Hands out KV blocks, counts who shares them and remembers the contents of full ones.

    Raises:
        ValueError: there would be no block, or none that holds a token.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks {num_blocks} and block_size {block_size} must be positive"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Descending, so that pop() hands out low ids first and a young pool stays compact.
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Keys in order of release: the first is the least recently used.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can hand out, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks whose contents can be found by digest, held ones included."""
        return len(self._block_of)

    def allocate(self, count: int = 1) -> list[int]:
        """Hand out count <= num_free blocks of unknown contents, each with one holder."""
        assert count <= self.num_free, f"{count} blocks are wanted, {self.num_free} are free"
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Count one more holder of each block, held or cached."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Count one holder less of each block of a table; a block without any becomes free."""
        # Backwards, because a block is of use only after those before it: evict it before them.
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} is released, but nobody holds it"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            if self._digests[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether more than one table holds a block, so that whoever writes to it needs a copy."""
        return self._ref_counts[block] > 1

    def replace_shared(self, block: int) -> int:
        """Return a new block in exchange for a hold on a shared one; the caller copies the KV."""
        assert self.is_shared(block), f"block {block} is not shared"
        (own,) = self.allocate()
        self._ref_counts[block] -= 1
        return own

    def num_unheld(self, blocks: list[int]) -> int:
        """Count the blocks that nobody holds, which sharing them would take from the free ones."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def num_freed(self, block_table: list[int], released: Counter[int]) -> int:
        """Count the blocks freed if a table were released too, and add it to those released."""
        freed = 0
        for block in block_table:
            released[block] += 1
            freed += released[block] == self._ref_counts[block]
        return freed

    def register(self, block: int, digest: bytes) -> None:
        """Let a held, full and computed block be found by its digest, unless an equal one is."""
        if not self.prefix_cache or digest in self._block_of:
            return
        assert self._ref_counts[block] > 0, f"block {block} is registered, but nobody holds it"
        assert self._digests[block] is None, f"block {block} is registered under two digests"
        self._block_of[digest] = block
        self._digests[block] = digest

    def match(self, digests: list[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix; they stay the caller's once shared."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless these tables are exactly what holds blocks."""
        held = Counter(block for table in block_tables for block in table)
        blank, cached = set(self._blank), set(self._cached)
        if len(blank) != len(self._blank) or blank & cached:
            raise AssertionError("a block is free twice")
        for block, (count, digest) in enumerate(zip(self._ref_counts, self._digests, strict=True)):
            if count != held[block]:
                raise AssertionError(f"block {block}: {count} holders counted, {held[block]} found")
            known = digest is not None
            if (block in blank, block in cached) != (not count and not known, not count and known):
                raise AssertionError(
                    f"block {block}: {count} holders, {known=}, in the wrong state"
                )
            if digest is not None and self._block_of.get(digest) != block:
                raise AssertionError(f"block {block} is not found by its digest")
        if len(self._block_of) != self.num_blocks - self._digests.count(None):
            raise AssertionError("a digest leads to a block that does not have it")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None
        del self._block_of[digest]
        self._digests[block] = None
        return block
