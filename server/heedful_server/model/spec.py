"""What a decoder is made of, as one frozen record that every family's configuration boils down to.

Owns `DecoderSpec` and its parts; `families.py` reads them off a Hugging Face config.json. Knows no
weights, no files and no torch, so that planning code may import it cheaply. Plain data, any thread.
"""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
# pre: x += attention(norm(x)); x += mlp(norm(x)).   post: the norm follows each sum (OPT-350m).
# parallel: x += attention(norm1(x)) + mlp(norm2(x)) (GPT-NeoX).
ResidualLayout = Literal["pre", "post", "parallel"]


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Positions are divided by the factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Long wavelengths are stretched by the factor, short ones kept, those in between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


RopeScaling = LinearRopeScaling | Llama3RopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions over the first rotary_dim entries of each head, in half-split order."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Shapes and switches of one decoder; sizes count elements, context_tokens counts positions."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    context_tokens: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    residual: ResidualLayout = "pre"
    final_norm: bool = True
    rope: RopeSpec | None = None
    # Rows of the learned position table, and the row of position 0 (OPT: 2); 0 rows means none.
    position_rows: int = 0
    position_offset: int = 0
    # Width of the token embedding where it differs from hidden_size (OPT-350m), else hidden_size.
    embed_size: int = 0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    attention_scale: float = 0.0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Defaults that follow from other fields; object.__setattr__ because the record is frozen.
        object.__setattr__(self, "embed_size", self.embed_size or self.hidden_size)
        object.__setattr__(self, "attention_scale", self.attention_scale or self.head_dim**-0.5)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.num_kv_heads * self.head_dim
