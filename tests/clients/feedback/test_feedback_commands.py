"""`heedful feedback` and `heedful erase`: what they print, send and refuse."""

import gzip
import json
from datetime import datetime

import grpc
import pytest
from heedful import Client
from heedful.cli.app import build_app
from heedful.cli.feedback import build_feedback
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2

COMMANDS = ("add", "list", "get", "retract", "next", "summary", "export", "import")
BRED = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture
def client(server, memory):
    with Client(server.target) as client:
        yield client


@pytest.fixture
def completion(client):
    return client.generate("hello", end_user="ann").completions[0]


@pytest.fixture
def data_file(tmp_path):
    def write(*lines: object, name: str = "data.jsonl"):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / name
        path.write_text("".join(f"{text}\n" for text in texts))
        return str(path)

    return write


def test_the_list_of_commands():
    registered = build_feedback().registered_commands
    assert {item.name or item.callback.__name__ for item in registered} == set(COMMANDS)
    groups = {group.name for group in build_app().registered_groups}
    assert "feedback" in groups


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(run, name):
    result = run("feedback", name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_a_thumb(run, memory, completion):
    result = run(
        *("feedback", "add", "id-0", "--down", "--reason", "wrong", "--reason", "rude"),
        *("--token", "token-0", "--rater", "bob", "--rater-kind", "expert", "--tag", "t"),
        "--no-train",
    )
    assert result.exit_code == 0
    (event,) = memory.events
    assert result.stdout == f"{event.feedback_id}  stored, position 1\n"
    assert (event.thumb.up, list(event.thumb.reasons)) == (False, ["wrong", "rude"])
    assert (event.rater_id, event.rater_kind) == ("bob", pb.RATER_KIND_EXPERT)
    assert list(event.tags) == ["t"]
    assert event.train == inference_pb2.TRAIN_CONSENT_NO
    assert memory.of(pb.SubmitFeedbackRequest)[0].event.completion_token == "token-0"


def test_every_kind_of_judgement(run, memory, completion):
    run("feedback", "add", "id-0", "--up")
    run("feedback", "add", "id-0", "--grade", "5")
    run("feedback", "add", "id-0", "--correction", "better")
    run("feedback", "add", "id-0", "--critique", "-", "--aspect", "tone", stdin="rude\nvery")
    run("feedback", "add", "id-0", "--flag", "hallucination", "--flag", "harmful-advice=no")
    kinds = [event.WhichOneof("kind") for event in memory.events]
    assert kinds == ["thumb", "rating", "correction", "critique", "label"]
    assert memory.events[3].critique.text == "rude\nvery"
    label = memory.events[4].label
    assert label.hallucination
    assert label.HasField("harmful_advice")
    assert not label.harmful_advice


def test_rankings(run, memory, client):
    comparison = client.compare("which", k=3)
    ids = [item.completion_id for item in comparison.candidates]
    result = run(
        *("feedback", "add", "--comparison", "cmp-0", "--rank", ids[2]),
        *("--rank", f"{ids[0]}={ids[1]}", "--all-bad", "--token", "cmp-token-0"),
    )
    assert result.exit_code == 0
    assert run("feedback", "add", "--rank", ids[0], "--rank", ids[1]).exit_code == 0
    answered, free = memory.events
    assert answered.comparison_id == "cmp-0"
    assert answered.ranking.all_bad
    groups = [list(group.completion_ids) for group in answered.ranking.groups]
    assert groups == [[ids[2]], [ids[0], ids[1]]]
    assert free.comparison_id == ""


def test_repeating_with_the_same_id_records_once(run, memory, completion):
    name = "0190b8a0-0000-7000-8000-000000000001"
    first = run("feedback", "add", "id-0", "--up", "--id", name, "--json")
    again = run("feedback", "add", "id-0", "--up", "--id", name, "--json")
    assert json.loads(first.stdout)["status"] == "stored"
    document = json.loads(again.stdout)
    assert (document["status"], document["seq"]) == ("duplicate", 1)
    assert "token" not in document
    assert run("feedback", "add", "id-0", "--down", "--id", name).exit_code == 1
    assert len(memory.records) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("id-0",),
        ("id-0", "--up", "--grade", "3"),
        ("--up",),
        ("id-0", "--rank", "a", "--rank", "b"),
        ("id-0", "--up", "--comparison", "c"),
        ("id-0", "--flag", "niceness"),
        ("id-0", "--flag", "hallucination=maybe"),
        ("id-0", "--up", "--rater-kind", "robot"),
    ],
)
def test_wrong_usage_of_add_ends_with_2(run, memory, arguments):
    result = run("feedback", "add", *arguments)
    assert result.exit_code == 2
    assert memory.requests == []


