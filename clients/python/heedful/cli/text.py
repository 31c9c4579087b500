"""`heedful score`, `tokenize` and `detokenize`: single calls, shown plainly or as JSON.

Owns how their results look and nothing else.
"""

import math
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
from heedful.cli.output import write, write_json
from heedful.types import Message, Text

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def score(
    prompt: Annotated[str, typer.Argument(help="The prompt: one user message.")],
    completion: Annotated[str, typer.Argument(help="The completion to score; '-' reads stdin.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    model: sampling.Model = None,
    text: Annotated[
        bool, typer.Option("--text", help="Take the prompt as plain text, without chat.")
    ] = False,
    reward: Annotated[
        bool, typer.Option("--reward", help="Ask the reward model too, where one is loaded.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how probable the model finds a given completion."""
    given = sys.stdin.read() if completion == "-" else completion
    with ready_client(target, timeout, wait) as client:
        item = (Text(prompt) if text else prompt, given)
        result = client.score([item], model=model, reward=reward)[0]
    if as_json:
        write_json(result)
        return
    num_tokens = len(result.token_ids)
    mean = result.total_logprob / num_tokens if num_tokens else 0.0
    write(f"tokens          {num_tokens}\n")
    write(f"total log-prob  {result.total_logprob:.4f}\n")
    write(f"mean log-prob   {mean:.4f}\n")
    write(f"perplexity      {math.exp(-mean):.4f}\n")
    if result.reward is not None:
        write(f"reward          {result.reward:.4f}\n")
    write(f"version         {result.policy_version}\n")


def tokenize(
    text: Annotated[str, typer.Argument(help="The text; '-' reads standard input.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    model: sampling.Model = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Render it as one user message first.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the token ids of a text, one a line with its text."""
    given = sys.stdin.read() if text == "-" else text
    with ready_client(target, timeout, wait) as client:
        result = client.tokenize([Message("user", given)] if chat else given, model=model)
    if as_json:
        write_json(result)
        return
    for token_id, token in zip(result.token_ids, result.tokens, strict=True):
        write(f"{token_id}\t{token!r}\n")


def detokenize(
    token_ids: Annotated[list[int], typer.Argument(help="The token ids.")],
    target: TargetOption = TARGET,
    timeout: TimeoutOption = TIMEOUT_S,
    wait: WaitOption = None,
    model: sampling.Model = None,
    skip_special_tokens: Annotated[
        bool, typer.Option("--skip-special-tokens", help="Leave special tokens out.")
    ] = False,
) -> None:
    """Show the text of token ids."""
    with ready_client(target, timeout, wait) as client:
        result = client.detokenize(token_ids, model=model, skip_special_tokens=skip_special_tokens)
    write(result + "\n")
