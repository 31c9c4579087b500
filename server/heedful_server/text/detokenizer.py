"""Turns a completion's tokens into text as they arrive, and ends it at a stop string.

Owns the bytes of an unfinished character and the text that may yet turn into a stop string, for one
completion. Lives in the engine child's main thread; the texts of all deltas laid end to end do not
depend on how the text was cut into tokens.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from heedful_server.text.stop_strings import StopMatcher
from heedful_server.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """Text that is safe to send now, and the stop string that ended the completion, if one did."""

    text: str
    stop: str | None


class StreamDetokenizer:
    """The text state of one completion.

    The text continues the prompt: special tokens are left out, and a space that opens it is kept
    (where `Tokenizer.decode`, which decodes whole texts, takes off the one that SentencePiece puts
    there).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        """Start a completion.

        Args:
            tokenizer: gives each token's bytes.
            stop: strings that end the completion; empty ones are an error of the caller.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop) if stop else None

    def push(self, token_id: int, may_stop: bool = True) -> TextDelta:
        """Take the next token; after a delta with a stop, further tokens add nothing.

        Text of tokens that may not stop is sent at once and is no part of any stop string.
        """
        if token_id in self._tokenizer.special_token_ids:
            return TextDelta("", None)
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._matcher is None or not may_stop:
            return TextDelta(text, None)
        return TextDelta(*self._matcher.push(text))

    def finish(self) -> str:
        """Return what was held back; bytes of an unfinished character become U+FFFD."""
        tail = self._utf8.decode(b"", final=True)
        if self._matcher is None:
            return tail
        return self._matcher.push(tail)[0] + self._matcher.finish()
