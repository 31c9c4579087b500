"""`heedful chat`: a conversation in the terminal, or through a pipe, one line a turn.

Owns the turns and the slash commands; `rating.py` owns those that judge an answer, `voting.py` the
blind votes of `--compare`. Answers go to standard output; versions, speeds and hints go to standard
error. Ctrl-C ends an answer, not the conversation.
"""

import sys
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from heedful.cli import rating, sampling, voting
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.output import describe, stderr, write
from heedful.cli.session import Said, Session
from heedful.errors import HeedfulError
from heedful.feedback_types import CompareOptions
from heedful.sync import Client, GenerationStream
from heedful.types import GenerateOptions, Message

HELP = (
    "/exit          leave (or Ctrl-D)\n"
    "/reset         forget the conversation\n"
    "/system TEXT   set the system message; without TEXT remove it\n"
    "/model VERSION who answers from now on; without VERSION the champion\n"
    "/seed N        make answers repeatable; without N random again\n"
    f"{rating.HELP}\n"
    "/help          this list"
)


@dataclass(frozen=True)
class Talk:
    """A conversation and who answers; with `num_candidates` each turn is a blind comparison."""

    client: Client
    session: Session
    console: Console
    num_candidates: int | None = None


def chat(
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    system: sampling.System = None,
    model: sampling.Model = None,
    temperature: sampling.Temperature = 0.7,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    seed: sampling.Seed = None,
    max_tokens: sampling.MaxTokens = None,
    end_user: sampling.EndUser = None,
    conversation: sampling.Conversation = None,
    tag: sampling.Tags = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show blind answers and vote for one.")
    ] = False,
    k: Annotated[
        int, typer.Option("--k", min=2, max=9, help="How many answers --compare shows.")
    ] = 2,
) -> None:
    """Talk to the model in the terminal, and say what you think of its answers.

    Ctrl-C ends the answer that is being written, /help lists the commands.

    From a pipe every line is one turn; with --compare the line after it is the vote.
    """
    options = GenerateOptions(
        model=model,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        end_user=end_user,
        conversation_id=conversation,
        tags=tag,
    )
    with ready_client(target, timeout, wait) as client:
        talk = Talk(client, Session(options, system), stderr(), k if compare else None)
        if sys.stdin.isatty():
            _talk(talk)
        else:
            _read_pipe(talk)


def command(talk: Talk, line: str) -> bool:
    """Carries out a slash command; returns False where it ends the conversation.

    Raises:
        HeedfulError: a judgement was not recorded.
    """
    session, console = talk.session, talk.console
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/exit" | "/quit":
            return False
        case "/reset":
            session.forget()
            console.print("conversation forgotten", style="dim")
        case "/system":
            session.system = argument or None
            console.print("system message set" if argument else "no system message", style="dim")
        case "/model":
            session.options["model"] = argument or None
            console.print(f"{argument or 'the champion'} answers", style="dim", markup=False)
        case "/seed":
            _set_seed(session, argument, console)
        case _ if name in rating.COMMANDS:
            rating.judge(talk.client, session, name, argument, console)
        case "/help":
            console.print(HELP, style="dim", markup=False)
        case _:
            console.print(f"unknown command {name}; /help lists them", style="dim", markup=False)
    return True


def answer(client: Client, session: Session, text: str) -> None:
    """Streams the answer to `text` and keeps both as turns; Ctrl-C keeps what was written.

    Raises:
        HeedfulError: there is no answer; the conversation is as it was.
    """
    turn = Message("user", text)
    started_s = time.monotonic()
    with client.stream([*session.messages(), turn], **session.options) as stream:
        try:
            for piece in stream.texts():
                write(piece)
        except KeyboardInterrupt:
            stream.cancel()
    write("\n")
    _keep(session, turn, stream, time.monotonic() - started_s)


def compare_answers(talk: Talk, text: str, k: int) -> None:
    """Shows `k` blind answers to `text`; the one that is voted for continues the conversation.

    After a tie or without a vote the first one does, and where none is good the turn is forgotten.

    Raises:
        HeedfulError: there are no answers, or the vote was not recorded.
    """
    session, turn = talk.session, Message("user", text)
    with talk.console.status(f"{k} answers are being written"):
        comparison = talk.client.compare(
            [*session.messages(), turn], k, **_compare_options(session.options)
        )
    voting.show(comparison)
    vote = voting.ask(k)
    winner = 0 if vote is None else vote.winner
    if winner is None:
        talk.console.print("the turn is forgotten; ask again", style="dim")
    else:
        session.keep(turn, comparison.candidates[winner])
    if vote is not None:
        session.said.append(Said(voting.record(talk.client, comparison, vote)))


def _compare_options(options: GenerateOptions) -> CompareOptions:
    model = options.get("model")
    return CompareOptions(
        models=[model] if model else None,
        temperature=options.get("temperature"),
        top_p=options.get("top_p"),
        top_k=options.get("top_k"),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty"),
        seed=options.get("seed"),
        max_tokens=options.get("max_tokens"),
        end_user=options.get("end_user"),
        conversation_id=options.get("conversation_id"),
        tags=options.get("tags"),
    )


def _keep(session: Session, turn: Message, stream: GenerationStream, elapsed_s: float) -> None:
    generation = stream.generation
    completion, served_by = generation.completions[0], generation.served_by
    session.keep(turn, completion)
    num_tokens = len(completion.token_ids)
    ended = "" if completion.finish_reason == "stop" else f" · {completion.finish_reason}"
    stderr().print(
        f"{served_by.policy_version} · {served_by.base_model} {served_by.quantization} · "
        f"{num_tokens} tokens · {num_tokens / elapsed_s:.1f} tokens/s{ended}",
        style="dim",
        markup=False,
    )


def _take(talk: Talk, line: str) -> bool:
    """Takes one line; returns False where it ends the conversation."""
    if line.startswith("/"):
        return command(talk, line)
    if talk.num_candidates is not None:
        compare_answers(talk, line, talk.num_candidates)
    else:
        answer(talk.client, talk.session, line)
    return True


def _talk(talk: Talk) -> None:
    # Imported for its effect: input() gets line editing and history.
    import readline  # noqa: F401

    talk.console.print("/help lists commands, Ctrl-D leaves", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        try:
            if line and not _take(talk, line):
                return
        except HeedfulError as error:
            talk.console.print(describe(error), style="red", markup=False)


def _read_pipe(talk: Talk) -> None:
    while raw := sys.stdin.readline():
        line = raw.strip()
        if line and not _take(talk, line):
            return


def _set_seed(session: Session, argument: str, console: Console) -> None:
    if argument and not argument.isdecimal():
        console.print("/seed takes a whole number", style="dim")
        return
    session.options["seed"] = int(argument) if argument else None
    console.print(f"seed {argument}" if argument else "random seed", style="dim")
