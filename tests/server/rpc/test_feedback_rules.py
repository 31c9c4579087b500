"""The validator of feedback against messages made from the contract's descriptors."""

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_server.errors import InvalidRequest
from heedful_server.feedback.submission import Submission
from heedful_server.rpc.feedback_convert import wilson
from heedful_server.rpc.feedback_rules import FLAGS, submission
from heedful_store import LABEL_FLAGS, Ranking, Scope, uuid7
from heedful_store.feedback import prepare
from hypothesis import given, settings
from hypothesis import strategies as st

SCOPE = Scope("t", "p")
TEXTS = st.sampled_from(["", " ", "x", "x" * 65, "\0", "v1.a.b", "\u00e9" * 80]) | st.builds(uuid7)
NUMBERS = {
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 9),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 9),
    FieldDescriptor.TYPE_STRING: TEXTS,
}


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    message = kind()
    for field in draw(st.lists(st.sampled_from(list(kind.DESCRIPTOR.fields)), max_size=6)):
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = messages(field.message_type._concrete_class)
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(inner, max_size=3)))
            else:
                getattr(message, field.name).CopyFrom(draw(inner))
        elif field.is_repeated:
            values = draw(st.lists(NUMBERS[field.type], max_size=3))
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, draw(NUMBERS[field.type]))
    if "feedback_id" in kind.DESCRIPTOR.fields_by_name and draw(st.booleans()):
        message.feedback_id = uuid7()
    return message


@settings(max_examples=300, deadline=None)
@given(messages(pb.FeedbackEvent))
def test_any_message_is_storable_or_refused_by_a_field_of_its_own(message):
    outcome = validated(message)
    if isinstance(outcome, InvalidRequest):
        names = {*pb.FeedbackEvent.DESCRIPTOR.fields_by_name, "kind"}
        path = outcome.field.split(".")
        assert path[0] == "event"
        assert path[1].split("[")[0] in names
        return
    judgement = outcome.event.judgement
    # Only its comparison can say what "all bad" is about.
    if not (isinstance(judgement, Ranking) and not judgement.groups):
        prepare(outcome.event, hold_unknown=True)


def validated(message: pb.FeedbackEvent) -> Submission | InvalidRequest:
    try:
        return submission(message, "event.", SCOPE, "rpc", "")
    except InvalidRequest as refusal:
        return refusal


def test_every_flag_of_the_contract_has_its_name_in_the_log():
    assert set(FLAGS) == set(pb.Label.DESCRIPTOR.fields_by_name)
    assert set(FLAGS.values()) == set(LABEL_FLAGS)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_an_interval_lies_in_the_unit_interval_around_the_share(up, down):
    low, high = wilson(up, down)
    assert 0 <= low <= high <= 1
    if up + down:
        assert low - 1e-12 <= up / (up + down) <= high + 1e-12
