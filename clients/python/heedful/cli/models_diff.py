"""`heedful models diff`: the answers of two versions to the same prompts, side by side or blind.

Owns how they are asked (same seed, same sampling, so that only the weights differ) and shown; with
`--vote` the server draws and orders blind pairs, and `blind_pairs.py` asks for one key a pair.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from heedful.cli import blind_pairs, prompts, sampling
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.options import JsonFlag
from heedful.cli.output import json_text, printable, stderr, write
from heedful.errors import FailedPrecondition
from heedful.sync import Client
from heedful.types import Consent, GenerateOptions

DEFAULT_MAX_TOKENS = 200
DEFAULT_TEMPERATURE = 0.7
_MIN_TABLE_WIDTH = 60
_LEASE_S = 600


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version answered."""

    version: str
    text: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Two answers to one prompt."""

    prompt: str
    answers: tuple[Answer, Answer]

    @property
    def is_same(self) -> bool:
        """True where both versions wrote the same."""
        first, second = self.answers
        return first.text == second.text


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Version or alias.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Version or alias.")],
    prompt: prompts.Arguments = None,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    file: prompts.File = None,
    from_log: prompts.FromLog = None,
    vote: Annotated[
        bool, typer.Option("--vote", help="Hide who is who and ask for one key a pair.")
    ] = False,
    system: sampling.System = None,
    temperature: sampling.Temperature = DEFAULT_TEMPERATURE,
    seed: sampling.Seed = 0,
    max_tokens: sampling.MaxTokens = DEFAULT_MAX_TOKENS,
    as_json: JsonFlag = False,
) -> None:
    """Show how two versions answer the same prompts.

    Both get the same seed, so they differ by their weights only. Nothing is logged, except for the
    votes of --vote, which count as evidence for the gate.
    """
    with ready_client(target, timeout, wait) as client:
        asked = prompts.collect(client, prompt or (), file, from_log)
        if not asked:
            raise typer.BadParameter("give prompts, --prompts FILE or --from-log N")
        if vote:
            options = blind_pairs.options((first, second), temperature, max_tokens)
            tally = blind_pairs.vote(client, asked, options)
            blind_pairs.show_tally(tally, as_json)
            return
        options_of_both = answer_options(temperature, seed, max_tokens)
        found = []
        for item in asked:
            found.append(difference(client, (first, second), item, system, options_of_both))
            if not as_json:
                show(found[-1])
    if as_json:
        write(json_text([_document(item) for item in found]) + "\n")
    else:
        _summarise(found)


def answer_options(
    temperature: float | None, seed: int | None, max_tokens: int | None
) -> GenerateOptions:
    """Returns how both versions are asked; answers that nobody will judge are not logged."""
    return GenerateOptions(
        temperature=temperature, seed=seed, max_tokens=max_tokens, consent=Consent(log="none")
    )


def difference(
    client: Client,
    versions: tuple[str, str],
    asked: prompts.Asked,
    system: str | None,
    options: GenerateOptions,
) -> Difference:
    """Returns both versions' answers to one prompt.

    Raises:
        HeedfulError: one of them does not answer.
    """
    first, second = (_answer(client, name, asked, system, options) for name in versions)
    return Difference(asked.shown, (first, second))


def show(found: Difference) -> None:
    """Shows a prompt and both answers: side by side in a terminal, one by one in a pipe."""
    console = Console(highlight=False, markup=False)
    write(f"> {found.prompt}\n")
    if found.is_same:
        names = " and ".join(dict.fromkeys(answer.version for answer in found.answers))
        write(f"[{names}] {found.answers[0].text}\n\n")
    elif sys.stdout.isatty() and console.width >= _MIN_TABLE_WIDTH:
        table = Table(expand=True, show_lines=False)
        for answer in found.answers:
            table.add_column(f"{answer.version} · {answer.num_tokens} tokens", ratio=1)
        table.add_row(*(printable(answer.text) for answer in found.answers))
        console.print(table)
    else:
        for answer in found.answers:
            write(f"[{answer.version}] {answer.text}\n")
        write("\n")


def _answer(
    client: Client, name: str, asked: prompts.Asked, system: str | None, options: GenerateOptions
) -> Answer:
    prompt = prompts.with_system(asked.prompt, system)
    of_this = options.copy()
    of_this["model"] = name
    try:
        generation = client.generate(prompt, **of_this)
    except FailedPrecondition:
        # A version that nobody is served with is not kept in memory.
        client.load_adapter(name, lease_s=_LEASE_S)
        generation = client.generate(prompt, **of_this)
    completion = generation.completions[0]
    return Answer(
        version=generation.served_by.policy_version,
        text=completion.text,
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason or "",
    )


def _summarise(found: list[Difference]) -> None:
    same = sum(item.is_same for item in found)
    means = (
        f"{answer.version} writes {sum(d.answers[side].num_tokens for d in found) / len(found):.0f}"
        for side, answer in enumerate(found[0].answers)
    )
    stderr().print(
        f"{len(found)} prompts, {same} answered alike; tokens an answer: {', '.join(means)}",
        style="dim",
        markup=False,
    )


def _document(item: Difference) -> dict[str, object]:
    answers = [
        {
            "version": answer.version,
            "text": answer.text,
            "tokens": answer.num_tokens,
            "finish_reason": answer.finish_reason,
        }
        for answer in item.answers
    ]
    return {"prompt": item.prompt, "same": item.is_same, "answers": answers}
