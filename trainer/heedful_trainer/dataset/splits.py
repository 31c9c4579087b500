"""Which part of a dataset a unit belongs to: train, validation, calibration or gate.

Owns the assignment: by hash, so that a prompt (or a person) stays in its part from run to run, with
a least number of units in every part so that a log of twenty comparisons can still be judged. Pure,
any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from heedful_trainer.config import DatasetSettings
from heedful_trainer.dataset.examples import Split

# Below this, one person more or less in a part would decide everything.
MIN_PEOPLE = 10
_MIN_UNITS = 10
_NOT_WORDS = re.compile(r"[\W_]+")
_NUMBERS = re.compile(r"\d+")


def cluster_of(messages: str, prompt_text: str) -> str:
    """Return the name of the prompts that count as the same one.

    Case, punctuation and numbers do not tell prompts apart, and of a conversation only the last
    turn counts: rather too many in one part than the same one in two.
    """
    text = json.loads(messages)[-1]["content"] if messages else prompt_text
    plain = _NUMBERS.sub("0", _NOT_WORDS.sub(" ", text.casefold())).strip()
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def assign(units: Iterable[str], settings: DatasetSettings) -> dict[str, Split]:
    """Return the part of each unit.

    Args:
        units: clusters, or people; repeats do not matter.
        settings: shares and the least number of units of the held-out parts.
    """
    place = {unit: _place(unit) for unit in units}
    bounds = _bounds(settings)
    parts = {unit: _part(at, bounds) for unit, at in place.items()}
    if len(place) < _MIN_UNITS:
        return parts
    in_order = sorted(place, key=lambda unit: (place[unit], unit))
    for split, low, high in bounds:
        missing = settings.min_held_out - sum(part == split for part in parts.values())
        spare = [unit for unit in in_order if parts[unit] == "train"]
        if high > low:
            parts |= dict.fromkeys(spare[: max(0, missing)], split)
    return parts


def _bounds(settings: DatasetSettings) -> list[tuple[Split, float, float]]:
    gate = settings.gate_share
    calibration = gate + settings.calibration_share
    validation = calibration + settings.validation_share
    return [
        ("gate", 0.0, gate),
        ("calibration", gate, calibration),
        ("validation", calibration, validation),
    ]


def _part(at: float, bounds: Iterable[tuple[Split, float, float]]) -> Split:
    return next((split for split, low, high in bounds if low <= at < high), "train")


def _place(unit: str) -> float:
    return int.from_bytes(hashlib.sha256(f"split:{unit}".encode()).digest()[:8], "big") / 2**64


def separate(clusters: Mapping[int, str], parts: Mapping[int, Split]) -> set[int]:
    """Return the events to leave out so that no prompt is in two parts.

    Needed where people are the units: two of them may ask the same. Training keeps its events, and
    what is held out gives way; of the held-out parts, the gate goes first.

    Args:
        clusters: cluster of each event.
        parts: part of each event.
    """
    order: tuple[Split, ...] = ("train", "gate", "validation", "calibration")
    owner: dict[str, Split] = {}
    for split in order:
        for event, cluster in clusters.items():
            if parts[event] == split:
                owner.setdefault(cluster, split)
    return {event for event, cluster in clusters.items() if parts[event] != owner[cluster]}
