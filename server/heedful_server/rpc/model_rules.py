"""What the loaded model allows: vocabulary and context.

Owns the checks that need the prompt's tokens or the model's size, and the default of max_tokens.
They run after validate.py and before the engine sees a request. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from heedful_server.errors import InvalidRequest
from heedful_server.rpc.requests import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokensPrompt,
)
from heedful_server.rpc.rules import require

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the loaded model allows."""

    vocab_size: int
    context_tokens: int


def require_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest naming the first id that the vocabulary lacks."""
    # max() runs in C: the common case of many valid ids costs one pass.
    if token_ids and max(token_ids) >= vocab_size:
        idx = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        reason = f"{token_ids[idx]} is not below the vocabulary size {vocab_size}"
        raise InvalidRequest(f"{field}[{idx}]", reason)


def require_token_ids_known(request: GenerationRequest, vocab_size: int) -> None:
    """Raise InvalidRequest where a request names a token id that the vocabulary lacks."""
    if isinstance(request.prompt, TokensPrompt):
        require_token_ids("prompt.token_ids.ids", request.prompt.token_ids, vocab_size)
    sampling = request.sampling
    require_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)
    for i, (token_id, _) in enumerate(sampling.logit_bias):
        require(
            f"sampling.logit_bias[{i}].token_id",
            token_id < vocab_size,
            f"{token_id} is not below the vocabulary size {vocab_size}",
        )


def prompt_field(prompt: Prompt, path: str = "prompt") -> str:
    """Return the path of the form of a prompt that is set."""
    match prompt:
        case TextPrompt():
            return f"{path}.text"
        case ChatPrompt():
            return f"{path}.chat"
        case TokensPrompt():
            return f"{path}.token_ids.ids"


def require_prompt_fits(
    prompt: Prompt, token_ids: Sequence[int], model: ModelLimits, path: str = "prompt"
) -> None:
    """Raise InvalidRequest where a prompt has no tokens or leaves no room for one more."""
    field = prompt_field(prompt, path)
    require(field, len(token_ids) > 0, "must give at least one token")
    most = model.context_tokens - 1
    reason = f"has {len(token_ids)} tokens; the model's context leaves room for {most}"
    require(field, len(token_ids) <= most, reason)
    _require_in_vocabulary(prompt, field, token_ids, model.vocab_size)


def require_completion_fits(
    completion: Prompt, token_ids: Sequence[int], room: int, model: ModelLimits, path: str
) -> None:
    """Raise InvalidRequest where a completion has no tokens or does not fit behind its prompt."""
    field = prompt_field(completion, path)
    require(field, len(token_ids) > 0, "must give at least one token")
    reason = f"has {len(token_ids)} tokens; the prompt leaves room for {room} of the context"
    require(field, len(token_ids) <= room, reason)
    _require_in_vocabulary(completion, field, token_ids, model.vocab_size)


def resolve_max_tokens(
    request: GenerationRequest, num_prompt_tokens: int, model: ModelLimits
) -> int:
    """Return the most tokens to sample: as asked for, else the default or what the context leaves.

    Raises:
        InvalidRequest: the context has no room for what is asked for, or min_tokens is more.
    """
    room = model.context_tokens - num_prompt_tokens
    if not request.max_tokens_set:
        max_tokens = min(DEFAULT_MAX_TOKENS, room)
    else:
        max_tokens = request.sampling.max_tokens
        reason = f"{max_tokens} is more than the {room} that the prompt leaves of the context"
        require("sampling.max_tokens", max_tokens <= room, reason)
    reason = f"must not be more than max_tokens ({max_tokens})"
    require("sampling.min_tokens", request.sampling.min_tokens <= max_tokens, reason)
    return max_tokens


def _require_in_vocabulary(
    prompt: Prompt, field: str, token_ids: Sequence[int], vocab_size: int
) -> None:
    if isinstance(prompt, TokensPrompt):
        require_token_ids(field, token_ids, vocab_size)
        return
    # Tokenizers may know added tokens that the model has no embedding for.
    reason = "holds a special token that the model does not have"
    require(field, max(token_ids) < vocab_size, reason)
