import json
import operator
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from heedful_server.engine.constraint import (
    CompiledConstraint,
    GrammarCompiler,
    GrammarMatcher,
    InvalidConstraint,
    fill_bitmasks,
)
from heedful_server.engine.sampler import SamplerRow, sample
from heedful_server.errors import EngineRequestError
from heedful_server.protocol import Constraint, SamplingParams
from heedful_server.text.token_bytes import byte_level_alphabet
from heedful_server.text.tokenizer import Tokenizer

EOS_TEXT, CONTROL_TEXT = "<eos>", "{}"
PADDING = 5
MAX_TOKENS = 150

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, some longer tokens, two control tokens."""
    alphabet = sorted(byte_level_alphabet(), key=byte_level_alphabet().get)  # type: ignore[arg-type]
    longer = ['{"', '":', '",', "tr", "true", "fal", "null", "12", "abc", "ĠĠ", "Ã©", "]}"]
    vocab = {token: idx for idx, token in enumerate([*alphabet, *longer])}
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = [
        {**plain, "id": len(vocab) + idx, "content": content, "special": True}
        for idx, content in enumerate([EOS_TEXT, CONTROL_TEXT])
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    spec: dict[str, Any] = {
        "version": "1.0",
        "model": model,
        "decoder": decoder,
        "added_tokens": added,
    }
    spec["pre_tokenizer"] = {**decoder, "add_prefix_space": False, "use_regex": True}
    return Tokenizer(json.dumps(spec).encode(), {"eos_token": EOS_TEXT}, frozenset())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING)
    yield compiler
    compiler.close()


def compiled(compiler: GrammarCompiler, kind: Any, text: str) -> CompiledConstraint:
    return compiler.compile(Constraint(kind, text)).result(timeout=100)


def allowed_ids(matcher: GrammarMatcher, vocab_size: int) -> set[int]:
    words = matcher.bitmask().tolist()
    return {i for i in range(vocab_size) if words[i // 32] >> i % 32 & 1}


def complete(
    grammar: CompiledConstraint, tokenizer: Tokenizer, seed: int, count: int
) -> list[bytes]:
    """Sample a batch of completions from random logits; those that were cut are left out."""
    vocab_size = tokenizer.vocab_size + PADDING
    generator = torch.Generator().manual_seed(seed)
    (eos_id,) = tokenizer.eos_token_ids
    matchers = [grammar.matcher() for _ in range(count)]
    tokens: list[list[int]] = [[] for _ in range(count)]
    finished: list[bytes] = []
    # Closing brackets and quotes are made likely, so that most texts end; so is the end itself.
    bias = torch.zeros(vocab_size)
    bias[[ord(char) for char in '"}]']] = 3.0
    bias[tokenizer.vocab_size - 2] = 4.0
    running = list(range(count))
    for position in range(MAX_TOKENS):
        masks = fill_bitmasks([matchers[idx] for idx in running])
        logits = torch.randn(len(running), vocab_size, generator=generator) * 2 + bias
        params = SamplingParams(seed=seed)
        rows = [
            SamplerRow(params, idx, position, (), tokens[idx], mask, tokenizer.eos_token_ids)
            for idx, mask in zip(running, masks, strict=True)
        ]
        sampled = sample(logits, rows)
        assert sampled.errors == [None] * len(running)
        for idx, token_id in zip(list(running), sampled.token_ids, strict=True):
            assert matchers[idx].accept(token_id)
            tokens[idx].append(token_id)
            if token_id == eos_id:
                assert matchers[idx].terminated
                finished.append(b"".join(map(tokenizer.token_bytes, tokens[idx][:-1])))
                running.remove(idx)
        if not running:
            break
    return finished


def conforms(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value satisfies a schema, for the keywords that these tests use."""
    root = schema if root is None else root
    if schema is True or schema == {}:
        return True
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part]
        return conforms(value, target, root)
    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda t: any(has_type(value, name) for name in ([t] if isinstance(t, str) else t)),
        "enum": lambda values: any(same(value, item) for item in values),
        "const": lambda item: same(value, item),
        "anyOf": lambda options: any(conforms(value, item, root) for item in options),
        "oneOf": lambda options: sum(conforms(value, item, root) for item in options) == 1,
        "allOf": lambda options: all(conforms(value, item, root) for item in options),
    }
    if any(name in schema and not check(schema[name]) for name, check in checks.items()):
        return False
    if isinstance(value, str):
        return string_conforms(value, schema)
    if isinstance(value, dict):
        return object_conforms(value, schema, root)
    if isinstance(value, list):
        return array_conforms(value, schema, root)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_conforms(value, schema)
    return True


