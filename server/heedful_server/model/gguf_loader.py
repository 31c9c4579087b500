"""Reads the weights of GGUF files of Llama-like models, keeping Q4_1 and Q8_0 blocks as they are.

Owns GGUF's names, the undoing of its query and key row order, and the choice of what stays packed:
Q4_0 becomes Q4_1 without loss, every other quantized type that the gguf package can expand becomes
float. Knows nothing of kernels. Runs while loading.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog
import torch
from torch import Tensor

from heedful_server.model import gguf_file
from heedful_server.model.blocks import (
    GROUP,
    Q4_0_BYTES,
    BlockKind,
    block_row_bytes,
    q4_1_from_q4_0,
)
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.gguf_file import GgufFile, GgufTensor, read_gguf
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight, WeightKind

log = structlog.get_logger(__name__)

_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
# Whether the file's query and key rows are ordered for rotating neighbours instead of halves.
_ARCHITECTURES: Final[Mapping[str, bool]] = {"llama": True, "qwen2": False, "qwen3": False}
_FLOATS: Final[Mapping[int, torch.dtype]] = {
    gguf_file.F32: torch.float32,
    gguf_file.F16: torch.float16,
    gguf_file.BF16: torch.bfloat16,
}
_PACKED: Final[Mapping[int, BlockKind]] = {
    gguf_file.Q4_0: "q4_1",
    gguf_file.Q4_1: "q4_1",
    gguf_file.Q8_0: "q8_0",
}
_ROPE_FACTORS: Final = "rope_freqs.weight"


def iterate_gguf(path: Path, spec: DecoderSpec) -> Iterator[NamedWeight]:
    """Yield the weights of a GGUF file; errors as `weights.iterate_weights`."""
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        served = ", ".join(_ARCHITECTURES)
        raise UnsupportedModel(
            "general.architecture", f"{architecture!r} is not read; {served} are"
        )
    wanted = list(_wanted(spec))
    _check(path, spec, wanted, file)
    for name, gguf_name, shape in wanted:
        kind, data = _convert(path, gguf_name, file.tensors[gguf_name])
        if _ARCHITECTURES[architecture] and name.split(".")[2:3] in (["q"], ["k"]):
            data = _to_half_split(data, spec.head_dim)
        yield NamedWeight(name, kind, data, shape)


def _wanted(spec: DecoderSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Canonical name, GGUF name and shape of every tensor, layer by layer."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (spec.q_size, hidden),
        "k": (spec.kv_size, hidden),
        "v": (spec.kv_size, hidden),
        "o": (hidden, spec.q_size),
        "mlp_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    biased = [
        *(("q", "k", "v") if spec.qkv_bias else ()),
        *(("o",) if spec.attention_out_bias else ()),
        *(("gate", "up", "down") if spec.mlp_bias else ()),
    ]
    yield "embed", "token_embd.weight", (spec.vocab_size, hidden)
    for i in range(spec.num_layers):
        here, there = f"layers.{i}.", f"blk.{i}."
        for name, shape in shapes.items():
            yield here + name, there + _LAYER_NAMES[name], shape
        for name in biased:
            gguf_name = _LAYER_NAMES[name].replace(".weight", ".bias")
            yield f"{here}{name}.bias", there + gguf_name, shapes[name][:1]
        for name in ("q_norm", "k_norm") if spec.qk_norm else ():
            yield here + name, f"{there}attn_{name}.weight", (spec.head_dim,)
    yield "final_norm", "output_norm.weight", (hidden,)
    if not spec.tied_embeddings:
        yield "head", "output.weight", (spec.vocab_size, hidden)


def _check(
    path: Path,
    spec: DecoderSpec,
    wanted: list[tuple[str, str, tuple[int, ...]]],
    file: GgufFile,
) -> None:
    found = file.tensors
    for _, gguf_name, shape in wanted:
        if gguf_name not in found:
            raise BadCheckpoint(f"{path}: tensor {gguf_name} is missing")
        stored = found[gguf_name].shape
        if stored != shape:
            raise BadCheckpoint(f"{path}: tensor {gguf_name} has shape {stored}, expected {shape}")
    unexpected = found.keys() - {gguf_name for _, gguf_name, _ in wanted}
    if spec.rope is not None and spec.rope.scaling is not None:
        # The factors repeat what the configuration's rope scaling says.
        unexpected -= {_ROPE_FACTORS}
    if unexpected:
        raise BadCheckpoint(f"{path}: unexpected tensor {min(unexpected)}")


def _convert(path: Path, name: str, tensor: GgufTensor) -> tuple[WeightKind, Tensor]:
    try:
        return _as_stored(name, tensor)
    except ValueError as error:
        raise BadCheckpoint(f"{path}: tensor {name}: {error}") from error


def _as_stored(name: str, tensor: GgufTensor) -> tuple[WeightKind, Tensor]:
    floats = _FLOATS.get(tensor.type_code)
    if floats is not None:
        num_bytes = math.prod(tensor.shape) * floats.itemsize
        return "dense", tensor.take(num_bytes).view(floats).view(tensor.shape)
    packed = _PACKED.get(tensor.type_code)
    if packed is None:
        return "dense", _expand(name, tensor)
    if len(tensor.shape) != 2 or tensor.shape[1] % GROUP:
        raise ValueError(f"shape {tensor.shape} does not divide into blocks")
    rows, columns = tensor.shape
    if tensor.type_code == gguf_file.Q4_0:
        blocks = tensor.take(rows * columns // GROUP * Q4_0_BYTES).view(rows, -1)
        return packed, q4_1_from_q4_0(blocks)
    row_bytes = block_row_bytes(packed, columns)
    return packed, tensor.take(rows * row_bytes).view(rows, row_bytes)


def _expand(name: str, tensor: GgufTensor) -> Tensor:
    """Float weights of the rarer quantized types."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(tensor.type_code)
        group, group_bytes = GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % group:
            raise ValueError(f"shape {tensor.shape} does not divide into blocks of {group}")
        row_bytes = tensor.shape[-1] // group * group_bytes
        blocks = tensor.take(math.prod(tensor.shape[:-1]) * row_bytes).view(-1, row_bytes)
        expanded = torch.from_numpy(dequantize(blocks.numpy(), kind))
    except (NotImplementedError, KeyError) as error:
        raise UnsupportedModel(name, f"GGUF type {tensor.type_code} is not read") from error
    log.info("expanded a quantized tensor to float", tensor=name, type=kind.name)
    return expanded.view(tensor.shape)


def _to_half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Undo the conversion's row order: within a head, pairs (i, half) become (half, i)."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
