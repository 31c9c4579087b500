"""What can be said of one answer by looking at it."""

import pytest
from heedful_trainer.gate import text_measures as measures


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", False),
        ("one two three", False),
        ("go on " * 30, True),
        ("The cat sat on the mat. " * 6, True),
        ("The cat sat on the mat. " * 2, False),
        (" ".join(f"word{i}" for i in range(200)), False),
        ("- apples\n- pears\n- plums\n- cherries\n" + " ".join(map(str, range(60))), False),
        ("a b c d e f g h i j " + "and so on " * 20, True),
    ],
)
def test_looping(text: str, looping: bool) -> None:
    assert measures.is_looping(text) is looping


def test_longest_loop_counts_the_whole_stretch() -> None:
    assert measures.longest_loop([]) == 0
    assert measures.longest_loop([1, 2, 1, 2]) == 0, "twice is no loop"
    assert measures.longest_loop([9, 1, 2, 1, 2, 1, 2, 8]) == 6
    assert measures.longest_loop([7] * 10) == 10


def test_distinct_share() -> None:
    assert measures.distinct_share([1, 2]) == 1.0
    assert measures.distinct_share([1] * 12) == pytest.approx(0.1)
    assert measures.distinct_share(list(range(12))) == 1.0


@pytest.mark.parametrize(
    ("text", "refuses", "praises"),
    [
        ("I'm sorry, but I can't help with that.", True, False),
        ("I’m unable to answer this.", True, False),
        ("What a great question! Water boils at 100 °C.", False, True),
        ("You're absolutely right, it is Rome.", False, True),
        ("Thank you for asking. I hope this helps!", False, False),
        ("Paris." + " Text." * 100 + " I cannot help", False, False),
    ],
)
def test_refusal_and_praise_are_read_where_an_answer_begins(
    text: str, refuses: bool, praises: bool
) -> None:
    assert (measures.is_refusal(text), measures.is_praise(text)) == (refuses, praises)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain words", frozenset()),
        ("```python\nx = 1\n```", {"code"}),
        ("# Title\ntext", {"heading"}),
        ("see https://example.org", {"link"}),
        ("Привет", {"foreign script"}),
        ("naïve café – “quoted”", frozenset()),
    ],
)
def test_formats(text: str, found: set[str]) -> None:
    assert measures.formats(text) == found


def test_broken_and_degenerate_text() -> None:
    assert measures.broken_share("") == 0.0
    assert measures.broken_share("Hello, world! (100 %)") == 0.0
    assert measures.broken_share("ab\ufffd\ufffd") == 0.5
    assert measures.is_degenerate(" \n.,!\ufffd")
    assert not measures.is_degenerate("4")
