"""One conversation in the terminal: its turns, its last answer, and what was said about answers.

Owns that state and its rules; knows neither commands nor the server.
"""

from dataclasses import dataclass, field

from heedful.feedback_types import Candidate, Receipt
from heedful.types import Completion, GenerateOptions, Message


@dataclass(frozen=True, slots=True)
class Said:
    """A judgement that `/undo` can take back; an edit with the turn it changed and its old text."""

    receipt: Receipt
    turn_idx: int | None = None
    replaced: str = ""


@dataclass
class Session:
    """One conversation: its turns, how answers are sampled, and what can be rated or undone."""

    options: GenerateOptions
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    last: Completion | Candidate | None = None
    said: list[Said] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Returns what the model is to read."""
        head = [] if self.system is None else [Message("system", self.system)]
        return [*head, *self.turns]

    def keep(self, turn: Message, answer: Completion | Candidate) -> None:
        """Adds a turn and its answer, which is now the one to rate."""
        self.turns += [turn, Message("assistant", answer.text)]
        self.last = answer

    def edit(self, receipt: Receipt, text: str) -> None:
        """Puts a recorded correction in the place of the last answer."""
        turn_idx = len(self.turns) - 1
        self.said.append(Said(receipt, turn_idx, self.turns[turn_idx].content))
        self.turns[turn_idx] = Message("assistant", text)

    def take_back(self) -> None:
        """Forgets the last judgement; an edited answer stands again as it was."""
        said = self.said.pop()
        if said.turn_idx is not None:
            self.turns[said.turn_idx] = Message("assistant", said.replaced)

    def forget(self) -> None:
        """Begins a new conversation."""
        self.turns.clear()
        self.said.clear()
        self.last = None
