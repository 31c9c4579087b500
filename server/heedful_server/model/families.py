"""Reads a Hugging Face config.json into a `DecoderSpec`, one function per family.

Owns the knowledge of configuration keys, their old and new spellings and the values that a missing
key stands for. Refuses by name whatever the decoder would compute wrongly. Plain JSON, no
transformers and no torch; runs while loading, and wherever a model is looked at.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import structlog

from heedful_server.model.config_values import Config, flag, number, read_json, size
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.spec import (
    Activation,
    DecoderSpec,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    RopeSpec,
)

log = structlog.get_logger(__name__)

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_MAX_LAYERS: Final = 1024


def read_spec(model_dir: Path) -> DecoderSpec:
    """Read `config.json` (and `generation_config.json` for the ids that end an answer).

    Raises:
        BadCheckpoint: the file is missing, is no JSON object, or a size in it makes no sense.
        UnsupportedModel: the architecture, or a switch of it, is not served.
    """
    config = read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return spec_from_config(config, generation)


def spec_from_config(config: Config, generation: Config | None = None) -> DecoderSpec:
    """The spec that a parsed config.json describes; errors as `read_spec`."""
    _prequantized(config)
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        served = ", ".join(sorted(_FAMILIES))
        raise UnsupportedModel("model_type", f"{model_type!r} is not served; these are: {served}")
    return family(config, _eos_token_ids(config, generation or {}))


def _llama(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    bias = flag(config, "attention_bias", False)
    return _llama_like(
        config, eos, qkv_bias=bias, out_bias=bias, mlp_bias=flag(config, "mlp_bias", False)
    )


def _mistral(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    window = config.get("sliding_window", 4096)
    return _llama_like(config, eos, window=window, kv_heads=8, context=131072)


def _qwen2(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    return _llama_like(config, eos, qkv_bias=True, window=_qwen_window(config), context=32768)


def _qwen3(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    bias = flag(config, "attention_bias", False)
    return _llama_like(
        config,
        eos,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        window=_qwen_window(config),
        context=32768,
        default_head_dim=128,
    )


def _qwen_window(config: Config) -> object:
    return config.get("sliding_window") if flag(config, "use_sliding_window", False) else None


def _llama_like(
    config: Config,
    eos: tuple[int, ...],
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    window: object = None,
    kv_heads: int | None = None,
    context: int = 2048,
    default_head_dim: int | None = None,
) -> DecoderSpec:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = _head_dim(config, hidden, heads, default_head_dim)
    context = size(config, "max_position_embeddings", context)
    return DecoderSpec(
        architecture=str(config["model_type"]),
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=size(config, "num_hidden_layers", most=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads, kv_heads),
        head_dim=head_dim,
        ffn_size=size(config, "intermediate_size"),
        context_tokens=_cap_at_window(context, window),
        norm="rms",
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_act", "silu"),
        gated_mlp=True,
        rope=_rope(config, head_dim, context),
        qkv_bias=qkv_bias,
        attention_out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_embeddings=flag(config, "tie_word_embeddings", False),
        eos_token_ids=eos,
    )


def _gpt2(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    for switch in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _refuse_unless(config, switch, False)
    hidden, heads = size(config, "n_embd"), size(config, "n_head")
    head_dim = _head_dim({}, hidden, heads, None)
    context = size(config, "n_positions", 1024)
    return DecoderSpec(
        architecture="gpt2",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=size(config, "n_layer", most=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ffn_size=size(config, "n_inner", 4 * hidden),
        context_tokens=context,
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        position_rows=context,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_embeddings=flag(config, "tie_word_embeddings", True),
        attention_scale=0.0 if flag(config, "scale_attn_weights", True) else 1.0,
        eos_token_ids=eos,
    )


def _opt(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    _refuse_unless(config, "layer_norm_elementwise_affine", True)
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    bias = flag(config, "enable_bias", True)
    before = flag(config, "do_layer_norm_before", True)
    context = size(config, "max_position_embeddings", 2048)
    return DecoderSpec(
        architecture="opt",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=size(config, "num_hidden_layers", most=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim({}, hidden, heads, None),
        ffn_size=size(config, "ffn_dim"),
        context_tokens=context,
        norm="layer",
        norm_eps=1e-5,
        activation=_activation(config, "activation_function", "relu"),
        gated_mlp=False,
        residual="pre" if before else "post",
        final_norm=before and not flag(config, "_remove_final_layer_norm", False),
        position_rows=context + 2,
        position_offset=2,
        embed_size=size(config, "word_embed_proj_dim", hidden),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=flag(config, "tie_word_embeddings", True),
        eos_token_ids=eos,
    )


def _gpt_neox(config: Config, eos: tuple[int, ...]) -> DecoderSpec:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = _head_dim({}, hidden, heads, None)
    context = size(config, "max_position_embeddings", 2048)
    bias = flag(config, "attention_bias", True)
    return DecoderSpec(
        architecture="gpt_neox",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=size(config, "num_hidden_layers", most=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ffn_size=size(config, "intermediate_size"),
        context_tokens=context,
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        activation=_activation(config, "hidden_act", "gelu"),
        gated_mlp=False,
        residual="parallel" if flag(config, "use_parallel_residual", True) else "pre",
        rope=_rope(config, head_dim, context, theta_key="rotary_emb_base", rotary_share=0.25),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        tied_embeddings=flag(config, "tie_word_embeddings", False),
        eos_token_ids=eos,
    )


_FAMILIES: Final[Mapping[str, Callable[[Config, tuple[int, ...]], DecoderSpec]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}


def _rope(
    config: Config,
    head_dim: int,
    context: int,
    *,
    theta_key: str = "rope_theta",
    rotary_share: float = 1.0,
) -> RopeSpec:
    # Newer configurations hold everything in rope_parameters; older ones spread it over three keys.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModel("rope_parameters", f"expected an object, found {scaling!r}")
    old_share = number(config, "rotary_pct", number(config, "partial_rotary_factor", rotary_share))
    share = number(scaling, "partial_rotary_factor", old_share)
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise UnsupportedModel("partial_rotary_factor", f"{share} of {head_dim} is no even number")
    theta = number(scaling, "rope_theta", number(config, theta_key, 10000.0))
    return RopeSpec(theta, rotary_dim, _rope_scaling(scaling, context))


def _rope_scaling(scaling: Config, context: int) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(number(scaling, "factor"))
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=number(scaling, "factor"),
            low_freq_factor=number(scaling, "low_freq_factor"),
            high_freq_factor=number(scaling, "high_freq_factor"),
            original_context_tokens=size(scaling, "original_max_position_embeddings", context),
        )
    raise UnsupportedModel("rope_type", f"{kind!r} is not served; default, linear and llama3 are")


def _cap_at_window(context: int, window: object) -> int:
    if window is None:
        return context
    if not isinstance(window, int) or window < 1:
        raise BadCheckpoint(f"config.json: sliding_window is {window!r}")
    if window < context:
        # Within the window sliding attention equals full attention; beyond it ours would differ.
        log.warning("context capped at the sliding window", window=window, context_tokens=context)
    return min(context, window)


def read_prequantized(model_dir: Path) -> Literal["nf4", "int8"] | None:
    """bitsandbytes' form that a checkpoint's layers are stored in; None for a float one.

    Raises:
        BadCheckpoint: config.json is missing or no JSON object.
        UnsupportedModel: the checkpoint is quantized in another way.
    """
    return _prequantized(read_json(model_dir / "config.json"))


def _prequantized(config: Config) -> Literal["nf4", "int8"] | None:
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    given = quantization if isinstance(quantization, Mapping) else {}
    method = given.get("quant_method")
    if method == "bitsandbytes":
        if given.get("load_in_8bit"):
            return "int8"
        kind = given.get("bnb_4bit_quant_type")
        if given.get("load_in_4bit") and kind == "nf4":
            return "nf4"
        raise UnsupportedModel(
            "quantization_config", f"of bitsandbytes' forms nf4 and int8 are served, not {kind!r}"
        )
    raise UnsupportedModel(
        "quantization_config",
        f"a checkpoint quantized with {method or 'an unnamed method'} is not served; "
        "use a float checkpoint, one of bitsandbytes or a GGUF file",
    )


def _refuse_unless(config: Config, key: str, served: bool) -> None:
    if flag(config, key, served) is not served:
        raise UnsupportedModel(key, f"{not served} is not served".lower())


def _eos_token_ids(config: Config, generation: Config) -> tuple[int, ...]:
    # What generation_config.json says wins; chat models often add the end of a turn only there.
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise BadCheckpoint(f"eos_token_id is {value!r}")
    return tuple(ids)


def _activation(config: Config, key: str, default: str) -> Activation:
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(key, f"{name!r} is not served; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[name]


def _head_dim(config: Config, hidden: int, heads: int, default: int | None) -> int:
    if config.get("head_dim") is None and default is None and hidden % heads:
        raise BadCheckpoint(f"config.json: hidden size {hidden} is no multiple of {heads} heads")
    head_dim = size(config, "head_dim", default or hidden // heads)
    if head_dim % 2:
        raise UnsupportedModel("head_dim", f"{head_dim} is odd")
    return head_dim


def _kv_heads(config: Config, heads: int, default: int | None) -> int:
    kv_heads = size(config, "num_key_value_heads", default or heads)
    if heads % kv_heads:
        raise BadCheckpoint(f"config.json: {heads} heads cannot share {kv_heads} key-value heads")
    return kv_heads
