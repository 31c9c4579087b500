"""The validator: every rule of the contract at its limit and one past it."""

import math

import pytest
from google.protobuf import text_format
from heedful_proto.v1 import inference_pb2 as pb
from heedful_server.errors import InvalidRequest
from heedful_server.rpc import validate
from heedful_server.rpc.model_rules import (
    DEFAULT_MAX_TOKENS,
    ModelLimits,
    require_prompt_fits,
    require_token_ids,
    require_token_ids_known,
    resolve_max_tokens,
)
from heedful_server.rpc.requests import TextPrompt
from heedful_server.setting_groups import LimitSettings

LIMITS = LimitSettings(max_prompt_bytes=1000, max_messages=4, max_detokenize_tokens=8)
MODEL = ModelLimits(vocab_size=100, context_tokens=50)


def generation(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text="x"), **fields)


def sampling(**fields: object) -> pb.GenerateRequest:
    return generation(sampling=pb.SamplingParams(**fields))


def constraint(**fields: object) -> pb.GenerateRequest:
    return generation(constraint=pb.Constraint(**fields))


def chat(num_turns: int, role: str = "user", content: str = "x") -> pb.GenerateRequest:
    turns = [pb.ChatMessage(role=role, content=content)] * num_turns
    return pb.GenerateRequest(prompt=pb.Prompt(chat=pb.ChatMessages(messages=turns)))


def biases(count: int, token_id: int | None = None) -> list[pb.LogitBias]:
    return [pb.LogitBias(token_id=i if token_id is None else token_id) for i in range(count)]


ALLOWED = [
    generation(),
    generation(n=1),
    generation(n=16),
    pb.GenerateRequest(prompt=pb.Prompt(text="x" * 1000)),
    pb.GenerateRequest(prompt=pb.Prompt(text="é" * 500)),
    pb.GenerateRequest(prompt=pb.Prompt(text="\0")),
    pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[0]))),
    chat(4, content="x" * 250),
    chat(1, content=""),
    sampling(temperature=0),
    sampling(temperature=100),
    sampling(top_p=1),
    sampling(top_p=1e-9),
    sampling(top_k=2**32 - 1),
    sampling(min_p=0),
    sampling(min_p=1),
    sampling(repetition_penalty=10),
    sampling(repetition_penalty=1e-3),
    sampling(presence_penalty=-2),
    sampling(presence_penalty=2),
    sampling(frequency_penalty=-2),
    sampling(frequency_penalty=2),
    sampling(logit_bias=biases(1024)),
    sampling(logit_bias=[pb.LogitBias(token_id=1, bias=-100), pb.LogitBias(token_id=2, bias=100)]),
    sampling(max_tokens=1),
    sampling(max_tokens=2**32 - 1),
    sampling(min_tokens=2**32 - 1),
    sampling(stop=["x" * 256] * 16),
    sampling(stop=["é" * 128]),
    sampling(stop_token_ids=[1] * 64),
    sampling(top_logprobs=20),
    sampling(seed=2**64 - 1),
    constraint(json_schema="{}"),
    constraint(json_schema="true"),
    constraint(json_schema='{"x": "' + "y" * (64 * 1024 - 9) + '"}'),
    constraint(regex="x" * 4096),
    generation(end_user="x" * 128, conversation_id="é" * 64),
    generation(tags=["x" * 64] * 16),
    generation(priority=pb.PRIORITY_BACKGROUND, purpose=pb.PURPOSE_ROLLOUT),
    generation(consent=pb.Consent(log=pb.LOG_CONSENT_NONE, train=pb.TRAIN_CONSENT_NO)),
    generation(model="champion", project="default"),
]