def test_a_refused_judgement_is_one_line(run, completion):
    result = run("feedback", "add", "id-0", "--grade", "9")
    assert result.exit_code == 1
    assert result.stderr == "heedful: event.rating.value: must be 1 to 7 (request req-1)\n"


def test_list_is_a_table(run, client, completion):
    first = client.rate(completion, False, ["[bold]wrong[/bold]"], rater_id="bob")
    client.correct(completion, "b\n" * 100)
    client.retract(first)
    result = run("feedback", "list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["seq", "id", "said", "about", "by", "version", "fate"]
    assert "down: [bold]wrong[/bold]" in lines[1]
    assert "bob" in lines[1]
    assert "retracted" in lines[1]
    assert "should be: b b b" in lines[2]
    assert "…" in lines[2]
    assert f"takes back {first.feedback_id}" in lines[3]


def test_rankings_are_short_in_the_table_and_whole_on_a_page(run, client):
    one, two, three = (client.generate("abc").completions[0] for _ in range(3))
    names = [item.completion_id for item in (one, two, three)]
    receipt = client.rank([three, two, one], [three, [one, two]], all_bad=True)
    short = [name[-8:] for name in names]
    expected = f"none is good: {short[2]} > {short[0]} = {short[1]}"
    assert expected in run("feedback", "list").stdout
    shown = run("feedback", "get", receipt.feedback_id).stdout
    assert f"none is good: {names[2]} > {names[0]} = {names[1]}" in shown


def test_list_filters_and_limits(run, client, memory, completion):
    client.rate(completion, tags=["x"])
    client.grade(completion, 3)
    client.grade(completion, 4)
    two = run("feedback", "list", "--limit", "2", "--json")
    assert [item["receipt"]["seq"] for item in json.loads(two.stdout)] == [1, 2]
    grades = json.loads(run("feedback", "list", "--kind", "rating", "--json").stdout)
    assert [item["event"]["judgement"]["value"] for item in grades] == [3, 4]
    assert grades[0]["event"]["kind"] == "rating"
    assert "the first 2" in run("feedback", "list", "-n", "2").stderr
    run(
        *("feedback", "list", "--completion", "id-0", "--comparison", "c", "--rater", "r"),
        *("--version", "v", "--tag", "x", "--current", "--limit", "0"),
    )
    request = memory.of(pb.ListFeedbackRequest)[-1]
    chosen = request.filter
    assert (chosen.completion_id, chosen.comparison_id, chosen.rater_id) == ("id-0", "c", "r")
    assert (chosen.policy_version, chosen.tag, chosen.current_only) == ("v", "x", True)
    assert request.page_size == 1000


def test_get_shows_the_fate(run, client, memory, completion):
    receipt = client.critique(completion, "rude\nand wrong", aspects=["tone"])
    fate = memory.records[receipt.feedback_id].fate
    fate.kind, fate.reason = pb.FATE_KIND_EXCLUDED, "rater cap"
    shown = run("feedback", "get", receipt.feedback_id, "--token", "token-0").stdout
    assert "said        critique (tone): rude\nand wrong\n" in shown
    assert "fate        excluded\nbecause     rater cap\n" in shown
    document = json.loads(run("feedback", "get", receipt.feedback_id, "--json").stdout)
    assert document["fate"]["reason"] == "rater cap"
    assert datetime.fromisoformat(document["receipt"]["server_time"]).year == 1970
    assert not {"completion_token", "comparison_token"} & document["event"].keys()


def test_retract(run, client, memory, completion):
    receipt = client.rate(completion)
    result = run("feedback", "retract", receipt.feedback_id, "--token", "token-0", "--json")
    assert json.loads(result.stdout)["status"] == "stored"
    assert not memory.records[receipt.feedback_id].current
    missing = run("feedback", "retract", "nobody's")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "unknown feedback" in missing.stderr


def test_summary(run, client, completion):
    assert "none yet" in run("feedback", "summary").stdout
    client.rate(completion)
    client.rate(completion, False, ["wrong"])
    shown = run("feedback", "summary").stdout
    assert "judgements  2 thumb" in shown
    assert "25% to 75%" in shown
    assert "agreement   50% of 2 pairs" in shown
    assert "bad prompt" in shown
    document = json.loads(run("feedback", "summary", "--json").stdout)
    assert document["top_reasons"] == [{"reason": "wrong", "count": 1}]


def test_feedback_works_while_the_engine_loads(run, server, memory, completion):
    server.set_ready(False)
    assert run("feedback", "add", "id-0", "--up").exit_code == 0


def test_commands_wait_for_the_feedback_service(run, server, completion):
    server.set_ready(False, "Feedback")
    result = run("feedback", "add", "id-0", "--up", "--wait", "0.3")
    assert result.exit_code == 3
    assert "not ready" in result.stderr


def test_export_to_standard_output_is_one_document_a_line(run, client, completion):
    client.rate(completion)
    client.grade(completion, 4)
    result = run("feedback", "export", "--completions", "--after-seq", "1")
    (line,) = result.stdout.splitlines()
    document = json.loads(line)
    assert document["event"]["judgement"] == {"value": 4}
    assert document["completions"][0]["prompt_text"] == "hello"
    assert "token-0" not in line


def test_export_to_a_file_is_all_or_nothing(run, client, memory, completion, tmp_path):
    for value in (1, 2, 3):
        client.grade(completion, value)
    target = tmp_path / "log.jsonl"
    target.write_text("before")
    memory.fail_export_after = 2
    failed = run("feedback", "export", "--output", str(target))
    assert failed.exit_code == 3
    assert target.read_text() == "before"
    memory.fail_export_after = None
    done = run("feedback", "export", "--output", str(target))
    assert (done.exit_code, done.stdout) == (0, "")
    assert "3 judgements in" in done.stderr
    documents = [json.loads(line) for line in target.read_text().splitlines()]
    values = [document["event"]["judgement"]["value"] for document in documents]
    assert values == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_export_to_where_nothing_can_be_written_is_one_line(run, client, completion, tmp_path):
    client.rate(completion)
    result = run("feedback", "export", "--output", str(tmp_path / "no" / "log.jsonl"))
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_import_twice_stores_once(run, memory, data_file):
    file = data_file(BRED, {**BRED, "chosen": "c"})
    first = run("feedback", "import", file)
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout == "2 records of pairs stored, 0 there before, 0 bad lines\n"
    again = run("feedback", "import", file, "--json")
    document = json.loads(again.stdout)
    assert (document["stored"], document["duplicate"], document["format"]) == (0, 2, "pairs")
    assert len(memory.imported) == 2
    assert {request.source for request in memory.of(pb.ImportFeedbackRequest)} == {"data.jsonl"}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (BRED, "ranking"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "ranking"),
        ({"prompt": "p", "response": "a", "label": True}, "thumb"),
        ({"instruction": "p", "input": "i", "output": "a"}, "demonstration"),
    ],
)
def test_import_of_every_shape(run, memory, data_file, record, kind):
    assert run("feedback", "import", data_file(record)).exit_code == 0
    (item,) = memory.imported.values()
    assert item.WhichOneof("judgement") == kind


