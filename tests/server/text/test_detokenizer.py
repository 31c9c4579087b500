import pytest
from heedful_server.text.detokenizer import StreamDetokenizer
from heedful_server.text.stop_strings import StopMatcher
from heedful_server.text.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st

IDS = st.lists(st.integers(0, 450), max_size=60)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=20)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the stop string that is complete first, the longest of equals."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, minus_length, stop = min(found)
    return text[: end + minus_length], stop


def run(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[str, str | None, int]:
    """Return the text, the stop string and how many tokens were taken."""
    stream = StreamDetokenizer(tokenizer, stops)
    text = ""
    for taken, token_id in enumerate(ids, start=1):
        delta = stream.push(token_id)
        text += delta.text
        if delta.stop is not None:
            return text + stream.finish(), delta.stop, taken
    return text + stream.finish(), None, len(ids)


@given(ids=IDS)
def test_deltas_of_any_ids_add_up_to_the_text(byte_level: Tokenizer, ids: list[int]) -> None:
    assert run(byte_level, ids, [])[0] == byte_level.decode(ids, skip_special_tokens=True)


@given(ids=IDS)
def test_sentencepiece_deltas_add_up_and_keep_the_space_that_continues_the_prompt(
    sentencepiece: Tokenizer, ids: list[int]
) -> None:
    opened = sentencepiece.encode("x", False)
    whole = sentencepiece.decode([*opened, *ids], skip_special_tokens=True)
    assert "x" + run(sentencepiece, ids, [])[0] == whole


def test_no_delta_holds_part_of_a_character(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("é🙂", False), *byte_level.encode("👩‍👩‍👧 end", False)]
    stream = StreamDetokenizer(byte_level, [])
    text = "".join(stream.push(token_id).text for token_id in ids)
    assert text == "é🙂👩‍👩‍👧 end"


@pytest.mark.parametrize("family", ["byte_level_dir", "sentencepiece_dir"])
def test_a_character_of_four_byte_tokens_comes_with_its_last_token(
    family: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue(family))
    ids = tokenizer.encode("\U0002a6b2", False)[-4:]
    stream = StreamDetokenizer(tokenizer, [])
    assert [stream.push(token_id).text for token_id in ids] == ["", "", "", "\U0002a6b2"]
    assert stream.finish() == ""


def test_an_unfinished_character_becomes_one_replacement_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a\U0002a6b2", False)[:-1]
    assert run(byte_level, ids, []) == ("a\ufffd", None, len(ids))


def test_bytes_that_are_no_text_are_replaced_as_soon_as_that_is_certain(
    byte_level: Tokenizer,
) -> None:
    (first, *_) = byte_level.encode("\U0002a6b2", False)
    (letter,) = byte_level.encode("a", False)
    stream = StreamDetokenizer(byte_level, [])
    assert [stream.push(token_id).text for token_id in (first, letter)] == ["", "\ufffda"]


def test_control_tokens_leave_no_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the<|end|> dog<|pad|>", False)
    assert run(byte_level, ids, [])[0] == "the dog"


@given(pieces=PIECES, stops=STOPS)
def test_stop_strings_end_the_text_wherever_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text, stop = "", None
    for piece in pieces:
        safe, stop = matcher.push(piece)
        text += safe
        if stop is not None:
            break
    assert (text + matcher.finish(), stop) == first_stop("".join(pieces), stops)


@given(pieces=PIECES, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    seen = sent = ""
    for piece in pieces:
        safe, stop = matcher.push(piece)
        seen, sent = seen + piece, sent + safe
        if stop is not None:
            return
        starts = {stop[:length] for stop in stops for length in range(1, len(stop))}
        held = max((len(start) for start in starts if seen.endswith(start)), default=0)
        assert sent == seen[: len(seen) - held]


@given(ids=st.lists(st.integers(3, 300), max_size=60), data=st.data())
def test_a_stop_string_in_a_completion_ends_it_at_the_right_token(
    byte_level: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    whole = byte_level.decode(ids, skip_special_tokens=True).replace("\ufffd", "")
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stops = [whole[start : start + 3] or "never"]
    text, stop, taken = run(byte_level, ids, stops)
    assert (text, stop) == first_stop(byte_level.decode(ids, True), stops)
    if stop is not None:
        assert stop in byte_level.decode(ids[:taken], True)
        assert stop not in byte_level.decode(ids[: taken - 1], True)


def test_a_stop_string_across_tokens_is_never_sent_in_part(byte_level: Tokenizer) -> None:
    stream = StreamDetokenizer(byte_level, ["\nUser:"])
    ids = [item for char in "Paris.\nUser: hi" for item in byte_level.encode(char, False)]
    deltas = [stream.push(token_id) for token_id in ids]
    assert [delta.text for delta in deltas[:7]] == ["P", "a", "r", "i", "s", ".", ""]
    assert "".join(delta.text for delta in deltas) == "Paris."
    assert [delta.stop for delta in deltas if delta.stop] == ["\nUser:"]
    assert stream.finish() == ""


def test_text_held_for_a_stop_string_that_does_not_come_is_sent(byte_level: Tokenizer) -> None:
    assert run(byte_level, byte_level.encode("a\nUse", False), ["\nUser:"])[0] == "a\nUse"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("xabcy", ["abc", "c"], ("x", "abc")),
        ("xabcdy", ["abcd", "bc"], ("xa", "bc")),
        ("aaab", ["aab"], ("a", "aab")),
        ("ababac", ["abac", "zz"], ("ab", "abac")),
        ("abcabd", ["abd", "abd"], ("abc", "abd")),
        ("🙂🙂!", ["🙂!"], ("🙂", "🙂!")),
    ],
)
def test_overlapping_stop_strings(
    text: str, stops: list[str], expected: tuple[str, str | None]
) -> None:
    for pieces in ([text], list(text)):
        matcher = StopMatcher(stops)
        results = [matcher.push(piece) for piece in pieces]
        sent = "".join(safe for safe, _ in results)
        assert (sent, next(stop for _, stop in results if stop)) == expected
