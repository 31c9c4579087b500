"""A damaged checkpoint is refused with the tensor and the file named, before anything is served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heedful_server.errors import ModelUnusable
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.load import load_best_decoder
from heedful_server.protocol import EngineConfig
from safetensors.torch import load_file, save_file

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy_dir(llama_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama_dir, tmp_path / "model")
    return tmp_path / "model"


def rewrite(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_missing_tensor_is_named(copy_dir: Path, load) -> None:
    rewrite(copy_dir, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(BadCheckpoint, match=f"{Q_PROJ} is missing"):
        load(copy_dir)


def test_an_unexpected_tensor_is_named(copy_dir: Path, load) -> None:
    rewrite(copy_dir, lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: unexpected tensor model\.extra"):
        load(copy_dir)


def test_a_wrong_shape_is_named(copy_dir: Path, load) -> None:
    rewrite(copy_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(128, 63)}))
    with pytest.raises(BadCheckpoint, match=rf"{Q_PROJ} has shape \(128, 63\), expected \(128, 64"):
        load(copy_dir)


def test_a_transposed_tensor_of_equal_size_is_refused(copy_dir: Path, load) -> None:
    rewrite(copy_dir, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].t().contiguous()}))
    with pytest.raises(BadCheckpoint, match="has shape"):
        load(copy_dir)


def test_integer_weights_are_refused(copy_dir: Path, load) -> None:
    rewrite(copy_dir, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    with pytest.raises(BadCheckpoint, match="holds I8, not floats"):
        load(copy_dir)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(copy_dir: Path, load, share: float) -> None:
    path = copy_dir / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        load(copy_dir)


def test_a_tied_head_in_the_file_is_ignored(copy_dir: Path, load, stepper, random_ids) -> None:
    ids = random_ids(5, seed=0)
    before = stepper(load(copy_dir)).step({"a": ids})["a"]
    rewrite(copy_dir, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(160, 64)}))
    assert torch.equal(before, stepper(load(copy_dir)).step({"a": ids})["a"])


def test_an_untied_head_must_be_there(save_checkpoint, tmp_path: Path, load) -> None:
    shutil.copytree(save_checkpoint("qwen2"), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight is missing"):
        load(tmp_path / "model")


def test_a_missing_shard_is_named(save_checkpoint, tmp_path: Path, load) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(save_checkpoint("qwen2", max_shard_size="60KB"), model_dir)
    shard = sorted(model_dir.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=shard.name):
        load(model_dir)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_point_outside_its_directory(copy_dir: Path, load, name: object) -> None:
    (copy_dir / "model.safetensors").unlink()
    index = {"weight_map": {Q_PROJ: name}}
    (copy_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="is no file name"):
        load(copy_dir)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(copy_dir: Path, load, text: str) -> None:
    (copy_dir / "model.safetensors").unlink()
    (copy_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"index\.json: no weight_map"):
        load(copy_dir)


def test_a_directory_without_weights_is_refused(copy_dir: Path, load) -> None:
    (copy_dir / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="neither safetensors nor a GGUF file"):
        load(copy_dir)
    (copy_dir / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UnsupportedModel, match="pickled weights only"):
        load(copy_dir)


def test_a_missing_directory_is_named(tmp_path: Path, load) -> None:
    with pytest.raises(ModelUnusable, match="nowhere"):
        load(tmp_path / "nowhere")


def test_more_tokens_than_can_be_drawn_from_are_refused(tmp_path: Path, llama_dir: Path) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": (1 << 18) + 1}))
    with pytest.raises(UnsupportedModel, match="vocab_size: 262145"):
        load_best_decoder(EngineConfig(str(tmp_path), device="cpu"), lambda stage, share: None)


def test_unknown_quantize_and_device_are_refused(llama_dir: Path) -> None:
    from heedful_server.model.loader import load_decoder, resolve_device

    with pytest.raises(UnsupportedModel, match=r"model\.quantize: 'int3'"):
        load_decoder(llama_dir, "int3", "cpu", lambda stage, share: None)
    with pytest.raises(UnsupportedModel, match=r"engine\.device: 'tpu'"):
        resolve_device("tpu")


def test_progress_rises_to_one(llama_dir: Path) -> None:
    from heedful_server.model.loader import load_decoder

    seen: list[tuple[str, float]] = []
    load_decoder(llama_dir, "float32", "cpu", lambda stage, share: seen.append((stage, share)))
    assert {stage for stage, _ in seen} == {"weights"}
    shares = [share for _, share in seen]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
