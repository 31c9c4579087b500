"""Tiny checkpoints of every family, and a harness that drives a decoder as the engine would."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heedful_kernels import cpu
from heedful_server.model.batch import ForwardBatch
from heedful_server.model.decoder import Decoder, TorchDecoder
from heedful_server.model.kv_cache import KVCache
from heedful_server.model.loader import load_decoder
from torch import Tensor

VOCAB_SIZE = 160
_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
} | _SIZES
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_NEOX = {"vocab_size": VOCAB_SIZE, "intermediate_size": 96, "max_position_embeddings": 128} | _SIZES
_OPT = {"vocab_size": VOCAB_SIZE, "ffn_dim": 96, "max_position_embeddings": 128} | _SIZES

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-gqa-tied-llama3-rope": (
        "Llama",
        _LLAMA
        | {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "llama-biases-linear-rope": (
        "Llama",
        _LLAMA
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": ("Mistral", _LLAMA | {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA | {"num_key_value_heads": 2}),
    "qwen3": (
        "Qwen3",
        _LLAMA | {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 128,
        },
    ),
    "opt-norm-before": ("OPT", _OPT),
    "opt-norm-after-projected": (
        "OPT",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "gpt-neox-parallel": ("GPTNeoX", _NEOX),
    "gpt-neox-sequential": ("GPTNeoX", _NEOX | {"use_parallel_residual": False}),
}


class Stepper:
    """Runs chunks of sequences through a decoder over scattered blocks, one call a step."""

    def __init__(self, decoder: Decoder, num_blocks: int = 64, block_size: int = 4) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.cache = decoder.allocate_kv_cache(num_blocks, block_size)
        # Whatever nobody wrote must not matter, so it is far from harmless.
        paged = isinstance(self.cache, KVCache)
        for data in [self.cache.data] if paged else _tensors(self.cache):
            data.fill_(300.0)
        generator = torch.Generator().manual_seed(7)
        self._free = torch.randperm(num_blocks, generator=generator).tolist()
        self.adapters: dict[str, int] = {}
        """Adapter slots of sequences that have one."""
        self.hidden: dict[str, Tensor] = {}
        """Final hidden states of the last rows of the latest step."""
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, chunks: dict[str, list[int]]) -> dict[str, Tensor]:
        """Append tokens to sequences; the logits of every appended position, by sequence."""
        token_ids, positions, slots, starts = [], [], [], [0]
        for name, tokens in chunks.items():
            table = self.tables.setdefault(name, [])
            start = self.lengths.get(name, 0)
            self.lengths[name] = start + len(tokens)
            while len(table) * self.block_size < self.lengths[name]:
                table.append(self._free.pop())
            for position in range(start, self.lengths[name]):
                block = table[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
                positions.append(position)
            token_ids += tokens
            starts.append(len(token_ids))
        tables = [torch.tensor(self.tables[name], dtype=torch.int32) for name in chunks]
        batch = ForwardBatch(
            token_ids_T=torch.tensor(token_ids),
            positions_T=torch.tensor(positions),
            slot_mapping_T=torch.tensor(slots),
            block_tables_SN=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            query_starts=tuple(starts),
            context_lens=tuple(self.lengths[name] for name in chunks),
            logit_rows_R=torch.arange(len(token_ids)),
            hidden_rows=tuple(end - 1 for end in starts[1:]),
            adapter_slots=tuple(self.adapters.get(name, -1) for name in chunks)
            if self.adapters
            else None,
        )
        result = self.decoder.forward(batch, self.cache)
        logits = result.logits_RV.clone()
        self.hidden = dict(zip(chunks, result.hidden_QH.clone(), strict=True))
        return {
            name: logits[start:end]
            for name, start, end in zip(chunks, starts, starts[1:], strict=False)
        }

    def greedy(self, prompts: dict[str, list[int]], num_tokens: int) -> dict[str, list[int]]:
        """Continue all prompts together by the likeliest token."""
        answers: dict[str, list[int]] = {name: [] for name in prompts}
        chunks = dict(prompts)
        for _ in range(num_tokens):
            logits = self.step(chunks)
            for name, rows in logits.items():
                answers[name].append(int(rows[-1].argmax()))
            chunks = {name: answer[-1:] for name, answer in answers.items()}
        return answers


def _tensors(caches: list[cpu.KVCache]) -> list[Tensor]:
    return [tensor for cache in caches for tensor in (cache.keys, cache.values)]


@pytest.fixture
def stepper() -> type[Stepper]:
    return Stepper


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random checkpoint of a family; every parameter is random, norms and biases too."""

    def save(family: str, max_shard_size: str = "5GB", **changes: object) -> Path:
        import transformers

        architecture, sizes = FAMILIES[family]
        config = getattr(transformers, f"{architecture}Config")(**(sizes | changes))
        torch.manual_seed(3)
        name = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
        model = getattr(transformers, name)(config)
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.15)
        model_dir = tmp_path_factory.mktemp(family)
        model.save_pretrained(model_dir, max_shard_size=max_shard_size)
        return model_dir

    return save


@pytest.fixture(scope="session", params=list(FAMILIES))
def family_dir(request: pytest.FixtureRequest, save_checkpoint: Callable[..., Path]) -> Path:
    return save_checkpoint(request.param)


@pytest.fixture(scope="session")
def llama_dir(save_checkpoint: Callable[..., Path]) -> Path:
    return save_checkpoint("llama-gqa-tied-llama3-rope")


@pytest.fixture(scope="session")
def load() -> Callable[..., TorchDecoder]:
    def load(model_dir: Path, quantize: str = "float32") -> TorchDecoder:
        return load_decoder(model_dir, quantize, "cpu", lambda stage, share: None)

    return load


@pytest.fixture(scope="session")
def reference_logits() -> Callable[[Path, list[int]], Tensor]:
    """What transformers computes for a directory, fp32 and eager attention, [tokens, vocab]."""

    def logits(model_dir: Path, token_ids: list[int]) -> Tensor:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.inference_mode():
            result: Tensor = model(torch.tensor([token_ids])).logits[0]
        return result

    return logits


@pytest.fixture(scope="session")
def random_ids() -> Callable[[int, int], list[int]]:
    def ids(count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()

    return ids
