"""Rating, editing and comparing answers in `heedful chat`: a pipe and a real (pseudo) terminal."""

import pytest
from heedful.cli.voting import Vote, parse_vote
from heedful_proto.v1 import feedback_pb2 as pb

REFUSED = "x" * 20_000


def said(memory) -> list[str]:
    return [record.event.WhichOneof("kind") or "retraction" for record in memory.records.values()]


def turns(request) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.prompt.chat.messages]


@pytest.mark.parametrize(
    ("text", "k", "vote"),
    [
        ("a", 2, Vote(((0,), (1,)))),
        ("B", 2, Vote(((1,), (0,)))),
        (" ba ", 2, Vote(((1,), (0,)))),
        ("t", 3, Vote(((0, 1, 2),))),
        ("n", 2, Vote(((0, 1),), all_bad=True)),
        ("s", 2, None),
        ("", 2, None),
        ("c", 3, Vote(((2,), (0, 1)))),
        ("cab", 3, Vote(((2,), (0,), (1,)))),
        ("c > a, b", 3, Vote(((2,), (0,), (1,)))),
        ("b=ca", 3, Vote(((1, 2), (0,)))),
        ("ac=b", 3, Vote(((0,), (1, 2)))),
        ("i", 9, Vote(((8,), tuple(range(8))))),
    ],
)
def test_votes(text, k, vote):
    assert parse_vote(text, k) == vote


@pytest.mark.parametrize(("text", "k"), [("c", 2), ("aa", 2), ("=a", 2), ("a=", 2), ("a==b", 2)])
@pytest.mark.parametrize("noise", ["", "x", "1"])
def test_what_is_no_vote(text, k, noise):
    with pytest.raises(ValueError, match="not a vote"):
        parse_vote(text + noise, k)


def test_who_wins_a_vote():
    assert parse_vote("b=ca", 3).winner == 1
    assert parse_vote("t", 3).winner == 0
    assert parse_vote("n", 3).winner is None


def test_answers_are_rated_through_a_pipe(run, memory):
    lines = "one\n/up\n/down wrong, too long\ntwo\n/critique rude\n/edit better\n"
    done = run("chat", "--end-user", "ann", stdin=lines)
    assert (done.exit_code, done.stdout) == (0, "one\ntwo\n")
    assert "thumb up recorded" in done.stderr
    assert said(memory) == ["thumb", "thumb", "critique", "correction"]
    up, down, critique, correction = memory.events
    assert up.thumb.up
    assert (down.thumb.up, list(down.thumb.reasons)) == (False, ["wrong", "too long"])
    assert (up.completion_id, critique.completion_id) == ("id-0", "id-1")
    assert (critique.critique.text, correction.correction.text) == ("rude", "better")
    tokens = [request.event.completion_token for request in memory.of(pb.SubmitFeedbackRequest)]
    assert tokens == ["token-0", "token-0", "token-1", "token-1"]


def test_an_edited_answer_continues_the_conversation(run, memory, script):
    run("chat", stdin="one\n/edit better\ntwo\n")
    assert turns(script.requests[1]) == [("user", "one"), ("assistant", "better"), ("user", "two")]


def test_an_edit_without_text_takes_the_next_line_of_a_pipe(run, memory, script):
    run("chat", stdin="one\n/edit\n  better  \ntwo\n")
    assert memory.events[0].correction.text == "better"
    assert turns(script.requests[1])[1] == ("assistant", "better")


def test_undo_takes_back_one_judgement_after_the_other(run, memory, script):
    run("chat", stdin="one\n/up\n/edit better\n/undo\ntwo\n/undo\n/undo\n")
    assert said(memory) == ["thumb", "correction", "retraction", "retraction"]
    thumb, correction, first, second = memory.records.values()
    assert (first.retracts_id, second.retracts_id) == (
        correction.event.feedback_id,
        thumb.event.feedback_id,
    )
    assert turns(script.requests[1])[1] == ("assistant", "one")


