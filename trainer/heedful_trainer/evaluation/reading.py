"""Lines of data files as checked values: CSV, JSON lines, JSON arrays.

Owns what an error says: file, line (or item) and field. It knows no data set. Pure, any thread.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from heedful_trainer.evaluation.datasets import DataUnusable, Loaded


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands, for errors."""

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """Return a field that is a text and not empty.

        Raises:
            DataUnusable: it is missing or something else.
        """
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, "has to be a text")
        return value.strip()

    def wrong(self, field: str, what: str) -> DataUnusable:
        """Return the error that says what is wrong with a field."""
        return DataUnusable(f"{self.place}, field {field!r}: {what}")


def csv_rows(file: Loaded, columns: Sequence[str]) -> list[Row]:
    """Return the records of a CSV file that has the columns.

    Raises:
        DataUnusable: a column is missing, or a record has more or fewer fields than the header.
    """
    reader = csv.DictReader(io.StringIO(file.text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        missing = [column for column in columns if column not in header]
        if missing:
            raise DataUnusable(
                f"{file.path}, line 1, field {missing[0]!r}: there is no such column"
            )
        return list(_csv_rows(file, reader))
    except csv.Error as error:
        raise DataUnusable(f"{file.path}, line {reader.line_num}: {error}") from None


def json_lines(file: Loaded) -> list[Row]:
    """Return the records of a file of JSON objects, one a line.

    Raises:
        DataUnusable: a line is something else.
    """
    rows = []
    for number, line in enumerate(file.text.splitlines(), start=1):
        if line.strip():
            place = f"{file.path}, line {number}"
            rows.append(_record(place, _parsed(place, line)))
    return rows


def json_items(file: Loaded) -> list[Row]:
    """Return the records of a file that is one JSON array of objects.

    Raises:
        DataUnusable: it is something else.
    """
    items = _parsed(str(file.path), file.text)
    if not isinstance(items, list):
        raise DataUnusable(f"{file.path}: has to be a JSON array")
    return [
        _record(f"{file.path}, item {number}", item) for number, item in enumerate(items, start=1)
    ]


def _csv_rows(file: Loaded, reader: csv.DictReader[str]) -> Iterator[Row]:
    for fields in reader:
        place = f"{file.path}, line {reader.line_num}"
        if None in fields or None in fields.values():
            raise DataUnusable(f"{place}: has more or fewer fields than the header")
        yield Row(place, dict(fields))


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataUnusable(f"{place}: is not JSON: {error}") from None


def _record(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataUnusable(f"{place}: has to be a JSON object")
    return Row(place, value)
