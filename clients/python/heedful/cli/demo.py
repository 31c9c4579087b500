"""`heedful demo`: the whole loop in one go, with a rater that is simulated and says so.

Owns the order of the story and its words. Everything it shows is real output of a real server and a
real trainer, in a project of its own; the votes come from the program `heedful-trainer simulate`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from heedful.cli import following, models_diff, models_view, prompts, refresh_view
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.options import JsonFlag
from heedful.cli.output import ExitCode, printable, stderr, write, write_json
from heedful.cli.programs import TRAINER, needed_program, run_program
from heedful.cli.trainer_process import environment
from heedful.model_types import Deployment, Refresh
from heedful.sync import Client
from heedful.types import GenerateOptions

DEFAULT_COMPARISONS = 200
REASON = "heedful demo: votes of a simulated rater"
PROMPTS = (
    "How can I keep my houseplants alive?",
    "Why is the sky red in the evening?",
    "What is a good way to learn to swim?",
)
"""Asked before and after; the simulated rater never votes on them."""
UNSEEN_PROMPTS = 100
_SEED = 7


@dataclass
class Story:
    """What happened, for --json."""

    project: str
    taste: str
    rater: str = "simulated"
    seconds: dict[str, float] = field(default_factory=dict)
    answers: list[models_diff.Difference] = field(default_factory=list)
    refresh: Refresh | None = None
    promoted: Deployment | None = None
    rolled_back: Deployment | None = None


@dataclass(frozen=True, slots=True)
class Telling:
    """Where the story is told and what it is about."""

    client: Client
    story: Story
    quiet: bool

    def say(self, text: str) -> None:
        """Writes a line of the narration."""
        if not self.quiet:
            write(f"{text}\n")

    @contextmanager
    def chapter(self, name: str, title: str) -> Iterator[None]:
        """Writes a heading, and how long it took what follows."""
        self.say(f"\n── {title}\n")
        began_s = time.monotonic()
        yield
        elapsed_s = time.monotonic() - began_s
        self.story.seconds[name] = round(elapsed_s, 1)
        if not self.quiet:
            stderr().print(f"({elapsed_s:.0f} s)", style="dim")


def demo(
    taste: Annotated[
        str, typer.Option("--taste", help="What the simulated rater likes, for example brief.")
    ] = "brief",
    comparisons: Annotated[
        int, typer.Option("--comparisons", min=1, help="How many votes it gives.")
    ] = DEFAULT_COMPARISONS,
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    method: Annotated[
        following.MethodChoice, typer.Option("--method", help="How to train.")
    ] = following.MethodChoice.AUTO,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="Home directory, for the trainer.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="heedful.toml, for the trainer.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Watch the whole loop without people: a simulated rater votes, the model learns and changes.

    It works in a project of its own, demo-TASTE, and needs a running server. Votes are given by a
    program with a stated taste, never by a person, and everything that is shown really happened.
    """
    trainer = needed_program(TRAINER, "heedful demo")
    project = f"demo-{taste}"
    with ready_client(target, timeout, wait, project_name=project) as client:
        telling = Telling(client, Story(project, taste), as_json)
        _open(telling)
        _vote(telling, trainer, comparisons)
        _learn(telling, method, home, config)
        if telling.story.refresh is not None and telling.story.refresh.candidate_version:
            _look(telling, trainer, telling.story.refresh.candidate_version)
            _decide(telling, telling.story.refresh)
    if as_json:
        write_json(telling.story)
    if telling.story.refresh is not None and telling.story.refresh.status == "failed":
        raise typer.Exit(int(ExitCode.FAILED))


def _open(telling: Telling) -> None:
    telling.say(
        f"Project {telling.story.project}. The rater is SIMULATED: a program that likes "
        f"'{telling.story.taste}'. The model, the training and all answers are real."
    )
    with telling.chapter("before", "Before: what the champion answers"):
        _show_answers(telling, "champion")


def _vote(telling: Telling, trainer: Path, comparisons: int) -> None:
    title = f"{comparisons} blind pairs, judged by the simulated rater"
    with telling.chapter("votes", title):
        story = telling.story
        voting = ["simulate", "--taste", story.taste, "--comparisons", str(comparisons)]
        run_program(trainer, [*voting, *_where(telling)], environment())


def _learn(
    telling: Telling, method: following.MethodChoice, home: Path | None, config: Path | None
) -> None:
    with telling.chapter("refresh", "Refresh: reward model, policy, gate"):
        run = following.begin(telling.client, method, {})
        worker = following.attend(telling.client, run, home, config)
        refresh = following.watch_run(telling.client, run.run_id, False, worker)
        telling.story.refresh = refresh
        telling.say(printable(refresh_view.in_words(refresh)))


def _look(telling: Telling, trainer: Path, version: str) -> None:
    with telling.chapter("diff", f"The same questions, champion beside {version}"):
        for asked in _asked():
            found = models_diff.difference(
                telling.client, ("champion", version), asked, None, _options()
            )
            telling.story.answers.append(found)
            if not telling.quiet:
                models_diff.show(found)
    with telling.chapter("judge", f"{UNSEEN_PROMPTS} more questions that nobody voted on"):
        # What only a simulated rater allows: its true taste judges, without noise.
        run_program(
            trainer,
            [
                *("simulate", "--taste", telling.story.taste),
                *("--judge", version, "--against", "champion"),
                *("--prompts", str(UNSEEN_PROMPTS), *_where(telling)),
            ],
            environment(),
        )


def _decide(telling: Telling, refresh: Refresh) -> None:
    version = refresh.candidate_version
    if refresh.verdict == "fail":
        telling.say(
            f"{version} failed the gate, so it is not promoted: "
            f"HEEDFUL_PROJECT={telling.story.project} heedful gate explain {version}"
        )
        return
    with telling.chapter("promote", f"Promote {version}"):
        telling.story.promoted = telling.client.promote(version, reason=REASON)
        telling.say(models_view.sentence(telling.story.promoted))
        _show_answers(telling, "champion", count=1)
    with telling.chapter("roll_back", "And back again"):
        telling.story.rolled_back = telling.client.roll_back(reason=REASON)
        telling.say(models_view.sentence(telling.story.rolled_back))
        _show_answers(telling, "champion", count=1)


def _where(telling: Telling) -> tuple[str, ...]:
    return ("--project", telling.story.project, "--target", telling.client.target)


def _show_answers(telling: Telling, model: str, count: int = len(PROMPTS)) -> None:
    for asked in _asked()[:count]:
        options = _options()
        options["model"] = model
        generation = telling.client.generate(asked.prompt, **options)
        telling.say(f"> {asked.shown}")
        telling.say(f"[{generation.served_by.policy_version}] {printable(generation.text)}\n")


def _asked() -> list[prompts.Asked]:
    return [prompts.Asked(text, text) for text in PROMPTS]


def _options() -> GenerateOptions:
    return models_diff.answer_options(
        models_diff.DEFAULT_TEMPERATURE, _SEED, models_diff.DEFAULT_MAX_TOKENS
    )
