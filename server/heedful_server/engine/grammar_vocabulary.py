"""What a grammar knows of a tokenizer: bytes of tokens, and which of them keep a text valid UTF-8.

Owns the choice of tokens that a constrained completion may hold at all. It knows nothing of
grammars beyond xgrammar's description of a vocabulary. Used by the engine child and by the
constraint worker, which must agree on it.

xgrammar's character classes let some byte sequences through that only look like UTF-8 (surrogates,
overlong forms), and its JSON strings of limited length let control characters through. Both are
shut out here: tokens that hold such bytes stand for nothing, and where the next token would
complete such a sequence, TokenRules.after_lead says which tokens may come.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import torch
from torch import Tensor

from heedful_server.text.tokenizer import Tokenizer

# First bytes that allow only some second bytes; after the other first bytes, 0x80-0xBF may follow.
_SECOND_BYTES = {
    0xE0: range(0xA0, 0xC0),
    0xED: range(0x80, 0xA0),
    0xF0: range(0x90, 0xC0),
    0xF4: range(0x80, 0x90),
}
_ANY_BYTE = range(0x100)
_NEVER = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens that a grammar may use.

    Attributes:
        token_bytes: by token id; b"" for a token that a grammar may not use.
        vocab_size: the model's; ids beyond token_bytes are never allowed.
        stop_token_ids: ids that end a completion.
    """

    token_bytes: list[bytes]
    vocab_size: int
    stop_token_ids: list[int]


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Return the tokens of a tokenizer that are text, for a model with vocab_size logits."""
    special = tokenizer.special_token_ids
    num_tokens = min(vocab_size, tokenizer.vocab_size)
    token_bytes = [
        b"" if token_id in special else tokenizer.token_bytes(token_id)
        for token_id in range(num_tokens)
    ]
    return Vocabulary(
        [data if _may_be_utf8(data) else b"" for data in token_bytes],
        vocab_size,
        sorted(token_id for token_id in tokenizer.eos_token_ids if token_id < vocab_size),
    )


def without_controls(vocabulary: Vocabulary) -> Vocabulary:
    """Return the vocabulary of JSON texts: no control characters but line ends."""
    controls = bytes(byte for byte in range(0x20) if chr(byte) not in "\n\r")
    token_bytes = [
        b"" if data.translate(None, controls) != data else data for data in vocabulary.token_bytes
    ]
    return msgspec.structs.replace(vocabulary, token_bytes=token_bytes)


def tokenizer_info(vocabulary: Vocabulary) -> Any:
    """Return xgrammar's description of a vocabulary."""
    # Imported late: it takes seconds, and most engines never see a constraint.
    import xgrammar

    return xgrammar.TokenizerInfo(
        vocabulary.token_bytes,
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.vocab_size,
        stop_token_ids=vocabulary.stop_token_ids,
    )


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Masks that hold whatever the grammar is, int32 [ceil(V / 32)] as the sampler reads them.

    Attributes:
        known_W: every id below the vocabulary size.
        stop_W: the ids that end a completion.
        lead_of_token: for tokens that end in a byte of after_lead, that byte.
        after_lead: tokens that may follow such a byte.
    """

    known_W: Tensor
    stop_W: Tensor
    lead_of_token: dict[int, int]
    after_lead: dict[int, Tensor]


def token_rules(vocabulary: Vocabulary) -> TokenRules:
    """Return the rules of a vocabulary."""
    token_bytes, vocab_size = vocabulary.token_bytes, vocabulary.vocab_size
    return TokenRules(
        known_W=_mask(range(vocab_size), vocab_size),
        stop_W=_mask(vocabulary.stop_token_ids, vocab_size),
        lead_of_token={
            token_id: data[-1]
            for token_id, data in enumerate(token_bytes)
            if data and data[-1] in _SECOND_BYTES
        },
        after_lead={
            lead: _mask(
                [i for i, data in enumerate(token_bytes) if data and data[0] in second], vocab_size
            )
            for lead, second in _SECOND_BYTES.items()
        },
    )


def _may_be_utf8(data: bytes) -> bool:
    if not _NEVER.isdisjoint(data):
        return False
    return all(right in _SECOND_BYTES.get(left, _ANY_BYTE) for left, right in pairwise(data))


def _mask(token_ids: Any, vocab_size: int) -> Tensor:
    bits_W = torch.zeros(-(-vocab_size // 32), 32, dtype=torch.int64)
    bits_W.view(-1)[torch.tensor(list(token_ids), dtype=torch.int64)] = 1
    words_W = (bits_W << torch.arange(32)).sum(dim=-1)
    # Bit 31 is the sign of an int32 word.
    return torch.where(words_W >= 1 << 31, words_W - (1 << 32), words_W).to(torch.int32)
