"""Dots with intervals, and bars, as SVG inside a page.

Owns their geometry; colours come from the page's style sheet by class. It knows nothing of what is
drawn. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _RIGHT = 860, 340, 60
_ROW, _TOP, _BOTTOM = 26, 10, 40
_TICKS = 5
_BAR, _BAR_HEIGHT, _GAP = 28, 130, 26


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a chart; ends that are not finite reach the edge."""

    label: str
    value: float
    low: float
    high: float
    kind: str  # class of the style sheet
    note: str = ""  # at the right edge


def intervals(marks: Sequence[Mark], equal: float, axis: str, scale: float = 1.0) -> str:
    """Return dots with intervals around the value that means "no difference".

    Args:
        marks: one a line.
        equal: where the line of no difference stands.
        axis: what the numbers are, with their unit.
        scale: numbers on the axis are multiplied by it.
    """
    low, high = _range(marks, equal)
    height = _TOP + _ROW * len(marks) + _BOTTOM
    floor = height - _BOTTOM

    def x(value: float) -> float:
        inside = min(max(value, low), high)
        return round(_LABEL + (inside - low) / (high - low) * (_WIDTH - _LABEL - _RIGHT), 1)

    parts = [_open(_WIDTH, height, axis)]
    for tick in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick)}" y1="{_TOP}" x2="{x(tick)}" y2="{floor}"/>')
        shown = f"{tick * scale:.3g}"
        parts.append(_text(x(tick), floor + 15, shown, "tick", "middle"))
    parts.append(f'<line class="equal" x1="{x(equal)}" y1="{_TOP}" x2="{x(equal)}" y2="{floor}"/>')
    parts.append(_text((_LABEL + _WIDTH - _RIGHT) / 2, height - 6, axis, "tick", "middle"))
    for number, mark in enumerate(marks):
        y = _TOP + _ROW * number + _ROW / 2
        parts += [
            _text(_LABEL - 12, y + 4, mark.label, "label", "end"),
            f'<line class="whisker {mark.kind}" x1="{x(mark.low)}" y1="{y}" x2="{x(mark.high)}" '
            f'y2="{y}"/>',
            f'<circle class="dot {mark.kind}" cx="{x(mark.value)}" cy="{y}" r="5"/>',
            _text(_WIDTH - _RIGHT + 10, y + 4, mark.note, "tick", "start"),
        ]
    return "\n".join([*parts, "</svg>"])


def bars(title: str, values: Sequence[str], groups: Mapping[str, Sequence[int]]) -> str:
    """Return counts as bars, those of one value side by side."""
    names = list(groups)
    most = max([1, *(count for counts in groups.values() for count in counts)])
    step = _BAR * len(names) + _GAP
    width, floor = max(320, step * len(values) + _GAP), _BAR_HEIGHT + 26
    parts = [_open(width, floor + 44, title)]
    for place, value in enumerate(values):
        left = _GAP + step * place
        for number, name in enumerate(names):
            count = groups[name][place]
            tall = round(count / most * _BAR_HEIGHT, 1)
            at = left + _BAR * number
            parts += [
                f'<rect class="bar{number}" x="{at}" y="{floor - tall}" width="{_BAR - 3}" '
                f'height="{tall}"/>',
                _text(at + _BAR / 2 - 1.5, floor - tall - 4, str(count), "tick", "middle"),
            ]
        parts.append(_text(left + _BAR * len(names) / 2, floor + 16, value, "tick", "middle"))
    for number, name in enumerate(names):
        at = _GAP + 150 * number
        parts += [
            f'<rect class="bar{number}" x="{at}" y="{floor + 26}" width="12" height="12"/>',
            _text(at + 18, floor + 36, name, "tick", "start"),
        ]
    return "\n".join([*parts, "</svg>"])


def _range(marks: Sequence[Mark], equal: float) -> tuple[float, float]:
    values = [equal]
    for mark in marks:
        values += [end for end in (mark.value, mark.low, mark.high) if math.isfinite(end)]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or max(abs(equal), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
