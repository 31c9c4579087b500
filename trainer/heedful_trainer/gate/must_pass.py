"""The user's own must-pass prompts: a file of JSON lines, and whether answers satisfy it.

Owns the format: `prompt` (a text) or `messages`, one or more of `contains`, `not_contains` and
`regex` (a text or a list), and `max_tokens`. Reads one file; otherwise pure, any thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heedful

from heedful_trainer.errors import InvalidConfig
from heedful_trainer.gate.sampler import Answer
from heedful_trainer.gate.types import Check

_RULES = ("contains", "not_contains", "regex")
_KEYS = {"prompt", "messages", "max_tokens", *_RULES}


class MustPassError(InvalidConfig):
    """A line of the must-pass file is not what it should be."""


@dataclass(frozen=True, slots=True)
class MustPass:
    """A prompt of the user's own and what its greedy answer has to satisfy."""

    line: int  # in the file, from 1
    prompt: heedful.Prompt
    contains: tuple[str, ...]
    not_contains: tuple[str, ...]
    regex: tuple[str, ...]
    max_tokens: int


def read_must_pass(path: Path, max_tokens: int) -> list[MustPass]:
    """Return the rules of a must-pass file: JSON lines of a prompt with what its answer satisfies.

    Raises:
        MustPassError: the file cannot be read, or a line breaks a rule; the message names it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MustPassError(f"{path} cannot be read: {error}") from error
    rules = [
        _rule(f"{path}:{number}", number, line, max_tokens)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rules:
        raise MustPassError(f"{path} holds no prompt")
    return rules


def must_pass_check(rules: Sequence[MustPass], answers: Sequence[Answer]) -> Check:
    """Return whether every answer satisfies its rule; the detail names the first that does not."""
    problems = [
        f"line {rule.line}: {problem}"
        for rule, answer in zip(rules, answers, strict=True)
        if (problem := _problem(rule, answer.text))
    ]
    n = len(rules)
    detail = "; ".join(problems[:3]) or f"all {n} satisfied"
    if len(problems) > 3:
        detail += f"; and {len(problems) - 3} more"
    return Check(
        "must-pass",
        "fail" if problems else "pass",
        value=(n - len(problems)) / n,
        limit=1.0,
        n=n,
        detail=detail,
        overridable=False,
    )


def _rule(place: str, number: int, line: str, max_tokens: int) -> MustPass:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise MustPassError(f"{place}: is not JSON: {error}") from error
    if not isinstance(item, dict) or set(item) - _KEYS:
        raise MustPassError(f"{place}: only {', '.join(sorted(_KEYS))} are known")
    contains, not_contains, regex = (_texts(place, item, key) for key in _RULES)
    if not (contains or not_contains or regex):
        raise MustPassError(f"{place}: needs one of {', '.join(_RULES)}")
    for pattern in regex:
        try:
            re.compile(pattern)
        except re.error as error:
            raise MustPassError(f"{place}: regex {pattern!r}: {error}") from error
    budget = item.get("max_tokens", max_tokens)
    if not isinstance(budget, int) or budget < 1:
        raise MustPassError(f"{place}: max_tokens is a whole number above 0")
    return MustPass(number, _must_prompt(place, item), contains, not_contains, regex, budget)


def _must_prompt(place: str, item: Mapping[str, Any]) -> heedful.Prompt:
    if ("prompt" in item) == ("messages" in item):
        raise MustPassError(f"{place}: needs either prompt or messages")
    asked = [{"role": "user", "content": item.get("prompt")}]
    turns = item.get("messages", asked)
    try:
        messages = [heedful.Message(turn["role"], turn["content"]) for turn in turns]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(turn.content, str) for turn in messages):
        raise MustPassError(f"{place}: the prompt is a text, messages are role and content")
    return messages


def _texts(place: str, item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = item.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise MustPassError(f"{place}: {key} is a text or a list of texts")
    return tuple(texts)


def _problem(rule: MustPass, text: str) -> str:
    for part in rule.contains:
        if part not in text:
            return f"does not contain {part!r}"
    for part in rule.not_contains:
        if part in text:
            return f"contains {part!r}"
    for pattern in rule.regex:
        if not re.search(pattern, text):
            return f"does not match {pattern!r}"
    return ""
