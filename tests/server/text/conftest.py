"""Tiny tokenizers of the two families, as model directories."""

import json
from pathlib import Path

import pytest
import tokenizers
from heedful_server.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "User: what is the capital of France?\nAssistant: Paris.",
    "  indented code:\n\treturn x + 1\n",
    "naïve café — 你好 🙂🙂 👩‍👩‍👧",
]
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content))


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byte-level")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain é added", special=False, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    write(directory, "tokenizer_config.json", named)
    return directory


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    content["model"]["byte_fallback"] = True
    write(directory, "tokenizer.json", content)
    write(directory, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return directory


@pytest.fixture(scope="session")
def metaspace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metaspace")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    write(directory, "tokenizer_config.json", {"eos_token": "</s>"})
    return directory


@pytest.fixture(scope="session")
def vocab_files_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in the style of OPT: vocab.json and merges.txt, texts open with </s>."""
    directory = tmp_path_factory.mktemp("vocab-files")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens += [merge.replace(" ", "") for merge in merges]
    write(directory, "vocab.json", {token: rank for rank, token in enumerate(tokens)})
    (directory / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
    )
    content = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    write(directory, "tokenizer_config.json", content | {"pad_token": "<pad>"})
    return directory


@pytest.fixture(scope="session")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_dir)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_dir: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_dir)
