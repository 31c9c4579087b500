"""The report of an evaluation as one HTML page without scripts, fonts or images from elsewhere.

Owns the words and their order. Every figure has its n and its interval; a task that was not done
says what it needs. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from heedful_trainer.evaluation import charts
from heedful_trainer.evaluation.figures import MIN_UNITS, Estimate, Figure, Reading
from heedful_trainer.evaluation.run import Evaluation
from heedful_trainer.evaluation.section import Section

_KINDS = {
    "better": "better",
    "worse": "worse",
    "higher": "moved",
    "lower": "moved",
}
_ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}
_READINGS: tuple[Reading, ...] = (
    "better",
    "worse",
    "higher",
    "lower",
    "no difference shown",
    "n too small",
)


def page_of(evaluation: Evaluation) -> str:
    """Return the page."""
    subject = evaluation.subject
    alone = subject.version == subject.baseline
    title = f"Evaluation of {subject.version}"
    title += "" if alone else f" against {subject.baseline}"
    style = resources.files("heedful_trainer.evaluation").joinpath("page.css").read_text("utf-8")
    done = [section for section in evaluation.sections if section.status == "done"]
    skipped = [section for section in evaluation.sections if section.status == "skipped"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            *_head(evaluation, done, alone),
            *_charts(done),
            *_table(done, subject.version, subject.baseline, alone),
            *_people(done),
            *_notes(done),
            *_skipped(skipped),
            *_data(done),
            *_how_to_read(alone),
            "</main></body></html>",
            "",
        ]
    )


def number(value: float, unit: str) -> str:
    """Return a value as people read it: shares in per cent, losses to a thousandth of a nat."""
    if not math.isfinite(value):
        return "?"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.{3 if unit == 'nats a token' else 2 if abs(value) < 100 else 1}f}"


def _head(evaluation: Evaluation, done: Sequence[Section], alone: bool) -> Iterator[str]:
    subject = evaluation.subject
    yield (
        f'<p class="meta">{escape(subject.base_model)} ({escape(subject.quantization)}) · project '
        f"{escape(subject.project)} · {evaluation.made:%Y-%m-%d %H:%M} UTC · at most "
        f"{evaluation.limit} items a figure · seed {evaluation.seed} · heedful "
        f"{escape(evaluation.program)}</p>"
    )
    if evaluation.ended_early:
        yield f'<p class="warning">Ended early: {escape(evaluation.ended_early)}</p>'
    if alone:
        yield (
            "<p>Version and baseline are the same policy, so nothing is compared. "
            "Name another with <code>--against</code>.</p>"
        )
        return
    found = Counter(figure.reading for section in done for figure in section.figures)
    cells = (
        f'<li class="{_KINDS.get(reading, "undecided")}"><b>{found[reading]}</b> {reading}</li>'
        for reading in _READINGS
        if found[reading]
    )
    yield f'<ul class="summary">{"".join(cells)}</ul>'


def _charts(done: Sequence[Section]) -> Iterator[str]:
    every = [figure for section in done for figure in section.figures]
    wins = [figure for figure in every if figure.reference is not None]
    shares = [figure for figure in every if figure.difference and figure.unit == "share"]
    losses = [figure for figure in every if figure.difference and figure.unit == "nats a token"]
    if wins:
        yield "<h2>Win rates</h2>"
        yield charts.intervals(_marks(wins), 0.5, "won by the version, %", 100)
    if shares:
        yield "<h2>Differences to the baseline</h2>"
        axis = "version less baseline, percentage points"
        yield charts.intervals(_marks(shares), 0.0, axis, 100)
    if losses:
        yield "<h2>Language-model loss</h2>"
        yield charts.intervals(_marks(losses), 0.0, "version less baseline, nats a token")


def _marks(figures: Sequence[Figure]) -> list[charts.Mark]:
    marks = []
    for figure in figures:
        if figure.compared is not None:
            found, _ = figure.compared
            label = f"{figure.name} {_ARROWS[figure.better]}"
            kind = _KINDS.get(figure.reading, "undecided")
            ends = (found.value, found.low, found.high)
            marks.append(charts.Mark(label, *ends, kind, f"n = {found.n}"))
    return marks


def _table(done: Sequence[Section], version: str, baseline: str, alone: bool) -> Iterator[str]:
    sections = [section for section in done if section.figures]
    if not sections:
        return
    heads = ["figure", "n", escape(version)]
    heads += [] if alone else [escape(baseline), "difference", "reading"]
    yield "<h2>Every figure</h2>"
    yield f'<div class="wide"><table><thead><tr>{_cells(heads, "th")}</tr></thead>'
    for section in sections:
        title = escape(section.title)
        yield f'<tbody><tr class="group"><th colspan="{len(heads)}">{title}</th></tr>'
        for figure in section.figures:
            yield _row(figure, alone)
        yield "</tbody>"
    yield "</table></div>"


def _row(figure: Figure, alone: bool) -> str:
    arrow = _ARROWS[figure.better]
    detail = f"<small>{escape(figure.detail)}</small>" if figure.detail else ""
    unit = "" if figure.unit == "share" else f" <small>{escape(figure.unit)}</small>"
    name = f"{escape(figure.name)} {arrow}{unit}{detail}"
    cells = [f'<td class="name">{name}</td>', f"<td>{_n(figure)}</td>"]
    cells.append(f"<td>{_estimate(figure.version, figure.unit)}</td>")
    if not alone:
        cells.append(f"<td>{_estimate(figure.baseline, figure.unit)}</td>")
        cells.append(f"<td>{_estimate(figure.difference, figure.unit, signed=True)}</td>")
        kind = _KINDS.get(figure.reading, "undecided")
        cells.append(f'<td class="reading {kind}">{figure.reading}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _n(figure: Figure) -> str:
    counts = [item.n for item in (figure.version, figure.baseline) if item is not None]
    if figure.difference is not None or len(set(counts)) < 2:
        return str(counts[0]) if counts else "0"
    return " / ".join(map(str, counts))


def _estimate(found: Estimate | None, unit: str, signed: bool = False) -> str:
    if found is None:
        return "–"
    value = number(found.value, unit)
    if signed and unit == "share":
        value = f"{100 * found.value:+.1f}"
        ends = f"{_point(found.low)} to {_point(found.high)}"
    else:
        value = f"+{value}" if signed and found.value > 0 else value
        ends = f"{number(found.low, unit)} to {number(found.high, unit)}"
    return f"{value} <small>{ends}</small>"


def _point(value: float) -> str:
    return f"{100 * value:+.1f}" if math.isfinite(value) else "?"


def _people(done: Sequence[Section]) -> Iterator[str]:
    for section in done:
        for counts in section.counts:
            yield f"<h2>{escape(counts.title.capitalize())}</h2>"
            yield charts.bars(counts.title, counts.values, counts.by_version)


def _notes(done: Sequence[Section]) -> Iterator[str]:
    noted = [section for section in done if section.notes]
    if noted:
        yield "<h2>About these figures</h2><dl>"
        for section in noted:
            yield f"<dt>{escape(section.title)}</dt>"
            yield from (f"<dd>{escape(note)}</dd>" for note in section.notes)
        yield "</dl>"


def _skipped(skipped: Sequence[Section]) -> Iterator[str]:
    if skipped:
        yield "<h2>Not done</h2><dl>"
        for section in skipped:
            yield f"<dt>{escape(section.title)}</dt><dd>{escape(section.reason)}</dd>"
        yield "</dl>"


def _data(done: Sequence[Section]) -> Iterator[str]:
    used = [item for section in done for item in section.data]
    if not used:
        return
    heads = ["data set", "file", "licence", "from", "SHA-256"]
    yield '<h2>Data</h2><div class="wide"><table>'
    yield f"<thead><tr>{_cells(heads, 'th')}</tr></thead><tbody>"
    for item in used:
        digest = str(item.get("sha256", ""))[:12]
        if digest and not item["published"]:
            digest += " (not the file that this release knows)"
        keys = ("data_set", "file", "licence", "source")
        cells = [escape(str(item[key])) for key in keys]
        yield f"<tr>{_cells([*cells, digest], 'td')}</tr>"
    yield "</tbody></table></div>"


def _how_to_read(alone: bool) -> Iterator[str]:
    yield "<h2>How to read this</h2><ul>"
    yield "<li>Ranges are 95 % intervals; n counts independent items.</li>"
    yield "<li>↑ higher is better, ↓ lower is better.</li>"
    if not alone:
        yield (
            "<li>Both policies got the same items, prompts and seeds; differences are paired. "
            "Of twenty figures one interval misses by chance, so a single one is no proof.</li>"
        )
        yield f"<li>Below {MIN_UNITS} items nothing is concluded: <i>n too small</i>.</li>"
    yield "</ul>"


def _cells(cells: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
