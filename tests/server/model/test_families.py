"""config.json is read as transformers reads it, in old and new spelling, or refused by name."""

import json
from pathlib import Path

import pytest
import structlog
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.families import read_spec, spec_from_config
from heedful_server.model.spec import LinearRopeScaling, Llama3RopeScaling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
NEOX = LLAMA | {"model_type": "gpt_neox"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}
    new = LLAMA | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    spec = spec_from_config(old)
    assert spec == spec_from_config(new)
    assert spec.rope is not None
    assert (spec.rope.theta, spec.rope.rotary_dim) == (5e5, 16)
    assert spec.rope.scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)


def test_old_gpt_neox_rope_keys_are_read() -> None:
    old = spec_from_config(NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 777})
    parameters = {"rope_type": "default", "rope_theta": 777, "partial_rotary_factor": 0.5}
    assert old == spec_from_config(NEOX | {"rope_parameters": parameters})
    assert old.rope is not None
    assert (old.rope.theta, old.rope.rotary_dim) == (777.0, 8)


def test_linear_scaling_is_read() -> None:
    spec = spec_from_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert spec.rope is not None
    assert spec.rope.scaling == LinearRopeScaling(2.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_other_rope_scaling_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=kind) as caught:
        spec_from_config(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
    assert caught.value.field == "rope_type"


def test_sliding_window_caps_the_context_and_says_so() -> None:
    with structlog.testing.capture_logs() as logs:
        spec = spec_from_config(
            LLAMA | {"model_type": "mistral", "sliding_window": 32, "num_key_value_heads": 2}
        )
    assert spec.context_tokens == 32
    assert [entry["window"] for entry in logs] == [32]
    unused = LLAMA | {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}
    assert spec_from_config(unused).context_tokens == 256


def test_defaults_follow_each_family() -> None:
    assert spec_from_config(LLAMA).num_kv_heads == 4
    assert not spec_from_config(LLAMA).tied_embeddings
    assert spec_from_config(LLAMA | {"model_type": "qwen3"}).head_dim == 128
    assert spec_from_config(LLAMA | {"model_type": "qwen2"}).qkv_bias
    assert spec_from_config(NEOX).residual == "parallel"
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}
    spec = spec_from_config(gpt2 | {"n_inner": None})
    assert (spec.ffn_size, spec.tied_embeddings, spec.context_tokens) == (32, True, 1024)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            "quantization_config",
        ),
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"head_dim": 15}, "head_dim"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        spec_from_config(LLAMA | changes)
    assert caught.value.field == field


def test_refusals_name_the_quantization_method() -> None:
    with pytest.raises(UnsupportedModel, match="gptq"):
        spec_from_config(LLAMA | {"quantization_config": {"quant_method": "gptq"}})


def test_gpt2_switches_that_change_the_result_are_refused() -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}
    with pytest.raises(UnsupportedModel, match="scale_attn_by_inverse_layer_idx"):
        spec_from_config(gpt2 | {"scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"hidden_size": True},
        {"hidden_size": 10**12},
        {"hidden_size": None},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "small"},
        {"rope_theta": -1},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": "end"},
        {"eos_token_id": [-1]},
        {"rope_scaling": {"type": "linear"}},
    ],
)
def test_senseless_values_are_refused(changes: dict[str, object]) -> None:
    key = next(iter(changes))
    with pytest.raises(BadCheckpoint) as caught:
        spec_from_config(LLAMA | changes)
    assert key in str(caught.value) or "head" in key or "factor" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        read_spec(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"config\.json: no such file"):
        read_spec(tmp_path)


def test_generation_config_wins_for_eos(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": [7, 9]}))
    assert read_spec(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert read_spec(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_spec(tmp_path).eos_token_ids == (7, 9)
