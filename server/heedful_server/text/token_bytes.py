"""What each token means in bytes, read off the `decoder` of a tokenizer.json.

The text of a sequence is the UTF-8 decoding of its tokens' bytes laid end to end. Stating it so,
token by token, is what makes streaming exact: no token's bytes depend on its neighbours. Two
families exist: byte-level BPE (GPT-2, OPT, Pythia, Llama 3, Qwen, SmolLM) writes each byte as one
printable character; SentencePiece-like vocabularies (Llama 2, Mistral) write a space as a marker
and rare bytes as `<0xNN>`. Other decoders are refused by name. Pure functions; used by both
processes.
"""

from dataclasses import dataclass
from typing import Any

from heedful_server.errors import ModelUnusable

_SPACE_MARKER = "\u2581"


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """How a vocabulary writes bytes.

    Attributes:
        byte_of_char: byte-level alphabet, None for SentencePiece-like vocabularies.
        space_marker: character that stands for a space; unused in byte-level vocabularies.
        byte_fallback: tokens such as `<0x0A>` stand for one byte.
        leading_space: the tokenizer puts a space before a text, which decoding takes off again.
    """

    byte_of_char: dict[str, int] | None
    space_marker: str = _SPACE_MARKER
    byte_fallback: bool = False
    leading_space: bool = False


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable characters to the 256 bytes.

    Bytes that print as themselves in Latin-1 do so; the others follow from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


def spelling_of(decoder: dict[str, Any] | None) -> TokenSpelling:
    """Return the spelling that the `decoder` of a tokenizer.json undoes.

    Raises:
        ModelUnusable: the decoder is of another kind.
    """
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return TokenSpelling(byte_level_alphabet())
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always")
        marker = str(steps[0].get("replacement", _SPACE_MARKER))
        return TokenSpelling(None, marker, leading_space=scheme != "never")
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return _sentencepiece(steps)
    named = " + ".join(str(kind) for kind in kinds) or "none"
    raise ModelUnusable(
        f"tokenizer.json: decoder {named} is not supported (byte-level and SentencePiece-like are)"
    )


def bytes_of(token: str, spelling: TokenSpelling) -> bytes:
    """Return the bytes that a vocabulary entry stands for."""
    if spelling.byte_of_char is not None:
        # An added token may hold characters outside the alphabet; it then stands for itself.
        spelled = [spelling.byte_of_char.get(char) for char in token]
        known = [byte for byte in spelled if byte is not None]
        return bytes(known) if len(known) == len(token) else token.encode()
    if spelling.byte_fallback and (byte := _fallback_byte(token)) is not None:
        return bytes([byte])
    return token.replace(spelling.space_marker, " ").encode()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", []) for step in _steps(inner)]


def _sentencepiece(steps: list[dict[str, Any]]) -> TokenSpelling:
    marker = steps[0].get("pattern", {}).get("String")
    strip = steps[3] if len(steps) == 4 else None
    plain = isinstance(marker, str) and steps[0].get("content") == " "
    one_space = strip is None or (strip.get("content"), strip.get("start"), strip.get("stop")) == (
        " ",
        1,
        0,
    )
    if not plain or not one_space:
        raise ModelUnusable("tokenizer.json: the decoder replaces or strips more than spaces")
    return TokenSpelling(None, str(marker), byte_fallback=True, leading_space=strip is not None)


def _fallback_byte(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
