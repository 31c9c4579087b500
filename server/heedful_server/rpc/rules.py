"""The checks that every validator is made of.

Owns how a broken rule is worded; each raises InvalidRequest with the field's path. Pure functions.
"""

from typing import TypeVar

from heedful_server.errors import InvalidRequest

T = TypeVar("T")


def require(field: str, holds: bool, reason: str) -> None:
    """Refuse the field unless the rule holds."""
    if not holds:
        raise InvalidRequest(field, reason)


def require_bytes(field: str, text: str, most: int) -> None:
    """Refuse a text longer than `most` bytes of UTF-8."""
    # A character is at least one byte, so most texts that are too long never get encoded.
    if len(text) > most or len(text.encode()) > most:
        raise InvalidRequest(field, f"must be at most {most} bytes of UTF-8")


def choice(field: str, value: int, choices: dict[int, T]) -> T:
    """Return what an enumeration's value stands for; refuse values that the contract lacks."""
    if value not in choices:
        raise InvalidRequest(field, f"{value} is not a value of the enumeration")
    return choices[value]


def number(field: str, value: float, low: float, high: float, above_low: bool = False) -> float:
    """Return a number within its range; refuse it elsewhere, and NaN."""
    # Comparisons with NaN are false, so NaN breaks every rule here.
    holds = low < value <= high if above_low else low <= value <= high
    bound = "above" if above_low else "at least"
    require(field, holds, f"must be {bound} {low:g} and at most {high:g}, not {value:g}")
    return value
