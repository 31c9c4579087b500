"""Fixtures that every test folder may use: a tiny real model and a scrubbed environment."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interrupts_reach_the_programs() -> None:
    # Where a shell started the tests in the background SIGINT is ignored, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HEEDFUL_")]:
        if not name.startswith("HEEDFUL_TEST_"):
            monkeypatch.delenv(name)


def write_byte_tokenizer(model_dir: Path) -> int:
    """Write a byte-level tokenizer with ChatML specials; return its vocabulary size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: idx for idx, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model_dir = tmp_path_factory.mktemp("models") / "tiny-llama"
    model_dir.mkdir()
    num_tokens = write_byte_tokenizer(model_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=num_tokens - 3,
        eos_token_id=num_tokens - 1,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(model_dir)
    return model_dir


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The default model where it has been pulled; tests that use it carry the marker `model`."""
    home = Path(os.environ.get("HEEDFUL_TEST_HOME", Path.home() / ".heedful"))
    path = home / "models" / "SmolLM2-135M-Instruct"
    if not (path / "config.json").is_file():
        pytest.skip("the default model is not in the local cache (make model)")
    return path


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random adapter of a model as PEFT does; with heads it is a reward model's."""

    def save(model_dir: Path, *, seed: int = 0, heads: int = 0, **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
        adapted = get_peft_model(model, LoraConfig(**options))
        torch.manual_seed(100 + seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        directory = tmp_path_factory.mktemp(f"adapter-{seed}")
        adapted.save_pretrained(directory)
        if heads:
            width = model.get_output_embeddings().weight.shape[1]
            tensors = {"weight": torch.randn(heads, width), "bias": torch.randn(heads)}
            save_file(
                tensors | {"temperature": torch.tensor([2.0])},
                directory / "reward_heads.safetensors",
                {"reads": "mean"},
            )
        return directory

    return save
