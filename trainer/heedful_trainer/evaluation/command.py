"""`heedful-trainer evaluate`: what is asked for, the connection, and the two files it writes.

Owns the order of a command and how it ends: 0 done, 1 refused or failed, 2 wrong usage, 3 no
server, 4 no answer in time. The process lives for one command; the event loop is its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import heedful

from heedful_trainer.config import TrainerConfig
from heedful_trainer.errors import HeedfulTrainerError, InvalidConfig
from heedful_trainer.evaluation import datasets
from heedful_trainer.evaluation.page import page_of
from heedful_trainer.evaluation.prompt_file import read_prompts
from heedful_trainer.evaluation.run import (
    Evaluation,
    asker_of,
    check_data,
    chosen_tasks,
    data_sets_of,
    evaluate,
    find_subject,
)
from heedful_trainer.evaluation.section import Context
from heedful_trainer.runs.connecting import async_client
from heedful_trainer.runs.context import write_whole

_CONNECT_S = 10.0
_FAILED, _USAGE, _UNAVAILABLE, _TIMEOUT = 1, 2, 3, 4
PAGE, NUMBERS = "evaluation.html", "evaluation.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    version: str
    against: str
    tasks: Sequence[str]
    data: Path
    fetch: bool
    limit: int
    seed: int
    out: Path
    prompts: Path | None
    project: str
    as_json: bool


def run_command(wanted: Wanted, config: TrainerConfig) -> int:
    """Evaluate, write both files, and return the exit code."""
    try:
        evaluation = _evaluate(wanted, config)
    except (heedful.HeedfulError, HeedfulTrainerError, OSError) as error:
        return _failed(error)
    if wanted.as_json:
        print(json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False))
    return _failed(evaluation.error) if evaluation.error is not None else 0


def _evaluate(wanted: Wanted, config: TrainerConfig) -> Evaluation:
    names = chosen_tasks(wanted.tasks)
    _check_files(wanted, names)
    evaluation = asyncio.run(_ask(wanted, config, names))
    content = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False)
    write_whole(wanted.out / NUMBERS, f"{content}\n".encode())
    write_whole(wanted.out / PAGE, page_of(evaluation).encode())
    _say(f"{wanted.out / PAGE}\n{wanted.out / NUMBERS}")
    return evaluation


def _check_files(wanted: Wanted, names: Sequence[str]) -> None:
    """Find what is wrong with the files before anything is asked."""
    if wanted.out.exists() and not wanted.out.is_dir():
        raise InvalidConfig(f"--out {wanted.out}: is no directory")
    if wanted.prompts is not None:
        read_prompts(wanted.prompts)
    if wanted.fetch:
        datasets.fetch(data_sets_of(names), wanted.data, _say)
    elif wanted.data.exists() and not wanted.data.is_dir():
        raise InvalidConfig(f"--data {wanted.data}: is no directory")
    check_data(names, wanted.data)


async def _ask(wanted: Wanted, config: TrainerConfig, names: Sequence[str]) -> Evaluation:
    async with async_client(config, wanted.project) as client:
        await client.wait_ready(_CONNECT_S)
        subject = await find_subject(client, wanted.version, wanted.against)
        _say(f"{subject.version} against {subject.baseline}, project {subject.project}")
        context = Context(
            asker_of(client, subject), wanted.data, wanted.limit, wanted.seed, wanted.prompts
        )
        return await evaluate(subject, context, names, _say)


def _failed(error: Exception) -> int:
    print(f"heedful-trainer: {error}", file=sys.stderr)
    match error:
        case heedful.Unavailable():
            return _UNAVAILABLE
        case heedful.DeadlineExceeded():
            return _TIMEOUT
        case InvalidConfig():
            return _USAGE
        case _:
            return _FAILED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
