"""Every adapter that cannot be served is refused by name, before anything of it is used."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_server.model.adapter import HEADS_FILE, WEIGHTS_FILE, read_adapter
from heedful_server.model.adapter_config import CONFIG_FILE
from heedful_server.model.errors import BadAdapter
from heedful_server.model.families import read_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(llama_dir: Path, save_adapter: Callable[..., Path]) -> Path:
    return save_adapter(llama_dir, heads=2)


def refuse(directory: Path, llama_dir: Path, match: str, role: str = "policy") -> None:
    with pytest.raises(BadAdapter, match=match):
        read_adapter(directory, read_spec(llama_dir), role, 16)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
        ({"an_invention_of_next_year": {"on": 1}}, "an_invention_of_next_year"),
        ({"r": 17}, "r is 17; this server takes ranks up to 16"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no linear 'lm_head'"),
        ({"layers_to_transform": [0, 2]}, "names layer 2; the base has 2"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is -1"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"layers_to_transform": [0]}, "is no target"),
    ],
    ids=str,
)
def test_configurations(changes: dict[str, Any], match: str, adapter: Path, llama_dir: Path):
    change_config(adapter, **changes)
    refuse(adapter, llama_dir, f"{CONFIG_FILE}: .*{match}" if match[-6:] != "target" else match)


def _set(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), f"tensor {Q0}.lora_B.weight is missing"),
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), f"tensor {Q0}.lora_A.weight is missing"),
        (
            lambda t: [t.pop(f"{Q0}.lora_{ab}.weight") for ab in "AB"],
            r"layers.0.self_attn.q_proj is missing",
        ),
        (_set("strange", torch.zeros(1)), "tensor strange is not served"),
        (_set(f"{Q0}.lora_magnitude_vector", torch.zeros(4)), "lora_magnitude_vector"),
        (_set(f"{Q0}.base_layer.weight", torch.zeros(4)), "base_layer"),
        (
            _set(f"{Q0.replace('.0.', '.2.')}.lora_A.weight", torch.zeros(4, 64)),
            "the base has no such linear",
        ),
        (
            _set(f"{Q0}.lora_A.weight", torch.zeros(4, 63)),
            r"lora_A.weight has shape \(4, 63\), expected \(4, 64\)",
        ),
        (_set(f"{Q0}.lora_B.weight", torch.zeros(64, 4)), r"expected \(128, 4\)"),
        (_set(f"{Q0}.lora_A.weight", torch.zeros(4, 64, dtype=torch.int8)), "not floats"),
        (_set(f"{Q0}.lora_A.weight", torch.full((4, 64), float("nan"))), "not finite"),
        (
            _set(f"{Q0}.lora_B.weight", torch.full((128, 4), 1e300, dtype=torch.float64)),
            "not finite",
        ),
        (lambda t: t.clear(), "there are no tensors"),
    ],
)
def test_tensors(change, match: str, adapter: Path, llama_dir: Path) -> None:
    change_tensors(adapter, change)
    refuse(adapter, llama_dir, match)


@pytest.mark.parametrize(
    ("weight", "bias", "match"),
    [
        (torch.zeros(2, 63), torch.zeros(2), r"weight has shape \(2, 63\)"),
        (torch.zeros(64), torch.zeros(2), r"weight has shape \(64,\)"),
        (torch.zeros(0, 64), torch.zeros(0), "weight has shape"),
        (torch.zeros(2, 64), torch.zeros(3), r"bias has shape \(3,\)"),
        (torch.full((2, 64), float("inf")), torch.zeros(2), "not finite"),
    ],
)
def test_reward_heads(
    weight: Tensor, bias: Tensor, match: str, adapter: Path, llama_dir: Path
) -> None:
    save_file({"weight": weight, "bias": bias}, adapter / HEADS_FILE, {"reads": "mean"})
    refuse(adapter, llama_dir, match, "reward")
    # A policy has no use for them.
    assert read_adapter(adapter, read_spec(llama_dir), "policy", 16).heads is None


def test_heads_that_do_not_say_what_they_read_are_refused(adapter: Path, llama_dir: Path) -> None:
    save_file({"weight": torch.zeros(2, 64), "bias": torch.zeros(2)}, adapter / HEADS_FILE)
    refuse(adapter, llama_dir, "not made for the mean over tokens", "reward")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, HEADS_FILE])
def test_missing_and_truncated_files(name: str, adapter: Path, llama_dir: Path) -> None:
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    refuse(adapter, llama_dir, name, "reward")
    (adapter / name).unlink()
    refuse(adapter, llama_dir, name, "reward")


def test_an_adapter_of_another_base(save_checkpoint, save_adapter, llama_dir: Path) -> None:
    refuse(save_adapter(save_checkpoint("mistral")), llama_dir, "has shape")
    gpt2 = save_adapter(save_checkpoint("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    refuse(gpt2, llama_dir, "no linear 'c_attn'")


@pytest.fixture(scope="module")
def intact(llama_dir: Path, save_adapter: Callable[..., Path]) -> Path:
    return save_adapter(llama_dir, heads=2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_is_read_or_refused_and_raises_nothing_else(
    data: st.DataObject, intact: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE, HEADS_FILE]))
    directory = tmp_path_factory.mktemp("flipped")
    for path in intact.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    content = bytearray((directory / name).read_bytes())
    # Near the front, where the structure is.
    content[data.draw(st.integers(0, min(len(content), 3000) - 1))] ^= data.draw(
        st.integers(1, 255)
    )
    (directory / name).write_bytes(content)
    with contextlib.suppress(BadAdapter):
        read_adapter(directory, read_spec(llama_dir), "reward", 16)
