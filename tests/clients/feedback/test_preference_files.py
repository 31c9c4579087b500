"""Every shape of preference data that is understood, and what is said about those that are not."""

import gzip
import json

import pytest
from heedful import Demonstration, Message, Text, Thumb
from heedful.preference_files import FORMATS, MAX_LINE_BYTES, Reader, read_lines
from heedful.preference_texts import BadRecord
from hypothesis import given, settings
from hypothesis import strategies as st

HI = (Message("user", "hi"),)
TALK = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go on"))
DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go on\n\nAssistant:"


def chat(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def read(record: object, **options):
    reader = Reader("file.jsonl", **options)
    return reader.item(json.dumps(record).encode(), 1)


def read_all(path, **options):
    return list(read_lines(path, Reader(path.name, **options)))


PAIRS = {
    "texts": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
    "question": ({"question": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
    "input": ({"input": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
    "prompt and input": (
        {"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"},
        "do\n\nit",
        ("a", "b"),
    ),
    "system": (
        {"system": "s", "prompt": "hi", "chosen": "a", "rejected": "b"},
        (Message("system", "s"), *HI),
        ("a", "b"),
    ),
    "dialogues": (
        {"chosen": DIALOGUE + " good", "rejected": DIALOGUE + " bad\n"},
        TALK,
        ("good", "bad"),
    ),
    "dialogue prompt": (
        {"prompt": DIALOGUE, "chosen": " good", "rejected": " bad"},
        TALK,
        ("good", "bad"),
    ),
    "conversations": (
        {"chosen": chat("hi", "yes?", "go on", "a"), "rejected": chat("hi", "yes?", "go on", "b")},
        TALK,
        ("a", "b"),
    ),
    "conversations beside the prompt they repeat": (
        {"prompt": "hi", "chosen": chat("hi", "a"), "rejected": chat("hi", "b")},
        HI,
        ("a", "b"),
    ),
    "messages": (
        {
            "prompt": chat("hi"),
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        HI,
        ("a", "b"),
    ),
    "a long prompt inside both": (
        {"prompt": "p" * 40, "chosen": "p" * 40 + " a", "rejected": "p" * 40 + " b"},
        "p" * 40,
        ("a", "b"),
    ),
    "answers that begin with a short prompt": (
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"},
        "Hi",
        ("Hi there", "Hi!"),
    ),
    "a text that quotes a dialogue": (
        {"prompt": "Explain:\n\nHuman: hi\n\nAssistant: yes", "chosen": " a", "rejected": "b"},
        "Explain:\n\nHuman: hi\n\nAssistant: yes",
        (" a", "b"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    record, prompt, completions = PAIRS[name]
    item = read(record)
    assert (item.prompt, item.completions) == (prompt, completions)
    assert item.judgement == ((0,), (1,))


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ({"ranking": [2, 0, 1]}, ((2,), (0,), (1,))),
        ({"ranking": [3, 1, 2]}, ((2,), (0,), (1,))),
        ({"ranking": [2, [0, 1]]}, ((2,), (0, 1))),
        ({"ranks": [2, 1, 2]}, ((1,), (0, 2))),
        ({"scores": [0.5, -1, 0.5]}, ((0, 2), (1,))),
    ],
)
@pytest.mark.parametrize("column", ["completions", "responses", "answers"])
def test_rankings(column, said, groups):
    item = read({"prompt": "p", column: ["a", "b", "c"], **said})
    assert item.completions == ("a", "b", "c")
    assert item.judgement == groups


def test_rankings_whose_completions_hold_their_rank_or_score():
    ranked = [{"answer": "a", "rank": 2.0, "model": "x"}, {"answer": "b", "rank": 1.0}]
    assert read({"prompt": "p", "answers": ranked}).judgement == ((1,), (0,))
    scored = [{"text": "a", "score": 2}, {"text": "b", "score": 1}]
    item = read({"prompt": chat("hi"), "completions": scored})
    assert (item.prompt, item.completions) == (HI, ("a", "b"))
    assert item.judgement == ((0,), (1,))


@pytest.mark.parametrize("column", ["label", "thumb", "rating"])
@pytest.mark.parametrize(
    ("value", "up"),
    [
        *((value, True) for value in (True, 1, 1.0, "up", "Good", "1", "positive", " yes ")),
        *((value, False) for value in (False, 0, -1, "down", "bad", "-1", "FALSE")),
    ],
)
def test_thumbs(column, value, up):
    item = read({"prompt": "p", "response": "c", column: value})
    assert (item.prompt, item.completions, item.judgement) == ("p", ("c",), Thumb(up))


DEMONSTRATIONS = {
    "instruction": ({"instruction": "do", "output": "done"}, "do"),
    "instruction and input": ({"instruction": "do", "input": "it", "output": "done"}, "do\n\nit"),
    "empty input": ({"instruction": "do", "input": "", "output": "done"}, "do"),
    "context": ({"instruction": "do", "context": "it", "response": "done"}, "do\n\nit"),
    "input alone": ({"input": "do", "output": "done"}, "do"),
    "prompt": ({"prompt": "do", "completion": "done"}, "do"),
    "messages": ({"messages": chat("hi", "yes?", "go on", "done")}, TALK),
    "turns": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "done"}]},
        HI,
    ),
    "a completion in messages": (
        {"prompt": chat("hi"), "completion": [{"role": "assistant", "content": "done"}]},
        HI,
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(name):
    record, prompt = DEMONSTRATIONS[name]
    item = read(record)
    assert (item.prompt, item.completions) == (prompt, ("done",))
    assert item.judgement == Demonstration()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([1], "JSON list"),
        ({}, "no format has these columns: none"),
        ({"a": 1, "b": 2}, "no format has these columns: a, b; see --format and --map"),
        ({"chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": "p", "chosen": " ", "rejected": "a"}, "a completion is empty"),
        ({"prompt": " ", "chosen": "b", "rejected": "a"}, "prompt is empty"),
        ({"prompt": "p", "chosen": 1, "rejected": 2}, "not int"),
        ({"chosen": chat("hi", "a"), "rejected": chat("ho", "b")}, "differ before"),
        ({"chosen": chat("hi", "a", "b"), "rejected": chat("hi", "a", "c")}, "must end with"),
        ({"prompt": [{"role": "elf", "content": "x"}], "completion": "c"}, "unknown role: 'elf'"),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "text as its content"),
        ({"prompt": ["x"], "completion": "c"}, "object with role and content"),
        ({"prompt": chat("hi", "yes"), "completion": "c"}, "ends with the assistant's words"),
        ({"prompt": [], "completion": "c"}, "prompt is empty"),
        ({"messages": "hi"}, "must end with"),
        ({"messages": chat("hi")}, "must end with"),
        ({"prompt": chat("hi"), "input": "x", "completion": "c"}, "input beside a conversation"),
        ({"prompt": "p", "completion": {"x": 1}}, "a completion must be"),
        ({"prompt": "p", "completion": "c", "label": 4}, "neither up nor down: 4"),
        ({"prompt": "p", "completion": "c", "label": [1]}, "neither up nor down"),
        ({"prompt": "p", "completions": ["a"], "ranks": [1]}, "at least two"),
        ({"prompt": "p", "completions": ["a", "b"]}, "has no ranking, ranks or scores"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "a list of 2 numbers"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, "x"]}, "numbers, not 'x'"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, float("nan")]}, "not nan"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": [0, 0]}, "each of the 2"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": [0, 2]}, "each of the 2"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": [0, 1, []]}, "each of the 2"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": "ab"}, "list of positions"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": [0.5, 1]}, "whole numbers"),
        ({"prompt": "p", "completions": ["a", "b"], "ranking": [True, 0]}, "whole numbers"),
        ({"prompt": "p", "completion": "c", "tags": 3}, "tags must be a list"),
        (
            {"system": "s", "prompt": [{"role": "system", "content": "x"}, *chat("hi")]}
            | {"completion": "c"},
            "two system messages",
        ),
    ],
)
def test_bad_records_are_explained(record, problem):
    with pytest.raises(BadRecord, match=problem.replace("(", r"\(")):
        read(record)


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_what_is_not_json_is_a_bad_record(raw):
    with pytest.raises(BadRecord, match="is not JSON"):
        Reader("f").item(raw, 1)


