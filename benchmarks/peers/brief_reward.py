"""The reward of `ppo.py`: how brief an answer is, as one program for us and for peers.

Imports nothing but the standard library, since each peer lives in an environment of its own.
"""

import re
from collections.abc import Callable, Sequence

SCALE = 5.0
"""So that the deviation among answers is not far from 1, where β means what it usually does."""
_WORD = re.compile(r"\w+")


def reward(text: str, ended: bool) -> float:
    """Return 5 / (1 + words / 40), a word of a cut answer counting half more; -1 for no words."""
    words = len(_WORD.findall(text))
    if not words:
        return -1.0
    return SCALE / (1 + words * (1.0 if ended else 1.5) / 40)


def reward_of_ids(
    ids: Sequence[int], decode: Callable[[list[int]], str], end_token_id: int
) -> float:
    """Return the reward of an answer by its token ids; it ended if the last one says so."""
    ended = bool(ids) and ids[-1] == end_token_id
    return reward(decode(list(ids[:-1] if ended else ids)), ended)
