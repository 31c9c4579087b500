"""GGUF files give back the model that was written into them, blocks untouched."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from heedful_server.model.blocks import dequantize_blocks
from heedful_server.model.dequantize import dequantized_state_dict
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.families import read_spec
from heedful_server.model.gguf_file import read_gguf
from heedful_server.model.weights import iterate_weights
from safetensors.torch import load_file, save_file

Types = gguf.GGMLQuantizationType
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        stem, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{_NAMES[stem]}.{kind}"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The row order that llama.cpp's conversion gives query and key weights."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    def write(
        model_dir: Path,
        linear: Types,
        embed: Types | None = None,
        architecture: str = "llama",
        change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    ) -> Path:
        config = json.loads((model_dir / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config))
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
        writer.add_float32("llama.rope.freq_base", 1e4)
        tensors = load_file(model_dir / "model.safetensors")
        change(tensors)
        for name, tensor in tensors.items():
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                tensor = neighbours(tensor, config["head_dim"])
            kind = Types.F32 if tensor.ndim == 1 else linear
            if tensor.ndim == 2 and embed is not None and "layers" not in name:
                kind = embed
            data = gguf.quantize(np.ascontiguousarray(tensor.float().numpy()), kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path

    return write


@pytest.mark.parametrize("kind", [Types.F32, Types.F16, Types.BF16])
def test_float_gguf_equals_the_checkpoint_it_came_from(
    kind: Types, llama_dir: Path, write_gguf, load, stepper, random_ids
) -> None:
    def through_kind(tensors: dict[str, torch.Tensor]) -> None:
        half = {Types.F16: torch.float16, Types.BF16: torch.bfloat16}.get(kind, torch.float32)
        tensors.update({name: tensor.to(half).float() for name, tensor in tensors.items()})

    model_dir = write_gguf(llama_dir, kind, change=through_kind)
    plain = load_file(llama_dir / "model.safetensors")
    through_kind(plain)
    state = dequantized_state_dict(model_dir, "float32")
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("code", "kind"), [(Types.Q4_1, "q4_1"), (Types.Q8_0, "q8_0")])
def test_blocks_arrive_as_they_are_with_rows_in_half_split_order(
    code: Types, kind: str, llama_dir: Path, write_gguf
) -> None:
    model_dir = write_gguf(llama_dir, code)
    plain = load_file(llama_dir / "model.safetensors")
    found = {w.name: w for w in iterate_weights(model_dir, read_spec(model_dir))}
    for name, stem in (
        ("layers.1.q", "q_proj"),
        ("layers.0.k", "k_proj"),
        ("layers.1.v", "v_proj"),
    ):
        original = plain[f"model.layers.{name[7]}.self_attn.{stem}.weight"]
        assert found[name].kind == kind
        assert torch.equal(
            found[name].data, torch.from_numpy(gguf.quantize(original.numpy(), code))
        )
    assert found["embed"].kind == kind
    assert "head" not in found


def test_q4_1_with_a_q8_0_embedding_is_served_packed_and_close_to_exact(
    llama_dir: Path, write_gguf, load, stepper, random_ids, reference_logits, tmp_path: Path
) -> None:
    model_dir = write_gguf(llama_dir, Types.Q4_1, Types.Q8_0)
    decoder = load(model_dir, "auto")
    assert decoder.quantization == "q4_1"
    ids = random_ids(30, seed=0)
    packed = stepper(decoder).step({"a": ids})["a"]
    exact = stepper(load(model_dir, "float32")).step({"a": ids})["a"]
    expanded = tmp_path / "expanded"
    expanded.mkdir()
    save_file(dequantized_state_dict(model_dir), expanded / "model.safetensors", {"format": "pt"})
    (expanded / "config.json").write_text((model_dir / "config.json").read_text())
    theirs = reference_logits(expanded, ids)
    torch.testing.assert_close(exact, theirs, rtol=0, atol=1e-4)
    bf16 = stepper(load(expanded, "bfloat16")).step({"a": ids})["a"]
    # Packed weights may not be much further from the exact ones than plain bf16 arithmetic is.
    assert (packed - theirs).square().mean() < 4 * (bf16 - theirs).square().mean()


@pytest.mark.parametrize("code", [Types.Q4_0, Types.Q5_1])
def test_other_types_are_expanded_or_repacked(
    code: Types, llama_dir: Path, write_gguf, reference_logits, load, stepper, random_ids
) -> None:
    model_dir = write_gguf(llama_dir, code)
    plain = load_file(llama_dir / "model.safetensors")
    state = dequantized_state_dict(model_dir, "float32")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = gguf.dequantize(gguf.quantize(plain[name].numpy(), code), code)
    torch.testing.assert_close(state[name], torch.from_numpy(expected), rtol=1e-6, atol=1e-8)
    kinds = {w.name: w.kind for w in iterate_weights(model_dir, read_spec(model_dir))}
    assert kinds["layers.0.up"] == ("q4_1" if code == Types.Q4_0 else "dense")


def test_other_architectures_keep_their_row_order(
    save_checkpoint, write_gguf, load, stepper, random_ids, reference_logits
) -> None:
    source = save_checkpoint("qwen3")
    model_dir = write_gguf(source, Types.F32, architecture="qwen3")
    ids = random_ids(20, seed=0)
    ours = stepper(load(model_dir)).step({"a": ids})["a"]
    torch.testing.assert_close(ours, reference_logits(source, ids), rtol=0, atol=1e-4)


def test_embedding_rows_come_out_of_their_blocks(llama_dir: Path, write_gguf, load) -> None:
    model_dir = write_gguf(llama_dir, Types.Q4_1, Types.Q8_0)
    table = load(model_dir, "auto")._weights.embed
    rows = torch.tensor([5, 0, 159, 5])
    expected = dequantize_blocks("q8_0", table.data)[rows]
    assert torch.equal(table.rows(rows, torch.float32), expected)


def test_missing_unexpected_and_misshapen_tensors_are_named(llama_dir: Path, write_gguf) -> None:
    def read(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        model_dir = write_gguf(llama_dir, Types.F32, change=change)
        list(iterate_weights(model_dir, read_spec(model_dir)))

    with pytest.raises(BadCheckpoint, match=r"model\.gguf: tensor output_norm\.weight is missing"):
        read(lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(BadCheckpoint, match=r"unexpected tensor output\.weight"):
        read(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(160, 64)}))
    with pytest.raises(BadCheckpoint, match=r"blk\.0\.ffn_up\.weight has shape \(96, 32\)"):
        read(
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 32)}
            )
        )


def test_an_unknown_architecture_is_refused(llama_dir: Path, write_gguf) -> None:
    model_dir = write_gguf(llama_dir, Types.F32, architecture="mamba")
    with pytest.raises(UnsupportedModel, match="'mamba' is not read"):
        list(iterate_weights(model_dir, read_spec(model_dir)))


def test_every_truncation_is_refused(llama_dir: Path, write_gguf) -> None:
    model_dir = write_gguf(llama_dir, Types.Q8_0)
    path = model_dir / "model.gguf"
    content = path.read_bytes()
    spec = read_spec(model_dir)
    for size in [0, 3, 8, 20, 30, 60, 100, 333, 1000, len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:size])
        with pytest.raises(BadCheckpoint, match=r"model\.gguf"):
            list(iterate_weights(model_dir, spec))


@pytest.mark.parametrize("position", range(4, 64, 3))
def test_damaged_headers_are_refused_or_harmless(
    position: int, llama_dir: Path, write_gguf
) -> None:
    model_dir = write_gguf(llama_dir, Types.F32)
    path = model_dir / "model.gguf"
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    try:
        read_gguf(path)
    except BadCheckpoint as error:
        assert "model.gguf" in str(error)  # noqa: PT017 - either outcome is fine, a crash is not


def test_scalar_metadata_is_read_and_arrays_are_skipped(llama_dir: Path, write_gguf) -> None:
    file = read_gguf(write_gguf(llama_dir, Types.F32) / "model.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.rope.freq_base"] == 1e4
    assert "tokenizer.ggml.tokens" not in file.metadata


def test_two_gguf_files_are_ambiguous(llama_dir: Path, write_gguf) -> None:
    model_dir = write_gguf(llama_dir, Types.F32)
    (model_dir / "other.gguf").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="several GGUF files"):
        iterate_weights(model_dir, read_spec(model_dir))


def test_nf4_of_a_gguf_is_refused(llama_dir: Path, write_gguf, load) -> None:
    with pytest.raises(UnsupportedModel, match="nf4 wants a float checkpoint"):
        load(write_gguf(llama_dir, Types.Q8_0), "nf4")
