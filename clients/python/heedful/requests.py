"""What callers pass to the messages on the wire.

Owns that direction only; `replies.py` owns the other. The server validates values, so only what
cannot be put on the wire at all is refused here. Pure functions, any thread.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar, cast

from google.protobuf.message import Message as WireMessage
from heedful_proto.v1 import inference_pb2 as pb

from heedful.errors import invalid_field
from heedful.types import (
    Consent,
    GenerateOptions,
    Message,
    Prompt,
    SamplingOptions,
    Text,
)

K = TypeVar("K")
V = TypeVar("V")

_REQUEST_SCALARS = ("model", "n", "best_of", "end_user", "conversation_id")
_SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "max_tokens",
    "top_logprobs",
    "logprobs",
    "ignore_eos",
)
PRIORITIES = {
    None: pb.PRIORITY_UNSPECIFIED,
    "interactive": pb.PRIORITY_INTERACTIVE,
    "background": pb.PRIORITY_BACKGROUND,
}
_PURPOSES = {
    None: pb.PURPOSE_UNSPECIFIED,
    "serve": pb.PURPOSE_SERVE,
    "rollout": pb.PURPOSE_ROLLOUT,
}
LOG_CONSENTS = {
    None: pb.LOG_CONSENT_UNSPECIFIED,
    "none": pb.LOG_CONSENT_NONE,
    "metadata": pb.LOG_CONSENT_METADATA,
    "full": pb.LOG_CONSENT_FULL,
}
TRAIN_CONSENTS = {
    None: pb.TRAIN_CONSENT_UNSPECIFIED,
    False: pb.TRAIN_CONSENT_NO,
    True: pb.TRAIN_CONSENT_YES,
}


def generate_request(prompt: Prompt, options: GenerateOptions, project: str) -> pb.GenerateRequest:
    """Returns the request for `prompt`.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        InvalidRequest: a value cannot be put on the wire, for example a negative count.
    """
    refuse_unknown(options, GenerateOptions.__optional_keys__)
    request = pb.GenerateRequest(project=project, prompt=prompt_to_wire(prompt))
    assign_each(request, options, _REQUEST_SCALARS, "")
    request.sampling.CopyFrom(sampling_to_wire(options))
    _set_constraint(request, options)
    extend(request, "tags", options.get("tags") or (), "tags")
    request.priority = choose(options.get("priority"), PRIORITIES, "priority")
    request.purpose = choose(options.get("purpose"), _PURPOSES, "purpose")
    request.consent.CopyFrom(consent_to_wire(options.get("consent")))
    return request


def score_request(
    items: Iterable[tuple[Prompt, str | Sequence[int]]],
    *,
    model: str | None,
    reward: bool,
    priority: str | None,
    project: str,
) -> pb.ScoreRequest:
    """Returns the request for the scores of (prompt, completion) pairs.

    Raises:
        TypeError, InvalidRequest: as for `generate_request`.
    """
    request = pb.ScoreRequest(model=model or "", reward=reward, project=project)
    request.priority = choose(priority, PRIORITIES, "priority")
    for item_idx, (prompt, completion) in enumerate(items):
        wire = request.items.add(prompt=prompt_to_wire(prompt))
        if isinstance(completion, str):
            assign(wire, "text", completion, f"items[{item_idx}].text")
        else:
            wire.token_ids.SetInParent()
            extend(wire.token_ids, "ids", completion, f"items[{item_idx}].token_ids")
    return request


def tokenize_request(
    text: str | Text | Sequence[Message | Mapping[str, str]], model: str | None
) -> pb.TokenizeRequest:
    """Returns the request for the token ids of plain text or of a conversation."""
    request = pb.TokenizeRequest(model=model or "")
    if isinstance(text, str | Text):
        assign(request, "text", text if isinstance(text, str) else text.text, "text")
    else:
        request.chat.CopyFrom(chat_to_wire(text, "chat"))
    return request


def detokenize_request(
    token_ids: Iterable[int], model: str | None, skip_special_tokens: bool
) -> pb.DetokenizeRequest:
    """Returns the request for the text of token ids."""
    request = pb.DetokenizeRequest(model=model or "", skip_special_tokens=skip_special_tokens)
    extend(request, "token_ids", token_ids, "token_ids")
    return request


def prompt_to_wire(prompt: Prompt) -> pb.Prompt:
    """Returns `prompt` on the wire: a str is one user message, ints are token ids."""
    wire = pb.Prompt()
    if isinstance(prompt, Text):
        assign(wire, "text", prompt.text, "prompt.text")
        return wire
    if isinstance(prompt, str):
        wire.chat.CopyFrom(chat_to_wire((Message("user", prompt),), "prompt.chat"))
        return wire
    if isinstance(prompt, bytes | Mapping):
        raise TypeError(
            f"a prompt is a str, Text, messages or token ids, not {type(prompt).__name__}"
        )
    if prompt and isinstance(prompt[0], SupportsIndex):
        extend(wire.token_ids, "ids", cast(Sequence[int], prompt), "prompt.token_ids")
        return wire
    messages = cast(Sequence[Message | Mapping[str, str]], prompt)
    wire.chat.CopyFrom(chat_to_wire(messages, "prompt.chat"))
    return wire


def chat_to_wire(messages: Sequence[Message | Mapping[str, str]], path: str) -> pb.ChatMessages:
    """Returns a conversation on the wire; `path` is where it sits, for errors."""
    chat = pb.ChatMessages()
    for message_idx, message in enumerate(messages):
        if isinstance(message, Mapping):
            message = Message(**message)
        if not isinstance(message, Message):
            raise TypeError(f"a prompt holds messages or token ids, not {type(message).__name__}")
        wire = chat.messages.add()
        assign(wire, "role", message.role, f"{path}.messages[{message_idx}].role")
        assign(wire, "content", message.content, f"{path}.messages[{message_idx}].content")
    return chat


def sampling_to_wire(options: SamplingOptions) -> pb.SamplingParams:
    """Returns how tokens are sampled."""
    sampling = pb.SamplingParams()
    assign_each(sampling, options, _SAMPLING_SCALARS, "sampling.")
    _extend_sampling(sampling, options)
    return sampling


def consent_to_wire(consent: Consent | None) -> pb.Consent:
    """Returns what may be done with a request; None leaves all of it to the server."""
    given = consent or Consent()
    return pb.Consent(
        log=choose(given.log, LOG_CONSENTS, "consent.log"),
        train=choose(given.train, TRAIN_CONSENTS, "consent.train"),
    )


def refuse_unknown(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Checks the names of options.

    Raises:
        TypeError: one of them is not known; the nearest known one is named.
    """
    names = list(known)
    for name in options:
        if name in names:
            continue
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"unknown option {name!r}{hint}")


