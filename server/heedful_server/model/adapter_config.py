"""What PEFT's adapter_config.json says of an adapter, as far as it is served here.

Owns the reading of that file and every refusal that it can cause: a key that would change what the
adapter computes is either understood or refused by name, never ignored. Knows no tensors and no
model. Pure functions; they run in the thread that loads adapters, or in a tool.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from heedful_server.model.errors import BadAdapter

CONFIG_FILE: Final = "adapter_config.json"

_READ: Final = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform", "bias"}
)
# These say where an adapter comes from or how it is trained, not what it computes. A transposed
# base weight (fan_in_fan_out) changes how an adapter is merged, not how it is applied.
_HARMLESS: Final = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "rank_pattern",
        "revision",
        "runtime_config",
        "task_type",
        "ensure_weight_tying",
    }
)
# Ways to start that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, …) train against a
# base that they have changed.
_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of the file that matters.

    targets are the last parts of module names; None where the file holds a pattern, so that what
    the tensors say counts. layers is None when all are adapted.
    """

    rank: int
    scale: float
    targets: frozenset[str] | None
    layers: frozenset[int] | None


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read and check an adapter directory's file; BadAdapter names the key that is at fault."""
    config = _read_object(directory / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise _bad("peft_type", f"{config.get('peft_type')!r} is not served; LORA is")
    if config.get("bias", "none") != "none":
        raise _bad("bias", f"{config['bias']!r} is not served; none is")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise _bad(key, "is not served: all modules have one rank and one alpha")
    if config.get("init_lora_weights") not in _STARTS:
        raise _bad("init_lora_weights", f"{config['init_lora_weights']!r} changes the base")
    for key, value in config.items():
        # A key that is not known yet may switch anything on; empty ones switch it off.
        if key not in _READ and key not in _HARMLESS and value:
            raise _bad(key, f"{value!r} is not served")
    rank = _whole(config.get("r"), "r", least=1)
    return AdapterConfig(rank, _scale(config, rank), _targets(config), _layers(config))


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise BadAdapter(f"{path.name}: expected a JSON object")
    return content


def _scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _bad("lora_alpha", f"is {alpha!r}, not a finite number")
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise _bad("use_rslora", f"is {rslora!r}, not true or false")
    return float(alpha / math.sqrt(rank) if rslora else alpha / rank)


def _targets(config: Mapping[str, Any]) -> frozenset[str] | None:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return None
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise _bad("target_modules", f"is {targets!r}, not a list of names")
    return frozenset(targets)


def _layers(config: Mapping[str, Any]) -> frozenset[int] | None:
    layers = config.get("layers_to_transform")
    if layers is None:
        return None
    found = layers if isinstance(layers, list) else [layers]
    return frozenset(_whole(layer, "layers_to_transform", least=0) for layer in found)


def _whole(value: object, key: str, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _bad(key, f"is {value!r}, not a whole number from {least} on")
    return value


def _bad(key: str, reason: str) -> BadAdapter:
    return BadAdapter(f"{CONFIG_FILE}: {key} {reason}")
