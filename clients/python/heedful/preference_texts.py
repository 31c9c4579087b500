"""What lies in the columns of preference data: plain texts, chat messages and written dialogues.

Owns finding prompt and answer in them; knows neither files nor which column is which. A dialogue is
a text with turns marked "Human:" and "Assistant:" at the beginning of a line. Pure, any thread.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from heedful.types import Message, Prompt

Conversation: TypeAlias = str | tuple[Message, ...]
"""A str is one user message."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")
# An answer may well begin with the words of a short prompt.
_MIN_REPEATED_PROMPT = 32


class BadRecord(Exception):  # noqa: N818 - says what the record is, not what the program did
    """A record cannot be understood; its text says why."""


def conversation(value: object) -> Conversation:
    """Returns a prompt: messages or a dialogue as messages, any other text as it is.

    Raises:
        BadRecord: it is neither text nor messages, or ends with the assistant's words.
    """
    turns = _turns(value)
    if isinstance(turns, str):
        if is_blank(turns):
            raise BadRecord("the prompt is empty")
        return turns
    # A dialogue's prompt ends with the marker of the turn that is to come.
    if turns and turns[-1].role == "assistant" and is_blank(turns[-1].content):
        turns = turns[:-1]
    if not turns:
        raise BadRecord("the prompt is empty")
    if turns[-1].role == "assistant":
        raise BadRecord("the prompt ends with the assistant's words")
    return turns


def answer_text(value: object) -> str:
    """Returns the text of a completion: a str, or one message of the assistant.

    Raises:
        BadRecord: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        for name in ("content", "text", "response", "answer", "completion", "value"):
            if isinstance(value.get(name), str):
                return str(value[name])
    if isinstance(value, list) and len(value) == 1:
        return answer_text(value[0])
    raise BadRecord("a completion must be a text or one message of the assistant")


def split_answer(value: object) -> tuple[Conversation, str]:
    """Returns prompt and answer of a conversation that ends with the assistant's words.

    Raises:
        BadRecord: it does not, or there is nothing before them.
    """
    turns = _turns(value)
    if isinstance(turns, str) or not turns or turns[-1].role != "assistant":
        raise BadRecord("the conversation must end with the assistant's message")
    return conversation(list(turns[:-1])), turns[-1].content


def split_pair(prompt: object, chosen: object, rejected: object) -> tuple[Conversation, str, str]:
    """Returns the prompt and both answers; what both hold before their answers is the prompt.

    Raises:
        BadRecord: there is no prompt, or they differ before their answers.
    """
    first, second = _turns(chosen), _turns(rejected)
    if _is_dialogue(first) and _is_dialogue(second):
        return _split_dialogues(first, second)
    if prompt is None:
        raise BadRecord("has no prompt, and chosen and rejected are no conversations")
    answers = answer_text(chosen), answer_text(rejected)
    turns = conversation(prompt)
    if not isinstance(prompt, str):
        return turns, *answers
    if len(prompt) >= _MIN_REPEATED_PROMPT and all(text.startswith(prompt) for text in answers):
        answers = answers[0][len(prompt) :].strip(), answers[1][len(prompt) :].strip()
    if not isinstance(turns, str):
        # Where the prompt ends with a marker, answers begin with the space behind it.
        answers = answers[0].strip(), answers[1].strip()
    return turns, *answers


def with_prompt(prompt: Conversation, record: Mapping[str, Any]) -> Prompt:
    """Returns the prompt with the record's further input and system message.

    Raises:
        BadRecord: there is further input, but the prompt is a conversation.
    """
    more, system = record.get("input", ""), record.get("system", "")
    if more and not isinstance(prompt, str):
        raise BadRecord("has an input beside a conversation")
    if more:
        prompt = f"{prompt}\n\n{more}"
    if not system:
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if turns[0].role == "system":
        raise BadRecord("has two system messages")
    return (Message("system", str(system)), *turns)


def is_blank(text: str) -> bool:
    """Whether there is nothing to read."""
    return not text.strip()


def _is_dialogue(turns: Conversation) -> bool:
    return not isinstance(turns, str) and len(turns) > 1


def _split_dialogues(first: Conversation, second: Conversation) -> tuple[Conversation, str, str]:
    prompt, chosen = split_answer(list(first))
    other_prompt, rejected = split_answer(list(second))
    if prompt != other_prompt:
        raise BadRecord("chosen and rejected differ before their last answers")
    return prompt, chosen, rejected


def _turns(value: object) -> Conversation:
    if isinstance(value, str):
        return _dialogue(value)
    if not isinstance(value, Sequence):
        raise BadRecord(f"a conversation is a text or a list, not {type(value).__name__}")
    return tuple(_message(item) for item in value)


def _message(value: object) -> Message:
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise BadRecord("a message must be an object with role and content")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRecord(f"a message has an unknown role: {role!r}")
    if not isinstance(content, str):
        raise BadRecord("a message must have a text as its content")
    return Message(_ROLES[role.lower()], content)


def _dialogue(text: str) -> Conversation:
    marks = list(_TURN.finditer(text))
    # Only a text that begins with a turn is a dialogue; others may quote one.
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        return text
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(
        Message(_ROLES[mark[1].lower()], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    )
