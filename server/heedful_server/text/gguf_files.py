"""Writes the files that a Hugging Face model directory has, from what a GGUF file says.

Owns the translation of llama.cpp's metadata: configuration, tokenizer, chat template, generation
defaults. It does not touch the weights, which stay in the GGUF file. Architectures and vocabularies
that are not handled here are refused by name. Runs wherever a model is pulled.
"""

import json
from pathlib import Path
from typing import Any

from heedful_server.errors import ModelUnusable
from heedful_server.text.bpe_files import PreTokenizer, added_token, byte_level_tokenizer_json
from heedful_server.text.gguf_header import GgufHeader

_CONTROL = 3
_USER_DEFINED = 4

_PRE_TOKENIZERS: dict[str, PreTokenizer] = {"smollm": "smollm", "gpt-2": "gpt-2"}


def write_model_files(header: GgufHeader, model_dir: Path) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and the chat template.

    Raises:
        ModelUnusable: the architecture or the tokenizer is not supported, or metadata is missing.
    """
    metadata = header.metadata
    try:
        config = _llama_config(header)
        tokenizer_json = _tokenizer_json(metadata)
        tokenizer_config = _tokenizer_config(metadata)
    except KeyError as error:
        raise ModelUnusable(f"GGUF: the metadata lacks {error.args[0]!r}") from error
    _write_json(model_dir / "config.json", config)
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(model_dir / "generation_config.json", ids)
    _write_json(model_dir / "tokenizer_config.json", tokenizer_config)
    (model_dir / "tokenizer.json").write_bytes(tokenizer_json)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (model_dir / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _llama_config(header: GgufHeader) -> dict[str, Any]:
    metadata = header.metadata
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ModelUnusable(f"GGUF: architecture {architecture!r} is not supported, only 'llama'")
    names = {tensor.name for tensor in header.tensors}
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ModelUnusable("GGUF: scaled rotary positions are not supported; use safetensors")
    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata.get("llama.vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: float) -> float:
    # GGUF stores float32; 9.999999747378752e-06 was written as 1e-5, which is what checkpoints say.
    return float(f"{value:.7g}")


def _tokenizer_json(metadata: dict[str, Any]) -> bytes:
    model = metadata["tokenizer.ggml.model"]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        supported = ", ".join(map(repr, _PRE_TOKENIZERS))
        raise ModelUnusable(
            f"GGUF: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported ('gpt2' with "
            f"{supported} is); use the model's safetensors repository"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
        raise ModelUnusable("GGUF: the vocabulary repeats tokens or does not type them all")
    added = [
        added_token(token_id, token, special=kind == _CONTROL)
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    merges = [_merge(pair) for pair in metadata["tokenizer.ggml.merges"]]
    bos = _named_token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token") else None
    return byte_level_tokenizer_json(vocab, merges, added, _PRE_TOKENIZERS[pre], bos)


def _merge(pair: str) -> tuple[str, str]:
    left, separator, right = pair.partition(" ")
    if not separator or not left or not right or " " in right:
        raise ModelUnusable(f"GGUF: the merge {pair!r} is no pair of tokens")
    return left, right


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    named = {
        "bos_token": _named_token(metadata, "bos"),
        "eos_token": _named_token(metadata, "eos"),
        "unk_token": _named_token(metadata, "unknown"),
        "pad_token": _named_token(metadata, "padding"),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        **named,
    }


def _named_token(metadata: dict[str, Any], name: str) -> str | None:
    token_id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise ModelUnusable(f"GGUF: {name} token {token_id} is outside the vocabulary")
    return tokens[token_id]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    known = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