def assign_each(
    message: WireMessage, options: Mapping[str, object], names: Iterable[str], prefix: str
) -> None:
    """Sets those of the named fields that have a value; errors as for `assign`."""
    for name in names:
        value = options.get(name)
        if value is not None:
            assign(message, name, value, prefix + name)


def assign(message: WireMessage, name: str, value: object, path: str) -> None:
    """Sets one field; a value that the wire cannot hold becomes InvalidRequest for `path`."""
    try:
        setattr(message, name, value)
    except ValueError as error:
        raise invalid_field(path, str(error)) from None


def extend(message: WireMessage, name: str, values: Iterable[object], path: str) -> None:
    """Appends to a repeated field; errors as for `assign`."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{path} is a sequence, not {type(values).__name__}")
    try:
        getattr(message, name).extend(values)
    except ValueError as error:
        raise invalid_field(path, str(error)) from None


def choose(key: K, choices: Mapping[K, V], path: str) -> V:
    """Returns the enum value that `key` names.

    Raises:
        InvalidRequest: there is no such choice.
    """
    if key not in choices:
        names = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise invalid_field(path, f"{key!r} is none of {names}")
    return choices[key]


def _extend_sampling(sampling: pb.SamplingParams, options: SamplingOptions) -> None:
    stop = options.get("stop") or ()
    extend(sampling, "stop", (stop,) if isinstance(stop, str) else stop, "sampling.stop")
    stop_ids = options.get("stop_token_ids") or ()
    extend(sampling, "stop_token_ids", stop_ids, "sampling.stop_token_ids")
    for token_id, bias in (options.get("logit_bias") or {}).items():
        entry = sampling.logit_bias.add()
        assign(entry, "token_id", token_id, "sampling.logit_bias.token_id")
        assign(entry, "bias", bias, "sampling.logit_bias.bias")


def _set_constraint(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    schema: str | Mapping[str, Any] | None = options.get("json_schema")
    regex = options.get("regex")
    if schema is not None and regex is not None:
        raise invalid_field("constraint", "json_schema and regex exclude each other")
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        assign(request.constraint, "json_schema", text, "constraint.json_schema")
    if regex is not None:
        assign(request.constraint, "regex", regex, "constraint.regex")