def test_what_cannot_be_rated_is_said(run, memory):
    done = run("chat", stdin="/up\n/undo\none\n/critique\n/edit one\n/reset\n/down\n/help\n")
    assert done.exit_code == 0
    assert memory.records == {}
    assert done.stderr.count("there is no answer yet") == 2
    assert "nothing to take back" in done.stderr
    assert "/critique takes what you want to say" in done.stderr
    assert "nothing was changed" in done.stderr
    assert "/undo          take back" in done.stderr


def test_an_answer_that_was_not_logged_cannot_be_rated(run, memory, script):
    script.rateable = False
    done = run("chat", stdin="one\n/up\n")
    assert "was not logged, so it cannot be rated" in done.stderr
    assert memory.requests == []


def test_a_refused_judgement_ends_a_pipe_with_1(run, memory):
    done = run("chat", stdin="one\n/critique " + REFUSED + "\ntwo\n")
    assert done.exit_code == 1
    assert "event.critique.text: is too long" in done.stderr
    assert done.stdout == "one\n"


def test_compare_through_a_pipe(run, memory, script):
    lines = "one\nb\ntwo\nt\nthree\nn\nfour\ns\nfive\na\n"
    done = run("chat", "--compare", "--end-user", "ann", "--temperature", "0.5", stdin=lines)
    assert done.exit_code == 0
    assert done.stdout.startswith("[a] one 0\n[b] one 1\n[a] two 0\n")
    assert "vote recorded · a is base · b is v1" in done.stderr
    requests = memory.of(pb.CompareRequest)
    assert (requests[0].k, requests[0].end_user, requests[0].sampling.temperature) == (
        2,
        "ann",
        0.5,
    )
    assert turns(requests[1])[1] == ("assistant", "one 1")
    assert turns(requests[2])[3] == ("assistant", "two 0")
    # Where none was good the turn is forgotten; a skipped vote goes on with the first answer.
    assert [text for _, text in turns(requests[3])][-1] == "four"
    assert ("user", "three") not in turns(requests[3])
    assert turns(requests[4])[-2:] == [("assistant", "four 0"), ("user", "five")]
    rankings = [event.ranking for event in memory.events]
    assert [len(ranking.groups) for ranking in rankings] == [2, 1, 1, 2]
    assert [ranking.all_bad for ranking in rankings] == [False, False, True, False]


def test_compare_with_more_answers_takes_an_order(run, memory):
    run("chat", "--compare", "--k", "3", "--model", "v1", "--seed", "4", stdin="one\ncab\n")
    request = memory.of(pb.CompareRequest)[0]
    assert (request.k, list(request.models), request.sampling.seed) == (3, ["v1"], 4)
    groups = [list(group.completion_ids) for group in memory.events[0].ranking.groups]
    assert groups == [["cand-0-2"], ["cand-0-0"], ["cand-0-1"]]


def test_the_answer_that_was_kept_can_be_rated_and_the_vote_undone(run, memory):
    run("chat", "--compare", stdin="one\nb\n/up\n/undo\n/undo\n")
    assert said(memory) == ["ranking", "thumb", "retraction", "retraction"]
    assert memory.events[1].completion_id == "cand-0-1"


def test_a_pipe_that_ends_before_the_vote_records_none(run, memory):
    done = run("chat", "--compare", stdin="one\n")
    assert done.exit_code == 0
    assert memory.records == {}


def test_a_line_that_is_no_vote_ends_a_pipe_with_2(run, memory):
    done = run("chat", "--compare", stdin="one\nwhy not two\nb\n")
    assert done.exit_code == 2
    assert "not a vote: why not two" in done.stderr


def test_versions_stay_hidden_from_those_who_may_not_read_the_log(run, memory):
    memory.hide_completions = True
    done = run("chat", "--compare", stdin="one\nb\n")
    assert done.exit_code == 0
    assert "vote recorded\n" in done.stderr


