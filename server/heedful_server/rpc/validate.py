"""The one validator: messages of the contract in, requests of the server out.

Owns every rule that the contract's comments state and every limit of the configuration, checked
before anything is tokenized or allocated; the first broken rule is reported by its field. What
depends on the model is checked by model_rules.py, once the prompt's tokens are known. Pure
functions without input or output; the HTTP façade calls the same ones. Field paths are relative
to GenerateRequest for GenerateStream too.
"""

from heedful_proto.v1 import inference_pb2 as pb

from heedful_server.deployment.served import MAX_NAME_BYTES
from heedful_server.errors import InvalidRequest
from heedful_server.protocol import (
    PRIORITY_BACKGROUND,
    PRIORITY_INTERACTIVE,
)
from heedful_server.rpc.requests import (
    ChatPrompt,
    Consent,
    GenerationRequest,
    Origin,
    Prompt,
    ScoringItem,
    ScoringRequest,
    TextPrompt,
    TokensPrompt,
    TrainConsent,
)
from heedful_server.rpc.rules import choice, require, require_bytes
from heedful_server.rpc.sampling_rules import constraint, sampling_params
from heedful_server.setting_groups import LimitSettings

DEFAULT_PROJECT = "default"

_ROLES = frozenset({"system", "user", "assistant"})
_MAX_N = 16
_MAX_TAGS = 16
_MAX_TAG_BYTES = 64
_MAX_ID_BYTES = 128
_MAX_SCORE_ITEMS = 64

_LOG_CONSENTS: dict[int, Consent] = {
    pb.LOG_CONSENT_UNSPECIFIED: "server",
    pb.LOG_CONSENT_NONE: "none",
    pb.LOG_CONSENT_METADATA: "metadata",
    pb.LOG_CONSENT_FULL: "full",
}
_TRAIN_CONSENTS: dict[int, TrainConsent] = {
    pb.TRAIN_CONSENT_UNSPECIFIED: "server",
    pb.TRAIN_CONSENT_NO: "no",
    pb.TRAIN_CONSENT_YES: "yes",
}
_PRIORITIES: dict[int, int] = {
    pb.PRIORITY_UNSPECIFIED: PRIORITY_INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: PRIORITY_INTERACTIVE,
    pb.PRIORITY_BACKGROUND: PRIORITY_BACKGROUND,
}
_ROLLOUT: dict[int, bool] = {
    pb.PURPOSE_UNSPECIFIED: False,
    pb.PURPOSE_SERVE: False,
    pb.PURPOSE_ROLLOUT: True,
}


def generation_request(message: pb.GenerateRequest, limits: LimitSettings) -> GenerationRequest:
    """Return the request that a message asks for.

    Raises:
        InvalidRequest: a field breaks a rule. Whether model and project exist is seen later.
    """
    require_model(message.model)
    n = message.n if message.HasField("n") else 1
    require("n", 1 <= n <= _MAX_N, f"must be 1 to {_MAX_N}, not {n}")
    sampling = message.sampling
    return GenerationRequest(
        prompt=prompt(message.prompt, "prompt", limits),
        n=n,
        sampling=sampling_params(sampling),
        max_tokens_set=sampling.HasField("max_tokens"),
        seed_set=sampling.HasField("seed"),
        logprobs=sampling.logprobs or sampling.top_logprobs > 0,
        constraint=constraint(message.constraint) if message.HasField("constraint") else None,
        priority=choice("priority", message.priority, _PRIORITIES),
        origin=_origin(message),
        model=message.model,
        best_of=_best_of(message, n),
    )


def scoring_request(message: pb.ScoreRequest, limits: LimitSettings) -> ScoringRequest:
    """Return the request that a message asks for; raises as generation_request does."""
    require_model(message.model)
    num_items = len(message.items)
    require("items", 1 <= num_items <= _MAX_SCORE_ITEMS, f"must be 1 to {_MAX_SCORE_ITEMS} items")
    return ScoringRequest(
        items=tuple(_score_item(item, i, limits) for i, item in enumerate(message.items)),
        priority=choice("priority", message.priority, _PRIORITIES),
        model=message.model,
        project=message.project,
        reward=message.reward,
    )


def tokenize_input(message: pb.TokenizeRequest, limits: LimitSettings) -> TextPrompt | ChatPrompt:
    """Return what is to be tokenized; raises as generation_request does. Empty text is allowed."""
    require_model(message.model)
    match message.WhichOneof("input"):
        case "text":
            require_bytes("text", message.text, limits.max_prompt_bytes)
            return TextPrompt(message.text)
        case "chat":
            return _chat(message.chat, "chat", limits)
        case _:
            raise InvalidRequest("text", "one of text and chat must be set")


