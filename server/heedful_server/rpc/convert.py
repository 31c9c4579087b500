"""What the server answers, as messages of the contract.

Owns the shape of responses. The other direction is validate.py. Pure functions; they know
nothing of calls, and of tokens only what a function that they are given tells them.
"""

from collections.abc import Callable, Sequence

from heedful_proto.v1 import inference_pb2 as pb
from heedful_proto.v1 import models_pb2

from heedful_server.protocol import EngineInfo, Finish
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.generator import ScoredItem
from heedful_server.rpc.parts import Part, Served
from heedful_server.rpc.text_pool import Tokens
from heedful_server.rpc.validate import BASE_VERSION, CHAMPION_ALIAS

TokenText = Callable[[int], str]

FINISH_REASONS: "dict[str, pb.FinishReason.ValueType]" = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "deadline": pb.FINISH_REASON_DEADLINE,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}


def stream_head(generation: Generation) -> pb.GenerateStreamResponse:
    """Return the first message of a stream."""
    entry = generation.entry
    heads = [
        pb.CompletionHead(
            index=index,
            completion_id=completion_id,
            completion_token=token,
            rateable=entry.rateable,
        )
        for index, (completion_id, token) in enumerate(
            zip(generation.completion_ids, entry.tokens, strict=True)
        )
    ]
    head = pb.StreamHead(served_by=served_by(generation.served), completions=heads)
    return pb.GenerateStreamResponse(head=head)


def stream_delta(
    generation: Generation, part: Part, token_text: TokenText
) -> pb.GenerateStreamResponse:
    """Return a message that carries more of one completion."""
    delta = pb.CompletionDelta(index=part.index, text="".join(part.texts), token_ids=part.token_ids)
    if generation.request.logprobs:
        delta.logprobs.extend(_token_logprobs(part, token_text))
    if part.finish is not None:
        delta.finish_reason = FINISH_REASONS[part.finish.reason]
        delta.stop = part.finish.stop
        delta.usage.CopyFrom(_usage(part.finish))
        if generation.entry.rateable and not part.rateable:
            delta.rateable = False
    return pb.GenerateStreamResponse(delta=delta)


def generate_response(
    generation: Generation, parts: Sequence[Part], token_text: TokenText
) -> pb.GenerateResponse:
    """Return the answer to a whole request."""
    with_logprobs = generation.request.logprobs
    completions = [
        _completion(part, completion_id, token, with_logprobs, token_text)
        for part, completion_id, token in zip(
            parts, generation.completion_ids, generation.entry.tokens, strict=True
        )
    ]
    usages = [completion.usage for completion in completions]
    usage = pb.Usage(
        prompt_tokens=max(usage.prompt_tokens for usage in usages),
        cached_prompt_tokens=max(usage.cached_prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )
    return pb.GenerateResponse(
        served_by=served_by(generation.served), completions=completions, usage=usage
    )


def score_response(items: Sequence[ScoredItem]) -> pb.ScoreResponse:
    """Return the scores of items, in their order."""
    scores = [
        pb.Score(token_ids=item.token_ids, logprobs=item.logprobs, total_logprob=sum(item.logprobs))
        for item in items
    ]
    return pb.ScoreResponse(scores=scores, policy_version=BASE_VERSION)


def tokenize_response(tokens: Tokens, context_tokens: int) -> pb.TokenizeResponse:
    """Return the tokens of a text."""
    return pb.TokenizeResponse(
        token_ids=tokens.token_ids,
        tokens=tokens.texts,
        rendered=tokens.rendered,
        context_tokens=context_tokens,
    )


def base_model(name: str, info: EngineInfo | None, loaded: bool) -> models_pb2.Model:
    """Return the base as a policy version; what only the engine knows is empty until it loaded."""
    model = models_pb2.Model(
        version=BASE_VERSION,
        base_model=name,
        state=models_pb2.POLICY_STATE_CHAMPION,
        loaded=loaded,
    )
    if info is not None:
        model.quantization = info.quantization
        model.context_tokens = info.context_tokens
    return model


def champion_alias() -> models_pb2.Alias:
    """Return the alias that requests use by default."""
    return models_pb2.Alias(name=CHAMPION_ALIAS, version=BASE_VERSION)


def _completion(
    part: Part, completion_id: str, token: str, with_logprobs: bool, token_text: TokenText
) -> pb.Completion:
    assert part.finish is not None, "a completion without an end"
    return pb.Completion(
        index=part.index,
        completion_id=completion_id,
        completion_token=token if part.rateable else "",
        rateable=part.rateable,
        text="".join(part.texts),
        token_ids=part.token_ids,
        logprobs=_token_logprobs(part, token_text) if with_logprobs else (),
        finish_reason=FINISH_REASONS[part.finish.reason],
        stop=part.finish.stop,
        usage=_usage(part.finish),
    )


def _token_logprobs(part: Part, token_text: TokenText) -> list[pb.TokenLogprob]:
    alternatives = part.top or [[]] * len(part.token_ids)
    columns = zip(
        part.token_ids,
        part.logprobs,
        part.sampling_logprobs,
        part.kept_mass,
        alternatives,
        strict=True,
    )
    return [
        pb.TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            sampling_logprob=sampling_logprob,
            kept_mass=kept_mass,
            top=[
                pb.TopLogprob(token_id=other, logprob=value, token=token_text(other))
                for other, value in top
            ],
            token=token_text(token_id),
        )
        for token_id, logprob, sampling_logprob, kept_mass, top in columns
    ]


def _usage(finish: Finish) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=finish.prompt_tokens,
        cached_prompt_tokens=finish.cached_prompt_tokens,
        completion_tokens=finish.completion_tokens,
    )


def served_by(served: Served) -> pb.ServedBy:
    """Return what answered a request."""
    return pb.ServedBy(
        policy_version=served.policy_version,
        base_model=served.base_model,
        quantization=served.quantization,
        seed=served.seed,
        request_id=served.request_id,
    )
