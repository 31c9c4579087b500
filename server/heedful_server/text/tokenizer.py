"""Text to token ids and back.

Wraps `tokenizers.Tokenizer`, reads the special tokens beside it and owns the one definition of a
token's bytes that decoding and streaming share. It knows nothing of chat templates or models and
imports neither torch nor transformers. Used by the server process (encoding, in worker threads)
and by the engine child (decoding); safe to share between threads.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers

from heedful_server.errors import ModelUnusable
from heedful_server.text.bpe_files import tokenizer_json_from_vocab_files
from heedful_server.text.model_files import eos_token_ids, special_tokens
from heedful_server.text.token_bytes import bytes_of, spelling_of


class Tokenizer:
    """A model's tokenizer and its special tokens.

    Attributes:
        vocab_size: one more than the largest token id; the model's logits may have padding beyond
            it.
        eos_token_ids: ids that end a generation.
        eos_token_id: the one of them that closes a text written by people, None without one.
        bos_token_id: id that opens a text, None where the model has none.
        special_token_ids: ids that are no text: control tokens, and every named special token.
        identity: hex SHA-256 over tokenizer.json.
    """

    vocab_size: int
    eos_token_ids: frozenset[int]
    eos_token_id: int | None
    bos_token_id: int | None
    special_token_ids: frozenset[int]
    identity: str

    def __init__(
        self, tokenizer_json: bytes, named_special_tokens: dict[str, str], eos_ids: frozenset[int]
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
            decoder = json.loads(tokenizer_json).get("decoder")
        except Exception as error:  # tokenizers raises bare Exception for every defect
            raise ModelUnusable(f"tokenizer.json: not usable ({error})") from error
        # Files often carry the truncation of their training run; a server must see the whole
        # prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spelling = spelling_of(decoder)
        self._bytes_of_id: dict[int, bytes] = {}
        self._set_special_tokens(named_special_tokens, eos_ids)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.identity = hashlib.sha256(tokenizer_json).hexdigest()

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Load the tokenizer of a model directory: tokenizer.json, else vocab.json and merges.txt.

        Raises:
            ModelUnusable: the files are missing, broken or of a kind that is not supported.
        """
        try:
            tokenizer_json = (model_dir / "tokenizer.json").read_bytes()
        except FileNotFoundError:
            tokenizer_json = tokenizer_json_from_vocab_files(model_dir)
        except OSError as error:
            raise ModelUnusable(
                f"{model_dir / 'tokenizer.json'}: not readable ({error})"
            ) from error
        return cls(tokenizer_json, special_tokens(model_dir), eos_token_ids(model_dir))

    def _set_special_tokens(self, named: dict[str, str], eos_ids: frozenset[int]) -> None:
        ids = {name: self._tokenizer.token_to_id(token) for name, token in named.items()}
        self.bos_token_id = ids.get("bos_token")
        eos_id = ids.get("eos_token")
        self.eos_token_ids = eos_ids if eos_id is None else eos_ids | {eos_id}
        self.eos_token_id = min(eos_ids, default=None) if eos_id is None else eos_id
        added = self._tokenizer.get_added_tokens_decoder()
        control = {token_id for token_id, token in added.items() if token.special}
        present = {token_id for token_id in ids.values() if token_id is not None}
        self.special_token_ids = frozenset(control | present | self.eos_token_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; control tokens written out in it become their ids.

        Args:
            text: any text; the empty text gives no ids, or the model's opening token.
            add_special_tokens: put the model's own opening (and closing) tokens around it.

        Raises:
            ValueError: the text holds lone surrogates, which UTF-8 cannot express.
        """
        # Checked here because tokenizers reports a lone surrogate as a TypeError about the
        # argument.
        text.encode()
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids, taken as a text from its beginning.

        Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary stand for nothing. The
        space that a SentencePiece-like tokenizer puts before a text is taken off again.
        """
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(item) for item in token_ids if item not in skipped)
        text = data.decode(errors="replace")
        return text[1:] if self._spelling.leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, b"" for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        data = self._bytes_of_id.get(token_id)
        if data is None:
            token = self._tokenizer.id_to_token(token_id)
            data = b"" if token is None else bytes_of(token, self._spelling)
            self._bytes_of_id[token_id] = data
        return data

    def token_text(self, token_id: int) -> str:
        """Return one token's text, "" where its bytes are no text by themselves."""
        try:
            return self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return ""