def test_import_reads_packed_files(run, memory, tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(BRED).encode()))
    assert run("feedback", "import", str(path), "--source", "mine").exit_code == 0
    assert memory.of(pb.ImportFeedbackRequest)[0].source == "mine"


def test_an_import_in_a_terminal_shows_its_progress(open_terminal, memory, data_file):
    file = data_file(*[BRED] * 450, name="{data} [x].jsonl")
    terminal = open_terminal("feedback", "import", file, TERM="xterm")
    terminal.expect("{data} [x].jsonl")
    terminal.expect("450 records of pairs stored")
    assert terminal.process.wait(10) == 0
    assert len(memory.of(pb.ImportFeedbackRequest)) == 3


def test_nothing_after_a_bad_line_is_sent(run, memory, data_file):
    file = data_file(BRED, BRED, "no json", BRED)
    result = run("feedback", "import", file)
    assert result.exit_code == 1
    assert "data.jsonl: line 3: is not JSON" in result.stderr
    assert len(memory.imported) == 2
    assert "2 records of pairs stored" in result.stdout


def test_bad_lines_can_be_left_out(run, memory, data_file):
    file = data_file(BRED, "no json", BRED, {"prompt": "p"}, BRED)
    result = run("feedback", "import", file, "--skip-bad")
    assert result.exit_code == 0
    assert "line 2: is not JSON" in result.stderr
    assert "line 4: has no chosen" in result.stderr
    assert len(memory.imported) == 3
    assert "2 bad lines" in result.stdout


def test_a_record_that_the_server_refuses_is_a_bad_line(run, memory, data_file):
    file = data_file(BRED, {**BRED, "chosen": "REFUSE"}, BRED)
    result = run("feedback", "import", file)
    assert result.exit_code == 1
    assert "line 2: completions: is not wanted here" in result.stderr
    assert run("feedback", "import", file, "--skip-bad").exit_code == 0


def test_after_a_batch_with_a_refused_record_nothing_more_is_sent(run, memory, data_file):
    lines = [{**BRED, "chosen": "REFUSE"}, *([BRED] * 300)]
    assert run("feedback", "import", data_file(*lines)).exit_code == 1
    assert len(memory.of(pb.ImportFeedbackRequest)) == 1
    assert len(memory.imported) == 199


def test_a_file_with_nothing_but_bad_lines_shows_the_first_of_them(run, data_file):
    result = run("feedback", "import", data_file(*["x"] * 30), "--skip-bad")
    assert "line 20:" in result.stderr
    assert "line 21:" not in result.stderr
    assert "and 10 more bad lines" in result.stderr