def detokenize_ids(message: pb.DetokenizeRequest, limits: LimitSettings) -> tuple[int, ...]:
    """Return the token ids; raises as generation_request does."""
    require_model(message.model)
    most = limits.max_detokenize_tokens
    require("token_ids", len(message.token_ids) <= most, f"must be at most {most} ids")
    return tuple(message.token_ids)


def require_model(model: str, field: str = "model") -> None:
    """Refuse what is too long for the name of a model; whether there is one is seen later."""
    require_bytes(field, model, MAX_NAME_BYTES)


def prompt(message: pb.Prompt, path: str, limits: LimitSettings) -> Prompt:
    """Return a prompt; raise InvalidRequest naming the field below `path`."""
    match message.WhichOneof("form"):
        case "text":
            require(f"{path}.text", message.text != "", "must not be empty")
            require_bytes(f"{path}.text", message.text, limits.max_prompt_bytes)
            return TextPrompt(message.text)
        case "chat":
            return _chat(message.chat, f"{path}.chat", limits)
        case "token_ids":
            return _tokens(message.token_ids, f"{path}.token_ids", limits)
        case _:
            raise InvalidRequest(path, "one of text, chat and token_ids must be set")


def _best_of(message: pb.GenerateRequest, n: int) -> int:
    if not message.HasField("best_of"):
        return 0
    best_of = message.best_of
    require("best_of", n <= best_of <= _MAX_N, f"must be n ({n}) to {_MAX_N}, not {best_of}")
    return best_of


def _chat(message: pb.ChatMessages, path: str, limits: LimitSettings) -> ChatPrompt:
    turns = message.messages
    most = limits.max_messages
    require(f"{path}.messages", 1 <= len(turns) <= most, f"must be 1 to {most} messages")
    num_bytes = 0
    for i, turn in enumerate(turns):
        require(
            f"{path}.messages[{i}].role",
            turn.role in _ROLES,
            'must be "system", "user" or "assistant"',
        )
        num_bytes += len(turn.content.encode())
    most = limits.max_prompt_bytes
    require(f"{path}.messages", num_bytes <= most, f"must be at most {most} bytes in all")
    return ChatPrompt(tuple((turn.role, turn.content) for turn in turns))


def _tokens(message: pb.TokenIds, path: str, limits: LimitSettings) -> TokensPrompt:
    require(f"{path}.ids", len(message.ids) > 0, "must not be empty")
    # A token stands for a byte of text at least, so the limit on text bounds the ids too.
    most = limits.max_prompt_bytes
    require(f"{path}.ids", len(message.ids) <= most, f"must be at most {most} ids")
    return TokensPrompt(tuple(message.ids))


def _origin(message: pb.GenerateRequest) -> Origin:
    require_bytes("project", message.project, _MAX_ID_BYTES)
    require_bytes("end_user", message.end_user, _MAX_ID_BYTES)
    require_bytes("conversation_id", message.conversation_id, _MAX_ID_BYTES)
    require("tags", len(message.tags) <= _MAX_TAGS, f"must be at most {_MAX_TAGS} tags")
    for i, tag in enumerate(message.tags):
        require_bytes(f"tags[{i}]", tag, _MAX_TAG_BYTES)
    return Origin(
        project=message.project or DEFAULT_PROJECT,
        end_user=message.end_user,
        conversation_id=message.conversation_id,
        tags=tuple(message.tags),
        log_consent=choice("consent.log", message.consent.log, _LOG_CONSENTS),
        train_consent=choice("consent.train", message.consent.train, _TRAIN_CONSENTS),
        rollout=choice("purpose", message.purpose, _ROLLOUT),
    )


def _score_item(item: pb.ScoreItem, idx: int, limits: LimitSettings) -> ScoringItem:
    path = f"items[{idx}]"
    asked = prompt(item.prompt, f"{path}.prompt", limits)
    match item.WhichOneof("completion"):
        case "text":
            require_bytes(f"{path}.text", item.text, limits.max_prompt_bytes)
            return ScoringItem(asked, TextPrompt(item.text))
        case "token_ids":
            return ScoringItem(asked, _tokens(item.token_ids, f"{path}.token_ids", limits))
        case _:
            raise InvalidRequest(path, "one of text and token_ids must be set")
