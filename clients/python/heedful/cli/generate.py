"""`heedful generate`: one prompt, its completions on standard output.

Owns how completions are shown: one completion streams, several are shown whole, one by one.
"""

import sys
from typing import Annotated

import typer

from heedful.cli import sampling
from heedful.cli.connection import (
    TARGET,
    TIMEOUT_S,
    TargetOption,
    TimeoutOption,
    WaitOption,
    ready_client,
)
from heedful.cli.output import stderr, write, write_json
from heedful.sync import Client
from heedful.types import GenerateOptions, Generation, Message, Prompt, Text


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; '-' reads standard input.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    text: Annotated[
        bool, typer.Option("--text", help="Continue the prompt as plain text, without chat.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", help="How many completions.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything about the completions as JSON.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Return log-probs (with --json).")
    ] = False,
    top_logprobs: Annotated[
        int | None, typer.Option("--top-logprobs", help="Alternatives for each token.")
    ] = None,
    system: sampling.System = None,
    model: sampling.Model = None,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    seed: sampling.Seed = None,
    min_tokens: sampling.MinTokens = None,
    max_tokens: sampling.MaxTokens = None,
    stop: sampling.Stop = None,
    stop_token_id: sampling.StopTokenIds = None,
    ignore_eos: sampling.IgnoreEos = False,
    json_schema: sampling.JsonSchema = None,
    regex: sampling.Regex = None,
    priority: sampling.Priority = None,
    end_user: sampling.EndUser = None,
    conversation: sampling.Conversation = None,
    tag: sampling.Tags = None,
) -> None:
    """Generate completions of one prompt.

    A single completion streams while it is written.

    The answer goes to standard output, everything else to standard error.
    """
    options = GenerateOptions(
        model=model,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos or None,
        logprobs=logprobs or None,
        top_logprobs=top_logprobs,
        json_schema=sampling.schema_text(json_schema),
        regex=regex,
        priority=priority.value if priority else None,
        end_user=end_user,
        conversation_id=conversation,
        tags=tag,
    )
    wire_prompt = _prompt(sys.stdin.read() if prompt == "-" else prompt, system, text)
    with ready_client(target, timeout, wait) as client:
        if as_json:
            write_json(client.generate(wire_prompt, **options))
        elif n == 1:
            _stream(client, wire_prompt, options)
        else:
            _show_all(client.generate(wire_prompt, **options))


def _prompt(text: str, system: str | None, plain: bool) -> Prompt:
    if plain and system is not None:
        raise typer.BadParameter("--system needs a chat, --text has none")
    if plain:
        return Text(text)
    if system is None:
        return text
    return (Message("system", system), Message("user", text))


def _stream(client: Client, prompt: Prompt, options: GenerateOptions) -> None:
    with client.stream(prompt, **options) as stream:
        ended_in_newline = True
        for piece in stream.texts():
            write(piece)
            ended_in_newline = piece.endswith("\n")
    if not ended_in_newline:
        write("\n")
    completion = stream.generation.completions[0]
    if completion.finish_reason not in ("stop", None):
        stderr().print(f"[ended: {completion.finish_reason}]", style="dim", markup=False)


def _show_all(generation: Generation) -> None:
    for completion in generation.completions:
        stderr().print(f"--- {completion.index + 1} of {len(generation.completions)}", style="dim")
        write(completion.text + "\n")
