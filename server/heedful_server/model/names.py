"""Which tensors a Hugging Face checkpoint of each family holds, and what they are called here.

Owns the canonical names ("layers.3.q", "layers.3.q.bias", "embed", "head", …), the Hugging Face
names and shapes, and the splitting of tensors that fuse several weights. Canonical weights are
[out, in]. Knows no file formats. Pure functions, run while loading.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from heedful_server.model.spec import DecoderSpec

# rows: equal parts of the rows, in order of the names. conv1d: the same after a transpose (GPT-2).
# per_head: rows interleave the parts head by head (GPT-NeoX).
Fusion = Literal["rows", "conv1d", "per_head"]

_PREFIXES: Final[Mapping[str, str]] = {
    "gpt2": "transformer.",
    "opt": "model.",
    "gpt_neox": "gpt_neox.",
}
# Buffers that older checkpoints carry and that hold nothing learned.
_BUFFER_SUFFIXES: Final = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: its name, shape there, and the canonical weights inside."""

    hf_name: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    fusion: Fusion = "rows"


def stored_tensors(spec: DecoderSpec) -> Iterator[StoredTensor]:
    """Everything that a checkpoint must hold; all tensors of one layer come together."""
    prefix = base_prefix(spec)
    if spec.architecture == "gpt2":
        return _gpt2(spec, prefix)
    if spec.architecture == "opt":
        return _opt(spec, prefix + "decoder.")
    if spec.architecture == "gpt_neox":
        return _gpt_neox(spec, prefix)
    return _llama_like(spec, prefix)


def base_prefix(spec: DecoderSpec) -> str:
    """What names inside the base model start with; checkpoints of the bare base model lack it."""
    return _PREFIXES.get(spec.architecture, "model.")


def is_ignorable(hf_name: str, spec: DecoderSpec) -> bool:
    """Whether a checkpoint may hold this although the decoder has no use for it."""
    if hf_name.endswith(_BUFFER_SUFFIXES):
        return True
    return spec.tied_embeddings and hf_name in ("lm_head.weight", "embed_out.weight")


def split(stored: StoredTensor, tensor: Tensor, spec: DecoderSpec) -> list[tuple[str, Tensor]]:
    """The canonical weights inside a stored tensor, as views where possible."""
    if stored.fusion == "conv1d" and tensor.ndim == 2:
        tensor = tensor.t()
    if len(stored.names) == 1:
        return [(stored.names[0], tensor)]
    if stored.fusion == "per_head":
        heads = tensor.view(spec.num_heads, len(stored.names), spec.head_dim, *tensor.shape[1:])
        parts = [part.flatten(0, 1) for part in heads.unbind(1)]
    else:
        parts = list(tensor.chunk(len(stored.names), dim=0))
    return list(zip(stored.names, parts, strict=True))