PAIR_COLUMNS = ("prompt", "system", "input", "chosen", "rejected", "messages", "tags")
OTHER_COLUMNS = ("completion", "completions", "label", "ranking", "ranks", "scores")
COLUMNS = st.sampled_from(PAIR_COLUMNS + OTHER_COLUMNS)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=6,
)
RECORDS = st.dictionaries(COLUMNS, VALUES, max_size=5).map(
    lambda record: json.dumps(record).encode()
)


@settings(deadline=None)
@given(st.binary(max_size=40) | RECORDS)
def test_a_line_becomes_a_record_or_a_bad_record(raw):
    reader = Reader("f")
    try:
        item = reader.item(raw, 1)
    except BadRecord:
        return
    assert reader.format in FORMATS
    assert all(text.strip() for text in item.completions)


def test_the_format_of_the_first_record_holds_for_the_file():
    reader = Reader("f")
    reader.item(b'{"prompt": "p", "completion": "c", "label": true}', 1)
    with pytest.raises(BadRecord, match="has no label"):
        reader.item(b'{"prompt": "p", "completion": "c"}', 2)
    assert reader.format == "thumbs"


def test_a_format_can_be_given():
    record = {"prompt": "p", "completion": "c", "label": True}
    assert read(record, format="demonstrations").judgement == Demonstration()


