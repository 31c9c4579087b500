"""Lines on a page: a small SVG, so that a report needs neither a plotting library nor a network.

Owns axes, lines and legend. It knows nothing of what is drawn. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 48
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7a4ea3", "#b8860b", "#444444")
_TICKS = 5

Points = Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """Return an SVG image of lines by name; points that are not finite are left out."""
    kept = {
        name: [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
        for name, points in lines.items()
    }
    every = [point for points in kept.values() for point in points]
    x_low, x_high = _range([x for x, _ in every])
    y_low, y_high = _range([y for _, y in every])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_HEIGHT / 2})">{escape(y_label)}</text>',
    ]
    for i in range(_TICKS):
        x = x_low + (x_high - x_low) * i / (_TICKS - 1)
        y = y_low + (y_high - y_low) * i / (_TICKS - 1)
        (at_x, bottom), (left, at_y) = place(x, y_low), place(x_low, y)
        parts += [
            f'<text x="{at_x}" y="{bottom + 16}" text-anchor="middle">{x:.3g}</text>',
            f'<text x="{left - 6}" y="{at_y + 4}" text-anchor="end">{y:.3g}</text>',
            f'<line x1="{left}" y1="{at_y}" x2="{_WIDTH - _RIGHT}" y2="{at_y}" stroke="#dddddd"/>',
        ]
    for i, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{_LEFT + 8}" y="{_TOP + 14 + 16 * i}" fill="{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _range(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
