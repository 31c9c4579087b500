"""The prompts that simulated users ask, which ship with the package.

Owns reading `data/prompts.jsonl` (origin and licences: `data/SOURCES.md`) and keeping its two
parts apart: prompts of the part `evaluation` are never voted on. Any thread.
"""

from __future__ import annotations

import json
import random
from importlib import resources
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["votes", "evaluation"]


def read_prompts(split: Split) -> tuple[str, ...]:
    """Return the prompts of one part, in the order of the file."""
    folder = resources.files("heedful_trainer.simulation").joinpath("data")
    lines = folder.joinpath("prompts.jsonl").read_text("utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return tuple(item["prompt"] for item in items if item["split"] == split)


def draw_prompts(split: Split, count: int, seed: int) -> tuple[str, ...]:
    """Return prompts in an order drawn by the seed, each once before any comes again."""
    prompts = list(read_prompts(split))
    rng = random.Random(f"{seed}:{split}")
    drawn: list[str] = []
    while len(drawn) < count:
        rng.shuffle(prompts)
        drawn += prompts
    return tuple(drawn[:count])
