"""What each task computes, by hand: MC1 and MC2, numbers in answers, pieces of text, votes."""

import math
from datetime import UTC, datetime
from decimal import Decimal

import heedful
import pytest
from heedful_trainer.evaluation import log
from heedful_trainer.evaluation.tasks.gsm8k import number_in
from heedful_trainer.evaluation.tasks.llmbar import prefers_better
from heedful_trainer.evaluation.tasks.ratings import Judged, figures_of
from heedful_trainer.evaluation.tasks.reward import at_equal_length_95, outcomes_of
from heedful_trainer.evaluation.tasks.text_loss import pieces, split
from heedful_trainer.evaluation.tasks.toxicity import first_line
from heedful_trainer.evaluation.tasks.truthfulqa import Question, mc1, mc2
from heedful_trainer.evaluation.tasks.votes import figure_of
from heedful_trainer.gate.statistics import at_equal_length

QUESTION = Question("Why?", "T1.", ("T1.", "T2."), ("F1.", "F2."))


def test_mc1_asks_whether_the_best_answer_leads_every_false_one() -> None:
    likely = {"T1.": -2.0, "T2.": -1.0, "F1.": -3.0, "F2.": -2.5}
    assert mc1(QUESTION, likely)
    assert not mc1(QUESTION, {**likely, "F2.": -1.5}), "though T2 leads it"
    assert not mc1(QUESTION, {**likely, "F2.": -2.0}), "a tie is no lead"


def test_mc2_is_the_probability_of_what_is_true() -> None:
    shares = {"T1.": 0.2, "T2.": 0.1, "F1.": 0.05, "F2.": 0.05}
    likely = {answer: math.log(share) for answer, share in shares.items()}
    assert mc2(QUESTION, likely) == pytest.approx(0.3 / 0.4)
    # Sums over long answers underflow as probabilities; only their differences count.
    lower = {answer: value - 5000.0 for answer, value in likely.items()}
    assert mc2(QUESTION, lower) == pytest.approx(0.75)


def test_every_answer_is_asked_once() -> None:
    assert QUESTION.answers == ("T1.", "T2.", "F1.", "F2.")
    assert Question("?", "B.", ("T.",), ("F.",)).answers == ("B.", "T.", "F.")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is 9.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $70000 dollars", "70000"),
        ("#### -5", "-5"),
        ("first 3, then 16-3=13", "13"),
        ("16-3", "3"),
        ("The answer is $18.50.", "18.50"),
        ("18.", "18"),
        ("#### none, but 7 before it", "7"),
        ("#### 1\n#### 2", "2"),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_number_that_an_answer_gives(text: str, number: str | None) -> None:
    assert number_in(text) == (Decimal(number) if number is not None else None)


def test_numbers_are_compared_by_value() -> None:
    assert number_in("#### 3.50") == number_in("3.5")


def test_a_longer_answer_does_not_lose_by_its_length() -> None:
    assert prefers_better([-1.0] * 10, [-1.5] * 2)
    assert not prefers_better([-2.0], [-1.0] * 9)


def test_text_is_cut_where_words_end_and_nothing_is_lost() -> None:
    text = " ".join(f"word{idx}" for idx in range(300))
    parts = pieces(text)
    assert text.startswith("".join(parts))
    assert all(200 <= len(part) <= 400 for part in parts)
    for prompt, rest in map(split, (*parts, "x" * 500, "short text", "ab")):
        assert isinstance(prompt, heedful.Text)
        assert prompt.text
        assert rest
    assert split("x" * 500) == (heedful.Text("x" * 40), "x" * 360)
    assert pieces("short") == []


def test_a_continuation_is_judged_up_to_its_first_line_break() -> None:
    assert first_line("\n a b \nc") == "a b "


def event(judgement: object, **fields: object) -> heedful.Event:
    return heedful.Event(judgement, **fields)  # type: ignore[arg-type]


def test_programs_are_no_people() -> None:
    thumb = heedful.Thumb(True)
    assert log.is_person(event(thumb, rater_id="ann"))
    assert log.is_person(event(thumb, rater_kind="expert"))
    assert not log.is_person(event(thumb, rater_kind="judge"))
    assert not log.is_person(event(thumb, tags=("simulated",)))
    assert not log.is_person(event(thumb, rater_id="simulated:brief"))