def has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and (name == "number" or whole)
    python = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, python[name])


def same(left: Any, right: Any) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def string_conforms(value: str, schema: Schema) -> bool:
    found = "pattern" not in schema or re.search(schema["pattern"], value) is not None
    return found and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)


def number_conforms(value: float, schema: Schema) -> bool:
    checks: dict[str, Callable[[float, float], bool]] = {
        "minimum": operator.ge,
        "maximum": operator.le,
        "exclusiveMinimum": operator.gt,
        "exclusiveMaximum": operator.lt,
        "multipleOf": lambda number, factor: number % factor == 0,
    }
    return all(check(value, schema[name]) for name, check in checks.items() if name in schema)


def array_conforms(value: list[Any], schema: Schema, root: Any) -> bool:
    prefix = schema.get("prefixItems", [])
    rest = schema.get("items", True)
    pairs = zip(value, [*prefix, *[rest] * (len(value) - len(prefix))], strict=False)
    return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9) and all(
        item_schema is not False and conforms(item, item_schema, root)
        for item, item_schema in pairs
    )


def object_conforms(value: Schema, schema: Schema, root: Any) -> bool:
    if not set(schema.get("required", [])) <= set(value):
        return False
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 10**9):
        return False
    for name, item in value.items():
        matching = [
            inner
            for pattern, inner in schema.get("patternProperties", {}).items()
            if re.search(pattern, name)
        ]
        if name in schema.get("properties", {}):
            matching.append(schema["properties"][name])
        if not matching:
            matching = [schema.get("additionalProperties", True)]
        if any(inner is False or not conforms(item, inner, root) for inner in matching):
            return False
        if not conforms(name, schema.get("propertyNames", True), root):
            return False
    return True


LINKED_LIST = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["v", "next"],
        }
    },
}