def test_a_dry_run_needs_no_server(run, server, memory, data_file):
    server.stop()
    file = data_file(*({**BRED, "chosen": f"answer {i}"} for i in range(5)), "no json")
    result = run("feedback", "import", file, "--dry-run")
    assert result.exit_code == 1
    assert "5 records of pairs, 1 bad lines; nothing was sent" in result.stdout
    assert "answer 2" in result.stdout
    assert "answer 3" not in result.stdout
    assert run("feedback", "import", file, "--dry-run", "--skip-bad").exit_code == 0
    document = json.loads(run("feedback", "import", file, "--dry-run", "--json").stdout)
    assert (document["good"], len(document["first"])) == (5, 3)


def test_columns_and_format_can_be_given(run, memory, data_file):
    file = data_file({"ask": "p", "yes": "a", "no": "b"})
    options = ("--map", "ask=prompt", "--map", "yes=chosen", "--map", "no=rejected", "--text")
    assert run("feedback", "import", file, "--format", "pairs", *options).exit_code == 0
    (item,) = memory.imported.values()
    assert (item.prompt.text, list(item.completions)) == ("p", ["a", "b"])
    assert run("feedback", "import", file, "--map", "ask=answer?").exit_code == 2
    assert run("feedback", "import", "/no/such/file").exit_code == 2
    assert run("feedback", "import", file, "--format", "songs").exit_code == 2


def test_a_failed_batch_ends_the_import_with_one_line(run, script, refusal, data_file):
    script.refusals = [refusal(grpc.StatusCode.PERMISSION_DENIED, "needs the scope feedback:any")]
    result = run("feedback", "import", data_file(BRED))
    assert result.exit_code == 1
    assert "needs the scope feedback:any" in result.stderr


def test_a_question_is_answered_through_a_pipe(run, client, memory):
    client.compare("which one?")
    result = run("feedback", "next", stdin="b\n")
    assert result.exit_code == 0
    assert result.stdout == "user: which one?\n[a] which one? 0\n[b] which one? 1\n"
    assert "a is base · b is v1" in result.stderr
    groups = [list(group.completion_ids) for group in memory.events[0].ranking.groups]
    assert groups == [["cand-0-1"], ["cand-0-0"]]
    assert "no question is open" in run("feedback", "next").stderr


def test_questions_are_answered_until_one_is_skipped(run, client, memory):
    for number in range(4):
        client.compare(f"question {number}", k=3)
    result = run("feedback", "next", "--all", stdin="b=ca\nn\ns\na\n")
    assert result.exit_code == 0
    assert len(memory.events) == 2
    tied, none = (event.ranking for event in memory.events)
    groups = [list(group.completion_ids) for group in tied.groups]
    assert groups == [["cand-0-1", "cand-0-2"], ["cand-0-0"]]
    assert none.all_bad
    assert "question 2" in result.stdout
    assert "question 3" not in result.stdout


def test_a_question_as_json_is_only_shown(run, client, memory):
    client.compare("which one?")
    document = json.loads(run("feedback", "next", "--json", "--end-user", "ann").stdout)
    assert document["open_count"] == 1
    assert document["comparison"]["candidates"][1]["text"] == "which one? 1"
    assert memory.events == []
    assert memory.of(pb.NextQuestionRequest)[0].end_user == "ann"


def test_a_line_that_is_no_vote_ends_with_2(run, client, memory):
    client.compare("which one?")
    result = run("feedback", "next", stdin="the first\n")
    assert result.exit_code == 2
    assert "not a vote: the first" in result.stderr
    assert memory.events == []


def test_erasing_needs_a_yes(run, memory, client, completion):
    refused = run("erase", "--end-user", "ann")
    assert refused.exit_code == 2
    assert memory.of(pb.EraseUserRequest) == []
    client.rate(completion)
    done = run("erase", "--end-user", "ann", "--yes", "--every-project")
    assert "1 completions and 1 judgements erased" in done.stdout
    assert "v1" in done.stdout
    assert memory.of(pb.EraseUserRequest)[0].project == ""
    again = json.loads(run("erase", "--end-user", "ann", "-y", "--json").stdout)
    assert again == {"completions": 0, "feedback_events": 0, "tainted_versions": []}


def test_erasing_asks_for_the_id_in_a_terminal(open_terminal, memory, completion):
    terminal = open_terminal("erase", "--end-user", "ann")
    terminal.expect("cannot be undone")
    terminal.type("bob\n")
    terminal.expect("nothing was erased")
    assert terminal.process.wait(10) == 1
    terminal = open_terminal("erase", "--end-user", "ann")
    terminal.expect("Type the end user's id")
    terminal.type("ann\n")
    terminal.expect("1 completions")
    assert terminal.process.wait(10) == 0