REFUSED = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(prompt=pb.Prompt()), "prompt"),
    (pb.GenerateRequest(prompt=pb.Prompt(text="")), "prompt.text"),
    (pb.GenerateRequest(prompt=pb.Prompt(text="x" * 1001)), "prompt.text"),
    (pb.GenerateRequest(prompt=pb.Prompt(text="é" * 501)), "prompt.text"),
    (pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds())), "prompt.token_ids.ids"),
    (
        pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * 1001))),
        "prompt.token_ids.ids",
    ),
    (chat(0), "prompt.chat.messages"),
    (chat(5), "prompt.chat.messages"),
    (chat(4, content="x" * 251), "prompt.chat.messages"),
    (chat(1, role="tool"), "prompt.chat.messages[0].role"),
    (chat(1, role=""), "prompt.chat.messages[0].role"),
    (generation(n=0), "n"),
    (generation(n=17), "n"),
    (generation(n=2**31), "n"),
    (sampling(temperature=-1e-6), "sampling.temperature"),
    (sampling(temperature=100.1), "sampling.temperature"),
    (sampling(temperature=math.nan), "sampling.temperature"),
    (sampling(temperature=math.inf), "sampling.temperature"),
    (sampling(top_p=0), "sampling.top_p"),
    (sampling(top_p=1.001), "sampling.top_p"),
    (sampling(top_p=math.nan), "sampling.top_p"),
    (sampling(min_p=-0.1), "sampling.min_p"),
    (sampling(min_p=1.1), "sampling.min_p"),
    (sampling(min_p=math.nan), "sampling.min_p"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=10.1), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=math.nan), "sampling.repetition_penalty"),
    (sampling(presence_penalty=-2.1), "sampling.presence_penalty"),
    (sampling(presence_penalty=math.nan), "sampling.presence_penalty"),
    (sampling(frequency_penalty=2.1), "sampling.frequency_penalty"),
    (sampling(frequency_penalty=-math.inf), "sampling.frequency_penalty"),
    (sampling(logit_bias=biases(1025)), "sampling.logit_bias"),
    (sampling(logit_bias=biases(2, 7)), "sampling.logit_bias[1].token_id"),
    (sampling(logit_bias=[pb.LogitBias(bias=100.1)]), "sampling.logit_bias[0].bias"),
    (sampling(logit_bias=[pb.LogitBias(bias=math.nan)]), "sampling.logit_bias[0].bias"),
    (sampling(max_tokens=0), "sampling.max_tokens"),
    (sampling(stop=["x"] * 17), "sampling.stop"),
    (sampling(stop=["x"] * 10_000), "sampling.stop"),
    (sampling(stop=["x", ""]), "sampling.stop[1]"),
    (sampling(stop=["x" * 257]), "sampling.stop[0]"),
    (sampling(stop=["é" * 129]), "sampling.stop[0]"),
    (sampling(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
    (sampling(top_logprobs=21), "sampling.top_logprobs"),
    (sampling(top_logprobs=2**32 - 1), "sampling.top_logprobs"),
    (constraint(), "constraint"),
    (constraint(json_schema=""), "constraint.json_schema"),
    (constraint(json_schema="{"), "constraint.json_schema"),
    (constraint(json_schema="[]"), "constraint.json_schema"),
    (constraint(json_schema="1"), "constraint.json_schema"),
    (constraint(json_schema="[" * 60_000), "constraint.json_schema"),
    (constraint(json_schema=" " * (64 * 1024 + 1)), "constraint.json_schema"),
    (constraint(regex=""), "constraint.regex"),
    (constraint(regex="x" * 4097), "constraint.regex"),
    (generation(end_user="x" * 129), "end_user"),
    (generation(conversation_id="é" * 65), "conversation_id"),
    (generation(tags=["x"] * 17), "tags"),
    (generation(tags=["x", "x" * 65]), "tags[1]"),
    (generation(priority=77), "priority"),
    (generation(purpose=-1), "purpose"),
    (generation(consent=pb.Consent(log=9)), "consent.log"),
    (generation(consent=pb.Consent(train=9)), "consent.train"),
    (generation(n=3, best_of=2), "best_of"),
    (generation(best_of=17), "best_of"),
]


def name(value: object) -> str:
    if isinstance(value, str):
        return value
    return text_format.MessageToString(value, as_one_line=True)[:60]


@pytest.mark.parametrize("message", ALLOWED, ids=name)
def test_allowed(message: pb.GenerateRequest) -> None:
    validate.generation_request(message, LIMITS)


@pytest.mark.parametrize(("message", "field"), REFUSED, ids=name)
def test_refused_by_field(message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate.generation_request(message, LIMITS)
    assert caught.value.field == field
    assert caught.value.reason


def test_priority_and_consent_default_to_the_servers_setting() -> None:
    request = validate.generation_request(generation(), LIMITS)
    assert request.priority == 0
    assert (request.origin.log_consent, request.origin.train_consent) == ("server", "server")
    assert request.origin.project == "default"


def test_best_of_samples_more_than_it_returns() -> None:
    request = validate.generation_request(generation(n=2, best_of=4), LIMITS)
    assert (request.n, request.best_of, request.num_samples) == (2, 4, 4)
    request = validate.generation_request(generation(n=2), LIMITS)
    assert (request.n, request.best_of, request.num_samples) == (2, 0, 2)


def test_the_name_of_a_model_is_bounded_and_looked_up_later() -> None:
    assert validate.generation_request(generation(model="other"), LIMITS).model == "other"
    with pytest.raises(InvalidRequest, match="model"):
        validate.generation_request(generation(model="x" * 201), LIMITS)


def item(**fields: object) -> pb.ScoreItem:
    return pb.ScoreItem(prompt=pb.Prompt(text="x"), **fields)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ScoreRequest(), "items"),
        (pb.ScoreRequest(items=[item(text="y")] * 65), "items"),
        (pb.ScoreRequest(items=[item(text="y"), item()]), "items[1]"),
        (pb.ScoreRequest(items=[pb.ScoreItem(text="y")]), "items[0].prompt"),
        (pb.ScoreRequest(items=[item(text="y" * 1001)]), "items[0].text"),
        (pb.ScoreRequest(items=[item(token_ids=pb.TokenIds())]), "items[0].token_ids.ids"),
        (pb.ScoreRequest(items=[item(text="y")], priority=9), "priority"),
    ],
    ids=name,
)
def test_score_refused_by_field(message: pb.ScoreRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate.scoring_request(message, LIMITS)
    assert caught.value.field == field


def test_sixty_four_items_may_be_scored_and_one_may_be_empty() -> None:
    message = pb.ScoreRequest(items=[item(text="")] * 64)
    assert len(validate.scoring_request(message, LIMITS).items) == 64


def test_a_scoring_request_says_whose_rewards_it_wants() -> None:
    message = pb.ScoreRequest(items=[item(text="y")], reward=True, model="v1", project="default")
    request = validate.scoring_request(message, LIMITS)
    assert (request.reward, request.model, request.project) == (True, "v1", "default")


def test_tokenize_needs_an_input_and_limits_it() -> None:
    with pytest.raises(InvalidRequest, match="text and chat"):
        validate.tokenize_input(pb.TokenizeRequest(), LIMITS)
    with pytest.raises(InvalidRequest, match="1000 bytes"):
        validate.tokenize_input(pb.TokenizeRequest(text="x" * 1001), LIMITS)
    assert validate.tokenize_input(pb.TokenizeRequest(text=""), LIMITS).text == ""


def test_detokenize_limits_its_ids() -> None:
    assert validate.detokenize_ids(pb.DetokenizeRequest(token_ids=[1] * 8), LIMITS) == (1,) * 8
    with pytest.raises(InvalidRequest, match="at most 8"):
        validate.detokenize_ids(pb.DetokenizeRequest(token_ids=[1] * 9), LIMITS)


def test_first_token_id_beyond_the_vocabulary_is_named() -> None:
    require_token_ids("ids", [0, 99], 100)
    require_token_ids("ids", [], 100)
    with pytest.raises(InvalidRequest) as caught:
        require_token_ids("ids", [0, 100, 200], 100)
    assert caught.value.field == "ids[1]"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (
            pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1, 100]))),
            "prompt.token_ids.ids[1]",
        ),
        (sampling(stop_token_ids=[2**32 - 1]), "sampling.stop_token_ids[0]"),
        (sampling(logit_bias=biases(101)), "sampling.logit_bias[100].token_id"),
    ],
    ids=name,
)
def test_token_ids_of_a_request_must_be_known(message: pb.GenerateRequest, field: str) -> None:
    request = validate.generation_request(message, LIMITS)
    with pytest.raises(InvalidRequest) as caught:
        require_token_ids_known(request, MODEL.vocab_size)
    assert caught.value.field == field


