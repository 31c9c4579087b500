"""The written directory is the served base: transformers computes with it what the decoder does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from heedful_kernels import cpu
from heedful_server.errors import ModelUnusable
from heedful_server.model.blocks import dequantize_blocks, quantize_blocks
from heedful_server.model.dequantize import dequantized_state_dict
from heedful_server.model.export import NOTE_FILE, export
from heedful_server.protocol import EngineConfig
from safetensors.torch import load_file

TOLERANCE = 1e-4
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
QKV = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]


def _config(model_dir: Path, quantize: str, native: bool = False) -> EngineConfig:
    return EngineConfig(str(model_dir), quantize, device="cpu", native_kernels=native)


@pytest.mark.parametrize("quantize", ["float32", "bfloat16", "int4", "int8"])
def test_transformers_computes_what_the_decoder_does(
    quantize: str, family_dir: Path, tmp_path: Path, load, stepper, reference_logits, random_ids
) -> None:
    out = tmp_path / "out"
    assert export(_config(family_dir, quantize), out, "float32")
    ids = random_ids(20, seed=0)
    theirs = reference_logits(out, ids)
    # The same weights in exact arithmetic, read back by the engine's own loader.
    ours = stepper(load(out, "float64")).step({"a": ids})["a"].float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    if quantize == "float32":
        served = stepper(load(family_dir, "float32")).step({"a": ids})["a"]
        torch.testing.assert_close(served, theirs, rtol=0, atol=TOLERANCE)


def test_quantized_values_are_those_of_the_blocks(llama_dir: Path, tmp_path: Path) -> None:
    stored = load_file(llama_dir / "model.safetensors")
    export(_config(llama_dir, "int4"), tmp_path / "out", "float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    expected = dequantize_blocks("q4_1", quantize_blocks("q4_1", stored[UP_PROJ]))
    assert torch.equal(written[UP_PROJ], expected)
    table = "model.embed_tokens.weight"
    expected = dequantize_blocks("q8_0", quantize_blocks("q8_0", stored[table]))
    assert torch.equal(written[table], expected)


@pytest.mark.skipif(cpu.find_library() is None, reason="the native kernels are not built")
def test_the_native_path_gets_the_form_that_it_fuses_weights_in(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In a GGUF file whose q is finer than k and v, all three are served in the finer form."""
    q4_1, q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    model_dir = tmp_path / "mixed"
    model_dir.mkdir()
    stored = load_file(tiny_model_dir / "model.safetensors")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config))
    writer = gguf.GGUFWriter(model_dir / "model.gguf", "qwen2")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    names |= {
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
    }
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    for name, tensor in stored.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        else:
            target = "token_embd.weight" if "embed" in name else "output_norm.weight"
        kind = q8_0 if "q_proj" in name or "embed" in name else q4_1
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        writer.add_tensor(target, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = dequantized_state_dict(model_dir, "auto")
    native = dequantized_state_dict(model_dir, "auto", native=True)
    finer = gguf.dequantize(gguf.quantize(stored[QKV[0]].numpy(), q8_0), q8_0)
    assert torch.equal(native[QKV[0]], torch.from_numpy(finer))
    # The torch path has no form for a mixture but bf16.
    assert torch.equal(plain[QKV[0]], torch.from_numpy(finer).bfloat16().float())
    for name in QKV[1:]:
        exact = gguf.dequantize(gguf.quantize(stored[name].numpy(), q4_1), q4_1)
        expected = dequantize_blocks("q8_0", quantize_blocks("q8_0", torch.from_numpy(exact)))
        assert torch.equal(native[name], expected)
    assert torch.equal(plain[UP_PROJ], native[UP_PROJ])


def test_large_models_are_written_in_shards(
    llama_dir: Path, tmp_path: Path, reference_logits, random_ids
) -> None:
    config = _config(llama_dir, "bfloat16")
    export(config, tmp_path / "whole", "bfloat16")
    export(config, tmp_path / "cut", "bfloat16", shard_bytes=20_000)
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    ids = random_ids(9, seed=0)
    whole, cut = (reference_logits(tmp_path / name, ids) for name in ("whole", "cut"))
    assert torch.equal(whole, cut)


def test_a_finished_directory_is_kept_and_an_outdated_one_made_anew(
    llama_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert export(_config(llama_dir, "int4"), out, "float32")
    inode = (out / "model.safetensors").stat().st_ino
    assert not export(_config(llama_dir, "int4"), out, "float32")
    assert (out / "model.safetensors").stat().st_ino == inode
    assert export(_config(llama_dir, "int8"), out, "float32")
    assert json.loads((out / NOTE_FILE).read_text())["quantize"] == "int8"
    os.utime(llama_dir / "model.safetensors", (1, 1))
    assert export(_config(llama_dir, "int8"), out, "float32")
    assert [path.name for path in tmp_path.iterdir()].count("out") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_place_that_holds_something_else_is_left_alone(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ModelUnusable, match="holds something else"):
        export(_config(llama_dir, "int4"), tmp_path, "float32")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_model_that_cannot_be_served_leaves_nothing_behind(
    llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelUnusable, match=r"model\.quantize"):
        export(_config(llama_dir, "int3"), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_command_writes_the_tokenizer_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEEDFUL_")}
    command = [sys.executable, "-P", "-m", "heedful_server.main", "model", "dequantize"]
    command += ["--model", str(tiny_model_dir), "--quantize", "int4", "--dtype", "bfloat16"]
    command += ["--out", str(tmp_path / "out"), "--home", str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == str(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert load_file(tmp_path / "out" / "model.safetensors")[UP_PROJ].dtype == torch.bfloat16
