"""An evaluation: its tasks in the order of the report, and what came out.

Owns the list of tasks and what happens where one cannot be done: it is skipped with what to give,
and where the server goes away the sections that are done are kept. Event loop.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import heedful

from heedful_trainer.errors import InvalidConfig
from heedful_trainer.evaluation import datasets
from heedful_trainer.evaluation.asking import Asker
from heedful_trainer.evaluation.datasets import DataSet, Loaded
from heedful_trainer.evaluation.section import Context, Section, Skipped
from heedful_trainer.evaluation.tasks.gsm8k import gsm8k, read_problems
from heedful_trainer.evaluation.tasks.llmbar import llmbar, read_pairs
from heedful_trainer.evaluation.tasks.ratings import ratings
from heedful_trainer.evaluation.tasks.refusals import read_requests, refusals
from heedful_trainer.evaluation.tasks.reward import reward
from heedful_trainer.evaluation.tasks.text_loss import text_loss
from heedful_trainer.evaluation.tasks.toxicity import read_texts, toxicity
from heedful_trainer.evaluation.tasks.truthfulqa import read_questions, truthfulqa
from heedful_trainer.evaluation.tasks.votes import votes

Task = Callable[[Context], Awaitable[Section]]

TASKS: dict[str, tuple[str, Task]] = {
    "votes": ("Win rate: people's blind votes", votes),
    "ratings": ("People's grades and flags", ratings),
    "reward": ("Win rate: the project's reward model", reward),
    "truthfulqa": ("Truthfulness: TruthfulQA", truthfulqa),
    "toxicity": ("Toxicity of continuations", toxicity),
    "refusals": ("Over-refusal: XSTest", refusals),
    "gsm8k": ("Capability: GSM8K", gsm8k),
    "llmbar": ("Capability: LLMBar", llmbar),
    "text": ("Capability: language-model loss", text_loss),
}
_READERS: dict[str, tuple[DataSet, Callable[[Loaded], object]]] = {
    "truthfulqa": (datasets.TRUTHFULQA, read_questions),
    "toxicity": (datasets.TOXIC_PROMPTS, read_texts),
    "refusals": (datasets.XSTEST, read_requests),
    "gsm8k": (datasets.GSM8K, read_problems),
    "llmbar": (datasets.LLMBAR, read_pairs),
}
FORMAT = 1
"""Of the JSON file; grows where a reader of the last one would misread it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Which policies are compared, and where they are served."""

    version: str
    baseline: str
    project: str
    base_model: str
    quantization: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    subject: Subject
    sections: tuple[Section, ...]
    seed: int
    limit: int
    made: datetime
    program: str  # version of heedful
    error: heedful.HeedfulError | None = None  # that kept the last task from ending

    @property
    def ended_early(self) -> str:
        """Why not every task was done; empty where each was."""
        return str(self.error) if self.error is not None else ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "format": FORMAT,
            "version": self.subject.version,
            "baseline": self.subject.baseline,
            "project": self.subject.project,
            "base_model": self.subject.base_model,
            "quantization": self.subject.quantization,
            "seed": self.seed,
            "limit": self.limit,
            "confidence": 0.95,
            "time": self.made.isoformat(timespec="seconds"),
            "heedful": self.program,
            "ended_early": self.ended_early,
            "sections": [section.to_json() for section in self.sections],
        }


def chosen_tasks(names: Sequence[str]) -> list[str]:
    """Return the tasks that were named, in the order of the report; all where none was.

    Raises:
        InvalidConfig: a name is not known.
    """
    for name in names:
        if name not in TASKS:
            raise InvalidConfig(f"--tasks {name!r}: known are {', '.join(TASKS)}")
    return [name for name in TASKS if name in names or not names]


def data_sets_of(names: Sequence[str]) -> list[DataSet]:
    """Return the data sets that some tasks use."""
    used = [_READERS[name][0] for name in names if name in _READERS]
    return [*used, *([datasets.SHAKESPEARE] if "text" in names else [])]


def check_data(names: Sequence[str], folder: Path) -> None:
    """Read the data files of some tasks, so that a bad line is found before an hour of work.

    Raises:
        DataUnusable: a file is not what it should be.
    """
    for name in names:
        if name in _READERS:
            data_set, read = _READERS[name]
            for file in datasets.load(data_set, folder):
                read(file)


async def find_subject(client: heedful.AsyncClient, version: str, against: str) -> Subject:
    """Return both policies by their versions.

    Raises:
        NotFound: there is no such policy; the message names those there are.
        HeedfulError: the server does not answer.
    """
    models = await client.list_models()
    policies = [item.version for item in models.versions if item.role != "reward"]
    found = []
    for name in (version, against):
        model = models.find(name)
        if model is None or model.version not in policies:
            there = ", ".join(dict.fromkeys((*models.aliases, *policies)))
            raise heedful.NotFound(f"there is no policy {name!r}; there are: {there}")
        found.append(model)
    return Subject(
        found[0].version,
        found[1].version,
        client.project,
        found[0].base_model,
        found[0].quantization,
    )


async def evaluate(
    subject: Subject, context: Context, names: Sequence[str], say: Callable[[str], None]
) -> Evaluation:
    """Return what the tasks found; an error of the server ends it and is part of what is returned.

    Raises:
        DataUnusable: a data file is not what it should be.
    """
    sections: list[Section] = []
    failure: heedful.HeedfulError | None = None
    for name in names:
        title, task = TASKS[name]
        say(f"{name}: {title}")
        try:
            sections.append(await _timed(name, title, task, context))
        except heedful.HeedfulError as error:
            failure = error
            break
        last = sections[-1]
        say(f"{name}: skipped, {last.reason}" if last.reason else f"{name}: {last.seconds:.0f} s")
    return Evaluation(
        subject,
        tuple(sections),
        context.seed,
        context.limit,
        datetime.now(UTC),
        metadata.version("heedful"),
        failure,
    )


async def _timed(name: str, title: str, task: Task, context: Context) -> Section:
    began_s = time.monotonic()
    try:
        section = await task(context)
    except Skipped as reason:
        return Section(name, title, "skipped", str(reason))
    except heedful.PermissionDenied as error:
        return Section(name, title, "skipped", f"the key may not ask for it: {error}")
    return replace(section, seconds=time.monotonic() - began_s)


def asker_of(client: heedful.AsyncClient, subject: Subject) -> Asker:
    """Return what asks both policies."""
    return Asker(client, subject.version, subject.baseline)
