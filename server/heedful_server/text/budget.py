"""Counts what the rendering of one chat template may still cost.

Knows nothing of templates: it measures values and adds up. One `Budget` belongs to one render, in
one thread.
"""

import time

from jinja2.exceptions import SecurityError

SIZE_MAX = 8 << 20
SPEND_MAX = 64 << 20
RENDER_MAX_S = 2.0

# Containers and numbers cost more than characters; this bounds the walk through nested values.
_CONTAINER_SIZE = 64
_SCALAR_SIZE = 8


class Budget:
    """What one render has left, in characters and items."""

    def __init__(self) -> None:
        self._left = SPEND_MAX
        self._deadline = time.monotonic() + RENDER_MAX_S

    def spend(self, amount: int) -> None:
        """Charge an operation that makes `amount` characters or items.

        Raises:
            SecurityError: the value is too large, or the render has used up its budget or its time.
        """
        if amount > SIZE_MAX:
            raise SecurityError(f"it makes a value of more than {SIZE_MAX} characters")
        self._left -= amount + 1
        if self._left < 0:
            raise SecurityError("it makes more text than a prompt needs")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {RENDER_MAX_S:g} seconds")


def size_of(value: object) -> int:
    """Return the characters and items that a value would take if it were written out.

    Counts shared parts every time, because comparing or printing visits them every time; stops
    counting beyond SIZE_MAX.
    """
    size = 0
    pending = [value]
    while pending and size <= SIZE_MAX:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += _CONTAINER_SIZE
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            size += _CONTAINER_SIZE
            pending += item
        else:
            size += _SCALAR_SIZE
    return size
