"""Reads an adapter directory: low-rank updates of a base's linears, and a reward model's heads.

Owns the matching of PEFT's tensor names with the linears of each family, the splitting of modules
that fuse several (GPT-2's c_attn, GPT-NeoX's query_key_value), and the checks of shapes and values.
What comes out is the same for every family, in canonical names and in the row order of
`NamedWeight`; how it is computed with is the decoders' affair. Files are not compared with their
hashes here: the server has done so. Runs in the thread that loads adapters, or in a tool.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from heedful_server.model.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from heedful_server.model.errors import BadAdapter
from heedful_server.model.names import StoredTensor, split, stored_tensors
from heedful_server.model.spec import DecoderSpec
from heedful_server.protocol import AdapterRole

WEIGHTS_FILE: Final = "adapter_model.safetensors"
HEADS_FILE: Final = "reward_heads.safetensors"

_PREFIX: Final = "base_model.model."
_LINEAR: Final = re.compile(r"layers\.(\d+)\.(q|k|v|o|gate|up|down)")
_FLOATS: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_HEADS: Final = 64


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one linear: scale * B A, with A [rank, K] and B [N, rank]."""

    a_RK: Tensor
    b_NR: Tensor


@dataclass(frozen=True, slots=True)
class RewardHeads:
    """Scalar heads on final hidden states: reward_J = weight_JH h_H + bias_J of each token, fp32.

    An answer's reward is the mean over its tokens.
    """

    weight_JH: Tensor
    bias_J: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter, checked against its base; layers[i] maps "q", "k", … to what is adapted there."""

    rank: int
    scale: float
    layers: tuple[Mapping[str, LowRank], ...]
    heads: RewardHeads | None = None


@dataclass(frozen=True, slots=True)
class _Module:
    """A linear as PEFT sees it: the module's path and the base tensor that it holds."""

    path: str
    stored: StoredTensor
    layer: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs, whichever way round the module holds its weight."""
        rows, columns = self.stored.shape
        return (rows, columns) if self.stored.fusion == "conv1d" else (columns, rows)


def read_adapter(
    directory: Path, spec: DecoderSpec, role: AdapterRole, max_rank: int
) -> AdapterWeights:
    """Read a policy's or a reward model's adapter for a base.

    Raises:
        BadAdapter: a file is missing or damaged, says what is not served, has a rank above the
            limit, does not fit the base, or holds values that are not finite.
    """
    config = read_adapter_config(directory)
    if config.rank > max_rank:
        raise BadAdapter(
            f"{CONFIG_FILE}: r is {config.rank}; this server takes ranks up to {max_rank}"
        )
    modules = {module.path: module for module in _modules(spec)}
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    adapted = _adapted_modules(config, modules, tensors, spec)
    layers: list[dict[str, LowRank]] = [{} for _ in range(spec.num_layers)]
    for module in adapted:
        layers[module.layer] |= _low_rank(module, tensors, config.rank, spec)
    heads = _read_heads(directory / HEADS_FILE, spec.embed_size) if role == "reward" else None
    return AdapterWeights(config.rank, config.scale, tuple(layers), heads)


def _modules(spec: DecoderSpec) -> Iterator[_Module]:
    for stored in stored_tensors(spec):
        match = _LINEAR.fullmatch(stored.names[0])
        if match is not None:
            yield _Module(stored.hf_name.removesuffix(".weight"), stored, int(match[1]))


def _adapted_modules(
    config: AdapterConfig,
    modules: Mapping[str, _Module],
    tensors: Mapping[str, Tensor],
    spec: DecoderSpec,
) -> list[_Module]:
    """The modules that the configuration names, which must be those that have tensors."""
    wanted = _wanted_paths(config, modules, spec)
    found = set()
    for name in tensors:
        path = name.removeprefix(_PREFIX)
        for end in (".lora_A.weight", ".lora_B.weight"):
            path = path.removesuffix(end)
        if not name.startswith(_PREFIX) or path == name.removeprefix(_PREFIX):
            raise BadAdapter(f"{WEIGHTS_FILE}: tensor {name} is not served")
        if path not in modules:
            raise BadAdapter(f"{WEIGHTS_FILE}: tensor {name}: the base has no such linear")
        found.add(path)
    if not found:
        raise BadAdapter(f"{WEIGHTS_FILE}: there are no tensors")
    if wanted is not None and found != wanted:
        path = min(found ^ wanted)
        problem = "is missing" if path in wanted else f"is no target of {CONFIG_FILE}"
        raise BadAdapter(f"{WEIGHTS_FILE}: module {path} {problem}")
    return [modules[path] for path in sorted(found)]


def _wanted_paths(
    config: AdapterConfig, modules: Mapping[str, _Module], spec: DecoderSpec
) -> set[str] | None:
    if config.layers is not None and max(config.layers, default=0) >= spec.num_layers:
        raise BadAdapter(
            f"{CONFIG_FILE}: layers_to_transform names layer {max(config.layers)}; "
            f"the base has {spec.num_layers}"
        )
    if config.targets is None:
        return None
    wanted: set[str] = set()
    for target in sorted(config.targets):
        matches = {path for path in modules if path == target or path.endswith(f".{target}")}
        if not matches:
            raise BadAdapter(f"{CONFIG_FILE}: target_modules: the base has no linear {target!r}")
        wanted |= matches
    if config.layers is None:
        return wanted
    return {path for path in wanted if modules[path].layer in config.layers}


def _low_rank(
    module: _Module, tensors: Mapping[str, Tensor], rank: int, spec: DecoderSpec
) -> dict[str, LowRank]:
    num_inputs, num_outputs = module.sizes
    a_RK = _checked(module, "lora_A", tensors, (rank, num_inputs))
    b_NR = _checked(module, "lora_B", tensors, (num_outputs, rank))
    # PEFT's B has one row per output even where the base weight is stored transposed.
    stored = module.stored
    fusion = "rows" if stored.fusion == "conv1d" else stored.fusion
    parts = split(replace(stored, fusion=fusion), b_NR, spec)
    return {name.rpartition(".")[2]: LowRank(a_RK, part) for name, part in parts}


def _checked(
    module: _Module, kind: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> Tensor:
    name = f"{_PREFIX}{module.path}.{kind}.weight"
    if name not in tensors:
        raise BadAdapter(f"{WEIGHTS_FILE}: tensor {name} is missing")
    return _check_values(WEIGHTS_FILE, name, tensors[name], shape)


def _check_values(file: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        found = tuple(tensor.shape)
        raise BadAdapter(f"{file}: tensor {name} has shape {found}, expected {shape}")
    if tensor.dtype not in _FLOATS:
        raise BadAdapter(f"{file}: tensor {name} holds {tensor.dtype}, not floats")
    # In the dtype in which updates are computed: a value may be finite in the file only.
    if not torch.isfinite(tensor.float()).all():
        raise BadAdapter(f"{file}: tensor {name} holds values that are not finite")
    return tensor


def _read_heads(path: Path, hidden_size: int) -> RewardHeads:
    tensors = _read_tensors(path)
    if _metadata(path).get("reads") != "mean":
        raise BadAdapter(f"{path.name}: not made for the mean over tokens; train it again")
    for name in ("weight", "bias"):
        if name not in tensors:
            raise BadAdapter(f"{path.name}: tensor {name} is missing")
    weight_JH, bias_J = tensors["weight"], tensors["bias"]
    num_heads = weight_JH.shape[0] if weight_JH.ndim == 2 else 0
    if not 1 <= num_heads <= _MAX_HEADS:
        raise BadAdapter(f"{path.name}: tensor weight has shape {tuple(weight_JH.shape)}")
    _check_values(path.name, "weight", weight_JH, (num_heads, hidden_size))
    _check_values(path.name, "bias", bias_J, (num_heads,))
    return RewardHeads(weight_JH.float(), bias_J.float())


def _metadata(path: Path) -> Mapping[str, str]:
    with safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, copied out of it, so that it may change or go afterwards."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path.name}: {error}") from error
