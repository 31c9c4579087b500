"""The page: whole, self-contained, and honest about what is small or missing."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import heedful
import pytest
from heedful_trainer.evaluation import charts
from heedful_trainer.evaluation.figures import Estimate, Figure, mean_figure, share_figure
from heedful_trainer.evaluation.page import number, page_of
from heedful_trainer.evaluation.run import Evaluation, Subject
from heedful_trainer.evaluation.section import Counts, Section

VOID = {"meta", "line", "circle", "rect"}


class Outline(HTMLParser):
    """Fails where a tag is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(evaluation: Evaluation) -> str:
    page = page_of(evaluation)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(", page)
    assert not re.search(r"\b(nan|inf)\b", page.partition("</style>")[2])
    return page


@pytest.fixture
def evaluation() -> Evaluation:
    shares = ([True] * 18 + [False] * 2, [True] * 2 + [False] * 18)
    done = Section(
        "truthfulqa",
        "Truthfulness: TruthfulQA",
        "done",
        figures=(
            share_figure("MC1", shares, True, detail="<b>of</b> questions"),
            mean_figure("loss", "nats a token", ([2.0], [1.5]), True, better="lower"),
            Figure("won", "share", "higher", Estimate(0.5, 0.2, 0.8, 20), reference=0.5),
            Figure("flag", "share", "lower", Estimate(0.1, 0.0, 0.4, 9), Estimate(0.2, 0, 0.5, 7)),
            share_figure("nothing fits", ([], []), True),
        ),
        counts=(Counts("grades from 1 to 7", ("1", "2"), {"v1": (0, 3), "base": (1, 0)}),),
        notes=("a note",),
        data=(
            {
                "data_set": "TruthfulQA",
                "file": "truthfulqa.csv",
                "licence": "Apache-2.0",
                "source": "https://example.org",
                "sha256": "ab" * 32,
                "published": False,
            },
        ),
    )
    skipped = Section("gsm8k", "Capability: GSM8K", "skipped", "no data: put it into --data DIR")
    subject = Subject("v1", "base", "<project>", "tiny", "f32")
    made = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    return Evaluation(subject, (done, skipped), 0, 20, made, "0.1.0")


def test_every_figure_has_its_n_its_interval_and_a_word(evaluation: Evaluation) -> None:
    page = checked(evaluation)
    assert "<h1>Evaluation of v1 against base</h1>" in page
    assert "90.0 % <small>69.9 % to 97.2 %</small>" in page
    assert "+80.0 <small>" in page
    assert '<td class="reading better">better</td>' in page
    assert '<td class="reading undecided">n too small</td>' in page
    assert "+0.500 <small>? to ?</small>" in page
    assert "<td>9 / 7</td>" in page
    assert "<b>1</b> better" in page
    assert "put it into --data DIR" in page
    assert "Apache-2.0" in page
    assert "not the file that this release knows" in page


def test_what_others_wrote_is_text(evaluation: Evaluation) -> None:
    page = checked(evaluation)
    assert "&lt;b&gt;of&lt;/b&gt; questions" in page
    assert "project &lt;project&gt;" in page


def test_one_policy_alone(evaluation: Evaluation) -> None:
    subject = replace(evaluation.subject, version="base")
    page = checked(replace(evaluation, subject=subject, sections=()))
    assert "<h1>Evaluation of base</h1>" in page
    assert "nothing is compared" in page
    assert "difference" not in page


def test_an_early_end_is_said_at_the_top(evaluation: Evaluation) -> None:
    page = checked(replace(evaluation, error=heedful.Unavailable("the server went away")))
    assert "Ended early: the server went away" in page


def test_numbers_as_people_read_them() -> None:
    assert number(0.123, "share") == "12.3 %"
    assert number(2.9, "nats a token") == "2.900"
    assert number(3.5, "grade, 1 to 7") == "3.50"
    assert number(148.44, "tokens") == "148.4"
    assert number(float("inf"), "share") == "?"


def test_a_dot_stands_where_its_value_is() -> None:
    marks = [
        charts.Mark("a", 0.5, 0.25, 0.75, "better"),
        charts.Mark("b", 0.0, float("-inf"), float("inf"), "worse"),
    ]
    image = charts.intervals(marks, 0.0, "x")
    # The axis is 460 wide from 340 and spans 0 to .75 with 6 % room on both sides.
    place = 340 + (0.5 + 0.045) / 0.84 * 460
    assert f'<circle class="dot better" cx="{place:.1f}"' in image
    assert 'x1="340.0"' in image, "an end that is not known reaches the edge"
    assert 'x2="800.0"' in image


def test_a_chart_of_one_certain_number_has_an_axis() -> None:
    image = charts.intervals([charts.Mark("a", 0.0, 0.0, 0.0, "undecided")], 0.0, "x")
    assert image.count('class="tick"') > 3
