"""`heedful chat`, through a pipe and in a real (pseudo) terminal."""

import grpc
import pytest
from heedful.cli.app import build_app
from typer.testing import CliRunner, Result


def run_pipe(server, text: str, *arguments: str) -> Result:
    environment = {"HEEDFUL_TARGET": server.target}
    return CliRunner().invoke(build_app(), ["chat", *arguments], input=text, env=environment)


@pytest.fixture
def terminal(open_terminal):
    return open_terminal("chat")


def roles_and_texts(request) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.prompt.chat.messages]


def test_a_pipe_gets_answers_only(server):
    done = run_pipe(server, "one\ntwo\n")
    assert done.stdout == "one\ntwo\n"
    assert done.exit_code == 0
    assert "base · Echo-1 q4_1 · 3 tokens · " in done.stderr
    assert "tokens/s" in done.stderr


def test_turns_accumulate_and_commands_change_the_conversation(server, script):
    lines = "one\ntwo\n/system be kind\n/seed 7\nthree\n/reset\n/seed\nfour\n/system\nfive\n"
    run_pipe(server, lines)
    turn = [("user", "one"), ("assistant", "one"), ("user", "two")]
    longer = [*turn, ("assistant", "two"), ("user", "three")]
    requests = script.requests
    assert roles_and_texts(requests[0]) == turn[:1]
    assert roles_and_texts(requests[1]) == turn
    assert roles_and_texts(requests[2]) == [("system", "be kind"), *longer]
    assert roles_and_texts(requests[3]) == [("system", "be kind"), ("user", "four")]
    assert roles_and_texts(requests[4])[0] == ("user", "four")
    assert requests[2].sampling.seed == 7
    assert not requests[3].sampling.HasField("seed")


def test_exit_ends_the_conversation(server):
    done = run_pipe(server, "one\n/exit\ntwo\n")
    assert done.stdout == "one\n"


def test_unknown_commands_and_bad_seeds_are_explained(server, script):
    done = run_pipe(server, "/frobnicate\n/seed soon\n/help\n")
    assert "unknown command /frobnicate" in done.stderr
    assert "/seed takes a whole number" in done.stderr
    assert "/reset" in done.stderr
    assert script.requests == []


def test_options_reach_the_wire(server, script):
    options = ("--system", "s", "--temperature", "0", "--max-tokens", "2", "--end-user", "u")
    done = run_pipe(server, "hello\n", *options)
    assert done.stdout == "he\n"
    assert "length" in done.stderr
    request = script.requests[0]
    assert request.prompt.chat.messages[0].content == "s"
    assert request.sampling.HasField("temperature")
    assert request.end_user == "u"


def test_a_failed_turn_ends_a_pipe_with_1(server, script, refusal):
    script.refusals = [refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long", field="prompt")]
    done = run_pipe(server, "one\ntwo\n")
    assert done.exit_code == 1
    assert "prompt: too long" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_a_prompt_streams_and_leaves_at_the_end_of_input(terminal):
    terminal.expect("/help lists commands")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("hello")
    terminal.expect("hello")
    terminal.expect("5 tokens")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0


def test_ctrl_c_ends_the_answer_and_not_the_conversation(terminal, script, eventually):
    terminal.expect("> ")
    script.delay_s = 0.2
    terminal.type("a" * 60 + "\n")
    terminal.expect("a" * 60)
    terminal.expect("aaaa")
    terminal.type("\x03")
    terminal.expect("cancelled")
    assert eventually(script.cancelled.is_set)
    script.delay_s = 0.0
    terminal.expect("> ")
    terminal.type("next\n")
    terminal.expect("tokens")
    terminal.expect("> ")
    turns = roles_and_texts(script.requests[1])
    assert [role for role, _ in turns] == ["user", "assistant", "user"]
    assert 0 < len(turns[1][1]) < 60
    terminal.type("/exit\n")
    assert terminal.process.wait(10) == 0


def test_ctrl_c_at_the_prompt_clears_the_line(terminal, script):
    terminal.expect("> ")
    terminal.type("half a li\x03")
    terminal.expect("> ")
    terminal.type("whole\n")
    terminal.expect("5 tokens")
    assert roles_and_texts(script.requests[0]) == [("user", "whole")]


def test_an_error_keeps_the_conversation_as_it_was(terminal, script, refusal):
    terminal.expect("> ")
    script.refusals = [refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long", field="prompt")]
    terminal.type("one\n")
    terminal.expect("prompt: too long")
    terminal.expect("> ")
    terminal.type("two\n")
    terminal.expect("3 tokens")
    assert roles_and_texts(script.requests[0]) == [("user", "two")]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(terminal, script):
    terminal.expect("> ")
    # The echo of what is typed comes first, so the answer is what follows the line's end.
    script.delay_s = 0.2
    terminal.type("/system x\n")
    terminal.expect("> ")
    terminal.type("\x16\x1b[31mred\n")
    terminal.expect("\n")
    shown = terminal.expect("tokens/s")
    assert "[31mred" in shown
    assert "\x1b[31m" not in shown
