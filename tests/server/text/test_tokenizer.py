import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from heedful_server.errors import ModelUnusable
from heedful_server.text.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
TRICKY = [
    "What is the capital of France?",
    "  two leading spaces",
    "🙂👩‍👩‍👧 naïve 你好\n\t",
    "literal <|end|> inside",
]


@given(text=TEXT)
def test_byte_level_text_survives_encoding_and_decoding(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text, False), False) == text


@given(text=TEXT)
def test_sentencepiece_text_survives_encoding_and_decoding(
    sentencepiece: Tokenizer, text: str
) -> None:
    assert sentencepiece.decode(sentencepiece.encode(text, False), False) == text


@pytest.mark.parametrize("text", ["the lazy dog", "a", ""])
def test_metaspace_text_survives_encoding_and_decoding(metaspace_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.load(metaspace_dir)
    assert tokenizer.decode(tokenizer.encode(text, False), False) == text


@given(ids=st.lists(st.integers(0, 450)), skip=st.booleans())
def test_byte_level_decoding_of_any_ids_is_that_of_the_tokenizers_library(
    byte_level_dir: Path, ids: list[int], skip: bool
) -> None:
    reference = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert Tokenizer.load(byte_level_dir).decode(ids, skip) == expected


@pytest.mark.parametrize("text", TRICKY)
def test_sentencepiece_decoding_is_that_of_the_tokenizers_library(
    sentencepiece_dir: Path, text: str
) -> None:
    reference = tokenizers.Tokenizer.from_file(str(sentencepiece_dir / "tokenizer.json"))
    ids = reference.encode(text).ids
    tokenizer = Tokenizer.load(sentencepiece_dir)
    assert tokenizer.encode(text, False) == ids
    assert tokenizer.decode(ids, True) == reference.decode(ids)


def test_control_tokens_in_a_text_become_their_ids_and_are_skipped_on_request(
    byte_level: Tokenizer,
) -> None:
    ids = byte_level.encode("a<|end|>b", False)
    assert ids[1] in byte_level.eos_token_ids
    assert byte_level.decode(ids, False) == "a<|end|>b"
    assert byte_level.decode(ids, True) == "ab"


def test_special_tokens_are_the_control_tokens_and_every_named_one(byte_level: Tokenizer) -> None:
    assert byte_level.special_token_ids == {0, 1, 2}
    assert byte_level.bos_token_id == 1
    assert byte_level.eos_token_ids == {2}


def test_the_generation_config_adds_ends_to_the_tokenizers_own(
    byte_level_dir: Path, tmp_path: Path
) -> None:
    model_dir = shutil.copytree(byte_level_dir, tmp_path / "model")
    (model_dir / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(model_dir).eos_token_ids == {2, 9}
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 8]}')
    assert Tokenizer.load(model_dir).eos_token_ids == {1, 2, 8}
    assert Tokenizer.load(model_dir).eos_token_id == 2
    (model_dir / "tokenizer_config.json").unlink()
    assert Tokenizer.load(model_dir).eos_token_ids == {1, 8}
    assert Tokenizer.load(model_dir).eos_token_id == 1


def test_a_token_that_is_part_of_a_character_has_no_text(byte_level: Tokenizer) -> None:
    (first, *_) = byte_level.encode("\U0002a6b2", False)
    assert byte_level.token_bytes(first) == b"\xf0"
    assert byte_level.token_text(first) == ""
    assert byte_level.token_text(2) == "<|end|>"


@pytest.mark.parametrize("token_id", [-1, 10_000, 2**31])
def test_ids_outside_the_vocabulary_stand_for_nothing(byte_level: Tokenizer, token_id: int) -> None:
    assert byte_level.token_text(token_id) == ""
    assert byte_level.decode([token_id], False) == ""


def test_vocab_size_covers_added_tokens(byte_level: Tokenizer) -> None:
    last = byte_level.encode("plain é added", False)
    assert last == [byte_level.vocab_size - 1]


def test_truncation_and_padding_in_the_file_are_ignored(
    byte_level_dir: Path, tmp_path: Path
) -> None:
    reference = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    reference.enable_truncation(4)
    reference.enable_padding(length=64)
    reference.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox " * 10
    ids = Tokenizer.load(tmp_path).encode(text, True)
    assert ids == Tokenizer.load(byte_level_dir).encode(text, True)


def test_a_lone_surrogate_is_refused(byte_level_dir: Path) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        Tokenizer.load(byte_level_dir).encode("\ud800", False)


def test_the_identity_follows_the_file(byte_level_dir: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(byte_level_dir, tmp_path / "model")
    identity = Tokenizer.load(model_dir).identity
    assert identity == Tokenizer.load(byte_level_dir).identity
    path = model_dir / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert Tokenizer.load(model_dir).identity != identity


def test_threads_share_a_tokenizer(byte_level: Tokenizer) -> None:
    texts = [f"{text} {number}" for number in range(50) for text in TRICKY]
    expected = [byte_level.encode(text, False) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: byte_level.encode(text, False), texts)) == expected


def test_vocab_files_make_a_byte_level_tokenizer_with_its_opening_token(
    vocab_files_dir: Path,
) -> None:
    tokenizer = Tokenizer.load(vocab_files_dir)
    hello = tokenizer.encode("hello world", False)
    assert [tokenizer.token_text(token_id) for token_id in hello[:2]] == ["hello", " w"]
    assert tokenizer.encode("hello world", True) == [2, *hello]
    assert tokenizer.encode("</s>", False) == [2]
    assert tokenizer.special_token_ids == {1, 2}
    assert tokenizer.decode(tokenizer.encode("x 🙂 y", True), True) == "x 🙂 y"


def test_broken_merges_are_named(vocab_files_dir: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(vocab_files_dir, tmp_path / "model")
    (model_dir / "merges.txt").write_text("#version: 0.2\nh e\nbroken\n")
    with pytest.raises(ModelUnusable, match=r"merges\.txt: line 3"):
        Tokenizer.load(model_dir)


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelUnusable, match=r"tokenizer\.model without tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_other_decoders_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelUnusable, match="decoder WordPiece is not supported"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": {"type": "Nonsense"}}'])
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelUnusable, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{", "\xff"])
def test_a_broken_configuration_is_named(
    byte_level_dir: Path, tmp_path: Path, content: str
) -> None:
    model_dir = shutil.copytree(byte_level_dir, tmp_path / "model")
    (model_dir / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelUnusable, match=r"generation_config\.json"):
        Tokenizer.load(model_dir)


def test_the_text_packages_import_neither_torch_nor_transformers() -> None:
    names = ["tokenizer", "template", "detokenizer", "gguf_files"]
    imports = ", ".join(f"heedful_server.text.{name}" for name in names)
    code = f"import sys, {imports}, heedful_server.catalogue; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(result.stdout.decode().split())
    assert not loaded & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_named_special_tokens_may_be_objects_or_strings(byte_level_dir: Path) -> None:
    named = json.loads((byte_level_dir / "tokenizer_config.json").read_text())
    assert isinstance(named["bos_token"], str)
    assert isinstance(named["eos_token"], dict)
    tokenizer = Tokenizer.load(byte_level_dir)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}