def test_rating_in_a_terminal(open_terminal, memory, eventually):
    terminal = open_terminal("chat")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("5 tokens")
    terminal.expect("> ")
    terminal.type("/down too long\n")
    terminal.expect("thumb down recorded")
    terminal.expect("> ")
    terminal.type("/undo\n")
    terminal.expect("taken back")
    assert said(memory) == ["thumb", "retraction"]


def test_editing_in_a_terminal_with_an_editor(open_terminal, memory, tmp_path):
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\nprintf "%s, but better\\n" "$(cat "$2")" > "$2"\n')
    editor.chmod(0o755)
    terminal = open_terminal("chat", VISUAL="", EDITOR=f"'{editor}' -w")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("5 tokens")
    terminal.expect("> ")
    terminal.type("/edit\n")
    terminal.expect("correction recorded")
    assert memory.events[0].correction.text == "hello, but better"


def test_editing_in_a_terminal_without_an_editor_takes_a_line(open_terminal, memory):
    terminal = open_terminal("chat", VISUAL="", EDITOR="")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("5 tokens")
    terminal.expect("> ")
    terminal.type("/edit\n")
    terminal.expect("it should have been: ")
    terminal.type("good day\n")
    terminal.expect("correction recorded")
    terminal.expect("> ")
    terminal.type("/edit\n")
    terminal.expect("it should have been: ")
    terminal.type("\x04")
    terminal.expect("not edited")
    assert memory.events[0].correction.text == "good day"
    assert len(memory.events) == 1


def test_an_editor_that_cannot_be_started_is_said(open_terminal, memory):
    terminal = open_terminal("chat", VISUAL="/no/such/editor")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("5 tokens")
    terminal.type("/edit\n")
    terminal.expect("not edited")
    terminal.expect("> ")


def test_one_key_is_a_vote_in_a_terminal(open_terminal, memory):
    terminal = open_terminal("chat", "--compare")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("[b] hello 1")
    terminal.expect("s skip: ")
    terminal.type("b")
    terminal.expect("vote recorded · a is base · b is v1")
    terminal.expect("> ")
    terminal.type("again\n")
    terminal.expect("s skip: ")
    terminal.type("x")
    terminal.expect("not a vote: x")
    terminal.expect("s skip: ")
    terminal.type("t")
    terminal.expect("vote recorded")
    terminal.expect("> ")
    groups = [list(group.completion_ids) for group in memory.events[0].ranking.groups]
    assert groups == [["cand-0-1"], ["cand-0-0"]]
    assert len(memory.events[1].ranking.groups) == 1


@pytest.mark.parametrize("key", ["\x03", "\x04", "\r", "s"])
def test_a_vote_can_be_left_out_in_a_terminal(open_terminal, memory, key):
    terminal = open_terminal("chat", "--compare")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("s skip: ")
    terminal.type(key)
    terminal.expect("> ")
    terminal.type("more\n")
    terminal.expect("[a] more 0")
    assert memory.records == {}
    assert turns(memory.of(pb.CompareRequest)[1])[1] == ("assistant", "hello 0")


def test_more_than_two_answers_take_a_line_in_a_terminal(open_terminal, memory):
    terminal = open_terminal("chat", "--compare", "--k", "3")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("as in ba or b=ca")
    terminal.expect("s skip: ")
    terminal.type("b=ca\n")
    terminal.expect("vote recorded")
    groups = [list(group.completion_ids) for group in memory.events[0].ranking.groups]
    assert groups == [["cand-0-1", "cand-0-2"], ["cand-0-0"]]


def test_a_question_is_answered_in_a_terminal(open_terminal, client_with_question, memory):
    terminal = open_terminal("feedback", "next")
    terminal.expect("user: which one?")
    terminal.expect("s skip: ")
    terminal.type("n")
    terminal.expect("vote recorded")
    assert terminal.process.wait(10) == 0
    assert memory.events[0].ranking.all_bad


@pytest.fixture
async def client_with_question(client):
    await client.compare("which one?")
    return client