def test_columns_with_other_names_can_be_mapped():
    record = {"ask": "p", "prompt": "not this", "yes": "a", "no": "b", "who": "bob"}
    columns = {"ask": "prompt", "yes": "chosen", "no": "rejected", "who": "rater"}
    item = read(record, columns=columns)
    assert (item.prompt, item.completions, item.rater_id) == ("p", ("a", "b"), "bob")


def test_a_mapped_column_means_nothing_else():
    record = {"instruction": "s", "prompt": "p", "output": "c"}
    item = read(record, columns={"instruction": "system"})
    assert item.prompt == (Message("system", "s"), Message("user", "p"))


def test_raters_and_tags_are_kept():
    item = read({"prompt": "p", "completion": "c", "annotator": 7, "tags": ["a", 1]})
    assert (item.rater_id, item.tags) == ("7", ("a", "1"))
    assert read({"prompt": "p", "completion": "c", "tags": "a"}).tags == ("a",)


def test_plain_text_prompts_skip_the_chat_template():
    record = {"prompt": "p", "completion": "c"}
    assert read(record, plain_text=True).prompt == Text("p")
    assert read({**record, "prompt": chat("hi")}, plain_text=True).prompt == HI


def test_ids_change_with_file_line_and_content_only():
    raw = b'{"prompt": "p", "completion": "c"}'
    first = Reader("a").item(raw, 1).import_id
    assert Reader("a").item(raw + b"\r\n", 1).import_id == first
    others = {
        Reader("b").item(raw, 1).import_id,
        Reader("a").item(raw, 2).import_id,
        Reader("a").item(raw.replace(b'"c"', b'"d"'), 1).import_id,
    }
    assert first not in others


def test_lines_are_numbered_as_in_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "p", "completion": "c"}'
    path.write_text(f"\ufeff{good}\n\nno\n{good}")
    lines = read_all(path)
    assert [line.number for line in lines] == [1, 3, 4]
    assert [line.item is not None for line in lines] == [True, False, True]
    assert lines[-1].end_byte == path.stat().st_size


def test_packed_files_are_read(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 3))
    assert [line.item.prompt for line in read_all(path)] == ["p", "p", "p"]


@pytest.mark.parametrize("cut", [10, 400])
def test_a_damaged_packed_file_is_a_bad_line(tmp_path, cut):
    path = tmp_path / "data.jsonl.gz"
    lines = "".join(f'{{"prompt": "{i * i}", "completion": "c"}}\n' for i in range(1000))
    path.write_bytes(gzip.compress(lines.encode())[:cut])
    *_, last = read_all(path)
    assert last.item is None
    assert "damaged" in last.problem


def test_a_line_beyond_all_measure_is_bad_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "p", "completion": "c"}\n'
    path.write_bytes(good + b" " * (2 * MAX_LINE_BYTES) + b"x\n" + good)
    first, long, last = read_all(path)
    assert (first.number, long.number, last.number) == (1, 2, 3)
    assert "longer than" in long.problem
    assert last.item.prompt == "p"