def merge(stored: StoredTensor, parts: Sequence[Tensor], spec: DecoderSpec) -> Tensor:
    """The inverse of `split`: the stored tensor, contiguous."""
    if stored.fusion == "per_head":
        heads = [part.view(spec.num_heads, spec.head_dim, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)
    tensor = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return (tensor.t() if stored.fusion == "conv1d" and tensor.ndim == 2 else tensor).contiguous()


def _llama_like(spec: DecoderSpec, prefix: str) -> Iterator[StoredTensor]:
    hidden, ffn, q, kv = spec.hidden_size, spec.ffn_size, spec.q_size, spec.kv_size
    yield StoredTensor(f"{prefix}embed_tokens.weight", (spec.vocab_size, hidden), ("embed",))
    for i in range(spec.num_layers):
        there, here = f"{prefix}layers.{i}.", f"layers.{i}."
        yield StoredTensor(f"{there}input_layernorm.weight", (hidden,), (f"{here}attn_norm",))
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            stem = f"{there}self_attn.{name}_proj"
            yield from _linear(stem, here + name, rows, hidden, spec.qkv_bias)
        for name in ("q_norm", "k_norm") if spec.qk_norm else ():
            shape = (spec.head_dim,)
            yield StoredTensor(f"{there}self_attn.{name}.weight", shape, (here + name,))
        stem = f"{there}self_attn.o_proj"
        yield from _linear(stem, f"{here}o", hidden, q, spec.attention_out_bias)
        yield StoredTensor(
            f"{there}post_attention_layernorm.weight", (hidden,), (f"{here}mlp_norm",)
        )
        for name, rows, columns in (
            ("gate", ffn, hidden),
            ("up", ffn, hidden),
            ("down", hidden, ffn),
        ):
            stem = f"{there}mlp.{name}_proj"
            yield from _linear(stem, here + name, rows, columns, spec.mlp_bias)
    yield StoredTensor(f"{prefix}norm.weight", (hidden,), ("final_norm",))
    yield from _head("lm_head.weight", spec)


def _gpt2(spec: DecoderSpec, prefix: str) -> Iterator[StoredTensor]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    yield StoredTensor(f"{prefix}wte.weight", (spec.vocab_size, hidden), ("embed",))
    yield StoredTensor(f"{prefix}wpe.weight", (spec.position_rows, hidden), ("positions",))
    for i in range(spec.num_layers):
        there, here = f"{prefix}h.{i}.", f"layers.{i}."
        qkv = tuple(here + name for name in ("q", "k", "v"))
        yield from _layer_norm(f"{there}ln_1", f"{here}attn_norm", hidden)
        for stem, names, columns, rows in (
            ("attn.c_attn", qkv, hidden, 3 * hidden),
            ("attn.c_proj", (f"{here}o",), hidden, hidden),
            ("mlp.c_fc", (f"{here}up",), hidden, ffn),
            ("mlp.c_proj", (f"{here}down",), ffn, hidden),
        ):
            yield StoredTensor(f"{there}{stem}.weight", (columns, rows), names, "conv1d")
            yield StoredTensor(f"{there}{stem}.bias", (rows,), _biases(names))
        yield from _layer_norm(f"{there}ln_2", f"{here}mlp_norm", hidden)
    yield from _layer_norm(f"{prefix}ln_f", "final_norm", hidden)
    yield from _head("lm_head.weight", spec)


def _opt(spec: DecoderSpec, prefix: str) -> Iterator[StoredTensor]:
    hidden, ffn, embed = spec.hidden_size, spec.ffn_size, spec.embed_size
    yield StoredTensor(f"{prefix}embed_tokens.weight", (spec.vocab_size, embed), ("embed",))
    yield StoredTensor(
        f"{prefix}embed_positions.weight", (spec.position_rows, hidden), ("positions",)
    )
    if embed != hidden:
        yield StoredTensor(f"{prefix}project_in.weight", (hidden, embed), ("embed_in",))
        yield StoredTensor(f"{prefix}project_out.weight", (embed, hidden), ("embed_out",))
    for i in range(spec.num_layers):
        there, here = f"{prefix}layers.{i}.", f"layers.{i}."
        for name in ("q", "k", "v"):
            stem = f"{there}self_attn.{name}_proj"
            yield from _linear(stem, here + name, hidden, hidden, spec.qkv_bias)
        stem = f"{there}self_attn.out_proj"
        yield from _linear(stem, f"{here}o", hidden, hidden, spec.attention_out_bias)
        yield from _layer_norm(f"{there}self_attn_layer_norm", f"{here}attn_norm", hidden)
        yield from _linear(f"{there}fc1", f"{here}up", ffn, hidden, spec.mlp_bias)
        yield from _linear(f"{there}fc2", f"{here}down", hidden, ffn, spec.mlp_bias)
        yield from _layer_norm(f"{there}final_layer_norm", f"{here}mlp_norm", hidden)
    if spec.final_norm:
        yield from _layer_norm(f"{prefix}final_layer_norm", "final_norm", hidden)
    yield from _head("lm_head.weight", spec)


def _gpt_neox(spec: DecoderSpec, prefix: str) -> Iterator[StoredTensor]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    yield StoredTensor(f"{prefix}embed_in.weight", (spec.vocab_size, hidden), ("embed",))
    for i in range(spec.num_layers):
        there, here = f"{prefix}layers.{i}.", f"layers.{i}."
        qkv = tuple(here + name for name in ("q", "k", "v"))
        stem = f"{there}attention.query_key_value"
        yield from _layer_norm(f"{there}input_layernorm", f"{here}attn_norm", hidden)
        yield from _layer_norm(f"{there}post_attention_layernorm", f"{here}mlp_norm", hidden)
        yield StoredTensor(f"{stem}.weight", (3 * hidden, hidden), qkv, "per_head")
        if spec.qkv_bias:
            yield StoredTensor(f"{stem}.bias", (3 * hidden,), _biases(qkv), "per_head")
        stem = f"{there}attention.dense"
        yield from _linear(stem, f"{here}o", hidden, hidden, spec.attention_out_bias)
        yield from _linear(f"{there}mlp.dense_h_to_4h", f"{here}up", ffn, hidden, True)
        yield from _linear(f"{there}mlp.dense_4h_to_h", f"{here}down", hidden, ffn, True)
    yield from _layer_norm(f"{prefix}final_layer_norm", "final_norm", hidden)
    yield from _head("embed_out.weight", spec)


def _linear(
    there: str, here: str, rows: int, columns: int, has_bias: bool
) -> Iterator[StoredTensor]:
    yield StoredTensor(f"{there}.weight", (rows, columns), (here,))
    if has_bias:
        yield StoredTensor(f"{there}.bias", (rows,), (f"{here}.bias",))


def _layer_norm(there: str, here: str, size: int) -> Iterator[StoredTensor]:
    yield StoredTensor(f"{there}.weight", (size,), (here,))
    yield StoredTensor(f"{there}.bias", (size,), (f"{here}.bias",))


def _head(hf_name: str, spec: DecoderSpec) -> Iterator[StoredTensor]:
    if not spec.tied_embeddings:
        yield StoredTensor(hf_name, (spec.vocab_size, spec.embed_size), ("head",))


def _biases(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.bias" for name in names)