def test_prompt_must_leave_room_for_a_token() -> None:
    prompt = TextPrompt("x")
    require_prompt_fits(prompt, [1] * 49, MODEL)
    for num_tokens in (0, 50):
        with pytest.raises(InvalidRequest, match=r"prompt\.text"):
            require_prompt_fits(prompt, [1] * num_tokens, MODEL)


def test_text_may_not_hold_a_token_that_the_model_lacks() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt\.text: holds a special token"):
        require_prompt_fits(TextPrompt("<added>"), [1, 100], MODEL)


@pytest.mark.parametrize(
    ("asked", "num_prompt_tokens", "context_tokens", "expected"),
    [(None, 10, 50, 40), (None, 10, 5000, DEFAULT_MAX_TOKENS), (40, 10, 50, 40), (1, 49, 50, 1)],
)
def test_max_tokens_is_what_was_asked_for_or_what_is_left(
    asked: int | None, num_prompt_tokens: int, context_tokens: int, expected: int
) -> None:
    message = sampling() if asked is None else sampling(max_tokens=asked)
    request = validate.generation_request(message, LIMITS)
    model = ModelLimits(100, context_tokens)
    assert resolve_max_tokens(request, num_prompt_tokens, model) == expected


def test_max_tokens_beyond_the_context_is_refused() -> None:
    request = validate.generation_request(sampling(max_tokens=41), LIMITS)
    with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens.*41.*40"):
        resolve_max_tokens(request, 10, MODEL)


@pytest.mark.parametrize("asked", [{"min_tokens": 41}, {"min_tokens": 6, "max_tokens": 5}])
def test_min_tokens_beyond_max_tokens_is_refused(asked: dict[str, int]) -> None:
    request = validate.generation_request(sampling(**asked), LIMITS)
    with pytest.raises(InvalidRequest, match=r"sampling\.min_tokens"):
        resolve_max_tokens(request, 10, MODEL)