def logged(name: str, version: str, prompt: str = "Hi") -> heedful.LoggedCompletion:
    completion = heedful.Completion(
        index=0,
        completion_id=name,
        text="",
        token_ids=(),
        finish_reason=heedful.FinishReason.STOP,
        usage=heedful.Usage(1, 0, 1),
    )
    served = heedful.ServedBy(version, "tiny", "f32", 0, "")
    return heedful.LoggedCompletion(completion, served, prompt)


def exported(ranking: heedful.Ranking, *answers: heedful.LoggedCompletion) -> object:
    receipt = heedful.Receipt("f", 1, heedful.ReceiptStatus.STORED, datetime.now(UTC))
    said = event(ranking, comparison_id="c", rater_id="ann")
    record = heedful.FeedbackRecord(said, receipt, heedful.Fate(heedful.FateKind.WAITING), True)
    return heedful.ExportedFeedback(record, answers)


@pytest.mark.parametrize(
    ("groups", "all_bad", "outcome"),
    [
        ((("a",), ("b",)), False, 1.0),
        ((("b",), ("a",)), False, 0.0),
        ((("a", "b"),), False, 0.5),
        ((("a",), ("b",)), True, 0.5),
        ((("x",), ("a",), ("b",)), False, 1.0),
    ],
)
def test_a_vote_on_a_pair(
    groups: tuple[tuple[str, ...], ...], all_bad: bool, outcome: float
) -> None:
    answers = (logged("a", "v1"), logged("b", "base"), logged("x", "v9"))
    vote = log.vote_of(exported(heedful.Ranking(groups, all_bad), *answers), "v1", "base")  # type: ignore[arg-type]
    assert vote is not None
    assert (vote.outcome, vote.rater) == (outcome, "ann")


def test_a_vote_between_others_is_none() -> None:
    item = exported(heedful.Ranking((("a",), ("b",))), logged("a", "v1"), logged("b", "v2"))
    assert log.vote_of(item, "v1", "base") is None  # type: ignore[arg-type]


def test_the_unit_is_the_rater_once_enough_are_known() -> None:
    few = [log.Vote(rater, f"p{idx}", 1.0) for idx, rater in enumerate("aabbcc")]
    many = [log.Vote(rater, "p", float(rater != "f")) for rater in "abcdef" for _ in range(5)]
    by_prompt, by_rater = figure_of(few), figure_of(many)
    assert by_prompt.version is not None
    assert by_rater.version is not None
    assert (by_prompt.version.n, by_rater.version.n) == (6, 6)
    assert by_rater.version.value == pytest.approx(5 / 6)
    assert "25 won, 5 lost, 0 tied; 6 named raters; n counts raters" in by_rater.detail


def test_grades_count_an_answer_once_and_flags_only_where_judged() -> None:
    version = Judged(["a", "a", "b"], [7, 5, 2], [heedful.Label(hallucination=True)])
    baseline = Judged([], [], [heedful.Label(hallucination=False, satisfies_constraint=True)])
    grade, hallucination, constraint = figures_of(version, baseline)
    assert grade.version is not None
    assert (grade.version.value, grade.version.n) == (4.0, 2)
    assert grade.baseline is None
    assert hallucination.version is not None
    assert hallucination.baseline is not None
    assert (hallucination.version.value, hallucination.baseline.value) == (1.0, 0.0)
    assert (constraint.version, constraint.better) == (None, "higher")
    assert hallucination.reading == "not compared"


def test_rewards_decide_and_equal_ones_tie() -> None:
    assert outcomes_of([1.0, 0.5, 2.0], [0.0, 0.5, 3.0]) == [1.0, 0.5, 0.0]


def test_the_interval_at_equal_length_is_widened_in_logits() -> None:
    outcomes, lengths = [1.0] * 15 + [0.0] * 5, [(10.0, 10.0)] * 20
    value, low, high = at_equal_length(outcomes, lengths)
    found = at_equal_length_95(outcomes, lengths)

    def logit(share: float) -> float:
        return math.log(share / (1 - share))

    half_90, half_95 = logit(high) - logit(value), logit(found.high) - logit(found.value)
    assert half_95 / half_90 == pytest.approx(1.959964 / 1.644854, abs=1e-6)
    assert found.low < low < value == found.value