SCHEMAS: list[Schema] = [
    {},
    {"type": "object"},
    {"type": "array"},
    {"type": "array", "minItems": 2},
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": -5, "maximum": 123},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 9},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": ["integer", "number"], "minimum": 2},
    {"minimum": 3},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    {"type": "string", "pattern": "^S_"},
    {"type": "string", "pattern": "[0-9]"},
    {"type": "string", "pattern": "^a|b$"},
    {"type": "string", "pattern": "^[^x]\\S\\.$"},
    {"pattern": "^a+$"},
    {"type": ["string", "null"], "maxLength": 3},
    {"enum": [1, "é", '"', {"a": [1, None]}, True]},
    {"type": "integer", "enum": ["a", 1, 2.5]},
    {"const": {"x": [1, 2]}},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "a number or none"},
    {"oneOf": [{"type": "string"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer"}]},
    LINKED_LIST,
    {"required": ["z"]},
    {"type": "object", "required": ["z", "a"], "properties": {"a": {"type": "integer"}}},
    {"properties": {"a": True}, "required": ["z"], "additionalProperties": {"type": "boolean"}},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": True},
        "minProperties": 2,
        "maxProperties": 2,
        "additionalProperties": False,
    },
    {"type": "object", "patternProperties": {"^a+$": {"type": "integer"}}, "minProperties": 1},
    {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": {"type": "null"}},
    {"prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": False},
    {"properties": {'a"b': {"type": "null"}, "é": {"maxLength": 2}}, "required": ['a"b', "é"]},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_every_completion_satisfies_its_schema(
    schema: Schema, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiled(compiler, "json_schema", json.dumps(schema))
    texts = complete(grammar, tokenizer, seed=1, count=24)
    assert len(texts) >= 6, "too few completions came to an end"
    for text in texts:
        value = json.loads(text.decode())
        assert conforms(value, schema), text


REGEXES = [
    r"\d{3}-\d{4}",
    r"(red|green|blue)( (red|green|blue)){0,2}",
    r"[^a]{3}",
    r".{4}",
    r"\S{1,3}@\w{1,3}\.(com|org)",
    r"\W{2}",
    r"^abc$",
    r"a|",
    r"(a|b)*?c",
    r"[a-fé]{2,}\n?",
    r"\x41\u00e9\.\\",
    r"(?:ab){2}x?",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_every_completion_matches_its_regex(
    regex: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    texts = complete(compiled(compiler, "regex", regex), tokenizer, seed=2, count=30)
    assert len(texts) >= 6, "too few completions came to an end"
    for text in texts:
        assert re.fullmatch(regex, text.decode(), re.ASCII | re.DOTALL), text


INVALID = [
    ("json_schema", '{"type": "nope"}', "type"),
    ("json_schema", '{"$ref": "#/nope"}', "nope"),
    ("json_schema", '{"$ref": "#"}', "satisfy|cycle"),
    ("json_schema", '{"properties": 3}', "properties"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}', "[Rr]ange|minimum"),
    ("json_schema", '{"type": "string", "pattern": "("}', "parenthesis"),
    ("json_schema", '{"type": "string", "pattern": "a", "minLength": 3}', "pattern"),
    ("json_schema", '{"type": "number", "multipleOf": 0.5}', "multipleOf"),
    ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"title": "' + "x" * (64 << 10) + '"}', "longer than 65536 bytes"),
    ("regex", "(", "unterminated|parenthesis"),
    ("regex", "[a", "unterminated|Unclosed"),
    ("regex", "a{5,2}", "repeat|bound"),
    ("regex", "a{99999999999}", "repetition|too large"),
    ("regex", r"\p{L}", "escape"),
    ("regex", r"(a)\1", "[Bb]ackreference"),
    ("regex", "(?=a)b", "[Ll]ookahead"),
    ("regex", r"\bfoo", "[Ww]ord boundary"),
    ("regex", "(?i)a", "flag"),
    ("regex", "a^b", "ignored"),
    ("regex", "\0", "null"),
    ("regex", "x" * 4097, "longer than 4096 bytes"),
    ("regex", "(" * 2000 + "a" + ")" * 2000, "nested|recursion|depth"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), INVALID, ids=lambda item: str(item)[:40])
def test_an_invalid_constraint_is_refused_by_field(
    kind: Any, text: str, reason: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InvalidConstraint, match=reason) as caught:
        compiled(compiler, kind, text)
    assert caught.value.field == f"constraint.{kind}"
    assert caught.value.kind == "invalid"
    assert complete(compiled(compiler, "regex", "ok"), tokenizer, 3, 1) == [b"ok"]


# Takes minutes: the grammar grows with the square of the number of optional properties.
HOSTILE = Constraint(
    "json_schema",
    json.dumps({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}}),
)


@pytest.fixture
def hasty_compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, limit_s=1.0)
    yield compiler
    compiler.close()


def test_a_hostile_constraint_is_stopped_without_holding_up_this_thread(
    hasty_compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    compiled(hasty_compiler, "regex", "warm")
    started_s = time.monotonic()
    future = hasty_compiler.compile(HOSTILE)
    assert time.monotonic() - started_s < 0.5
    longest_s, last_s = 0.0, time.monotonic()
    while not future.done():
        time.sleep(0.002)
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
    with pytest.raises(InvalidConstraint, match="takes longer than 1 s"):
        future.result()
    assert longest_s < 0.5
    # The refusal is remembered, and the next constraint gets a worker of its own.
    assert hasty_compiler.compile(HOSTILE) is future
    assert complete(compiled(hasty_compiler, "regex", "ok"), tokenizer, 3, 1) == [b"ok"]


def test_a_constraint_is_compiled_once(compiler: GrammarCompiler) -> None:
    constraint = Constraint("regex", "once+")
    first = compiler.compile(constraint)
    assert compiler.compile(constraint) is first
    first.result(timeout=100)
    assert compiler.compile(Constraint("regex", "once+")) is first


def test_old_grammars_leave_the_cache(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful_server.engine.constraint._MAX_CACHED", 3)
    texts = [f"old{idx}" for idx in range(4)]
    first = [compiler.compile(Constraint("regex", text)) for text in texts]
    for future in first:
        future.result(timeout=100)
    compiler.compile(Constraint("regex", "newest")).result(timeout=100)
    assert compiler.compile(Constraint("regex", "old3")) is first[3]
    assert compiler.compile(Constraint("regex", "old0")) is not first[0]


def test_a_long_queue_is_refused_as_a_shortage(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful_server.engine.constraint._MAX_PENDING", 0)
    with pytest.raises(EngineRequestError, match="too many") as caught:
        compiler.compile(Constraint("regex", "queue")).result(timeout=1)
    assert caught.value.kind == "resource"
    monkeypatch.undo()
    assert compiled(compiler, "regex", "queue").memory_bytes > 0


def test_closing_ends_a_compilation_under_way(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, limit_s=60.0)
    compiled(compiler, "regex", "warm")
    slow = compiler.compile(HOSTILE)
    waiting = compiler.compile(Constraint("regex", "waiting"))
    threading.Event().wait(0.2)
    started_s = time.monotonic()
    compiler.close()
    assert time.monotonic() - started_s < 5.0
    with pytest.raises(EngineRequestError, match="shutting down"):
        slow.result(timeout=1)
    assert waiting.cancelled()


def test_a_model_without_an_end_token_cannot_be_constrained(tokenizer: Tokenizer) -> None:
    # The end token's id lies beyond the logits: it can never be sampled.
    compiler = GrammarCompiler(tokenizer, 100)
    with pytest.raises(InvalidConstraint, match="end-of-sequence"):
        compiled(compiler, "regex", "a")
    compiler.close()


def test_masks_allow_text_and_the_end_but_no_control_token(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    vocab_size = tokenizer.vocab_size + PADDING
    (eos_id,) = tokenizer.eos_token_ids
    matcher = compiled(compiler, "regex", r"\{\}?").matcher()
    # "{}" is spelled by a control token too, which is no text.
    assert allowed_ids(matcher, vocab_size) == {ord("{")}
    assert not matcher.completed
    matcher.accept(ord("{"))
    assert allowed_ids(matcher, vocab_size) == {ord("}"), eos_id}
    assert matcher.completed
    assert not matcher.only_end_allowed
    matcher.accept(ord("}"))
    assert allowed_ids(matcher, vocab_size) == {eos_id}
    assert matcher.only_end_allowed
    assert not matcher.terminated
    matcher.accept(eos_id)
    assert matcher.terminated
    assert allowed_ids(matcher, vocab_size) == set()


def test_a_matcher_rolls_back_and_is_rebuilt_from_its_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    vocab_size = tokenizer.vocab_size + PADDING
    grammar = compiled(compiler, "json_schema", json.dumps(LINKED_LIST))
    matcher = grammar.matcher()
    choices = random.Random(0)
    tokens: list[int] = []
    masks = [allowed_ids(matcher, vocab_size)]
    for _ in range(25):
        tokens.append(choices.choice(sorted(masks[-1] - tokenizer.eos_token_ids)))
        assert matcher.accept(tokens[-1])
        masks.append(allowed_ids(matcher, vocab_size))
    rebuilt = grammar.matcher(tokens[:20])
    assert allowed_ids(rebuilt, vocab_size) == masks[20]
    matcher.rollback(5)
    assert allowed_ids(matcher, vocab_size) == masks[20]
    for token_id in tokens[20:]:
        assert matcher.accept(token_id)
        assert rebuilt.accept(token_id)
    assert allowed_ids(matcher, vocab_size) == allowed_ids(rebuilt, vocab_size) == masks[25]


def test_a_token_outside_the_grammar_fails_only_its_own_completion(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiled(compiler, "regex", "ab")
    broken, healthy = grammar.matcher(), grammar.matcher()
    assert not broken.accept(ord("x"))
    assert "does not follow" in (broken.failure or "")
    masks = fill_bitmasks([broken, healthy, None])
    logits = torch.zeros(3, tokenizer.vocab_size + PADDING)
    rows = [
        SamplerRow(SamplingParams(temperature=0.0), 0, 0, (), (), mask, tokenizer.eos_token_ids)
        for mask in masks
    ]
    sampled = sample(logits, rows)
    assert [error is None for error in sampled.errors] == [False, True, True]
    assert sampled.token_ids[1:] == [ord("a"), 0]


def test_a_grammar_that_is_slow_to_follow_fails_the_completion(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiled(compiler, "regex", "((a*)*)*b").matcher()
    assert matcher.bitmask().any()
    # The cost of this grammar grows with every character that it has read.
    monkeypatch.setattr("heedful_server.engine.constraint._MATCHER_ALLOWANCE_S", 0.02)
    monkeypatch.setattr("heedful_server.engine.constraint._MATCHER_ALLOWANCE_PER_TOKEN_S", 0.0)
    for _ in range(400):
        matcher.accept(ord("a"))
        if not matcher.bitmask().any():
            break
    assert "too ambiguous" in (matcher.failure or "")
    assert not matcher.accept(ord("a"))
