"""Packing, adapters and the cut at the first trained layer, against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_trainer.backbone import Backbone, BackboneOptions, load_backbone
from heedful_trainer.errors import ModelUnusable
from heedful_trainer.packing import Row, pack
from heedful_trainer.token_logprob import token_logprobs
from transformers import AutoModelForCausalLM

ROWS = [
    Row((5, 6, 7, 8), ((10, 11, 12), (20,), (30, 31))),
    Row((9,), ((40, 41, 42, 43, 44),)),
    Row((50, 51, 52, 53, 54, 55, 56), ((60, 61), (62, 63, 64))),
]


def options(**more: Any) -> BackboneOptions:
    return BackboneOptions(**{"dtype": "float32", "rank": 4, "alpha": 8.0, **more})


def shaken(backbone: Backbone, seed: int = 0) -> Backbone:
    backbone.adapter.reset(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return backbone


def logprobs(backbone: Backbone, rows: list[Row], with_adapter: bool = True) -> torch.Tensor:
    batch = backbone.batch(rows)
    hidden = backbone.hidden(batch, with_adapter=with_adapter)
    packed = batch.packed
    return token_logprobs(hidden[packed.source_N], backbone.head_VH, packed.target_N)


def one_by_one(model: Any, rows: list[Row]) -> torch.Tensor:
    found = []
    for row in rows:
        for answer in row.answers:
            ids = torch.tensor([[*row.prompt, *answer]])
            with torch.no_grad():
                table = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(row.prompt) - 1
            found += [table[start + i, token] for i, token in enumerate(answer)]
    return torch.stack(found)


def test_rows_say_which_hidden_state_predicts_which_token() -> None:
    packed = pack(ROWS[:1])
    assert packed.target_N.tolist() == [10, 11, 12, 20, 30, 31]
    assert packed.source_N.tolist() == [3, 4, 5, 3, 3, 8]
    assert packed.owner_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert packed.last_A.tolist() == [6, 7, 9]
    assert packed.position_ids_1T[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 4, 5]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_packed_answers_have_the_log_probs_that_they_have_alone(
    tiny_model_dir: Path, share: float
) -> None:
    backbone = load_backbone(tiny_model_dir, options(trained_share=share))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    shaken(backbone)
    got = logprobs(backbone, ROWS, with_adapter=False).detach()
    torch.testing.assert_close(got, one_by_one(plain, ROWS), atol=2e-5, rtol=1e-4)


def test_an_untrained_adapter_changes_nothing(tiny_model_dir: Path) -> None:
    backbone = load_backbone(tiny_model_dir, options())
    backbone.adapter.reset(1)
    assert torch.equal(logprobs(backbone, ROWS), logprobs(backbone, ROWS, with_adapter=False))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_peft_loads_the_files_and_computes_the_same(
    tiny_model_dir: Path, tmp_path: Path, share: float
) -> None:
    from peft import PeftModel

    backbone = shaken(load_backbone(tiny_model_dir, options(trained_share=share)))
    backbone.adapter.save(tmp_path, "tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == ([1] if share == 0.5 else None)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = PeftModel.from_pretrained(plain, tmp_path).eval()
    got = logprobs(backbone, ROWS).detach()
    torch.testing.assert_close(got, one_by_one(adapted, ROWS), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(got, logprobs(backbone, ROWS, with_adapter=False), atol=1e-2)


def test_files_come_back_as_they_went(tiny_model_dir: Path, tmp_path: Path) -> None:
    from heedful_trainer.lora import read_weights

    backbone = shaken(load_backbone(tiny_model_dir, options()))
    before = logprobs(backbone, ROWS).detach()
    backbone.adapter.save(tmp_path, "tiny")
    shaken(backbone, seed=7)
    backbone.adapter.load(read_weights(tmp_path))
    assert torch.equal(before, logprobs(backbone, ROWS).detach())
    with pytest.raises(ValueError, match="no layer for"):
        backbone.adapter.load({**read_weights(tmp_path), "x": torch.zeros(1)})


def test_the_cut_does_not_change_gradients(tiny_model_dir: Path) -> None:
    kept = shaken(load_backbone(tiny_model_dir, options(trained_share=0.5)))
    logprobs(kept, ROWS).sum().backward()
    whole = load_backbone(tiny_model_dir, options(trained_share=1.0))
    whole.adapter.reset(0)
    upper = kept.adapter.parameters()
    values = {**whole.adapter.parameters(), **upper}
    whole.adapter.load({name: value.detach() for name, value in values.items()})
    logprobs(whole, ROWS).sum().backward()
    for name, parameter in whole.adapter.parameters().items():
        if name in upper:
            torch.testing.assert_close(parameter.grad, upper[name].grad, atol=1e-4, rtol=1e-3)


def test_a_trunk_does_not_depend_on_its_neighbours(tiny_model_dir: Path) -> None:
    first = load_backbone(tiny_model_dir, options())
    second = load_backbone(tiny_model_dir, options(trunk_bytes=0))
    trunk, again = first.batch(ROWS).trunk_1TH, second.batch(ROWS[2:]).trunk_1TH
    assert trunk is not None
    assert again is not None
    assert torch.equal(trunk[0, -again.shape[1] :], again[0])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "qwen3"])
def test_other_families_are_cut_and_packed_alike(family: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

    torch.manual_seed(0)
    config: Any = {
        "gpt2": lambda: GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64
        ),
        "opt": lambda: OPTConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        "gpt_neox": lambda: GPTNeoXConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        "qwen3": lambda: Qwen3Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
        ),
    }[family]()
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, options())
    shaken(backbone)
    got = logprobs(backbone, ROWS, with_adapter=False).detach()
    torch.testing.assert_close(got, one_by_one(model, ROWS), atol=2e-5, rtol=1e-4)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable):
        load_backbone(tmp_path, options())


def test_a_gpu_that_is_not_there_is_named(tiny_model_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelUnusable, match=r"base\.device is cuda"):
        load_backbone(tiny_model_dir, options(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_the_same_and_gradients_arrive_on_the_cpu(tiny_model_dir: Path) -> None:
    from heedful_trainer.reward.model import pooled

    found = []
    for device in ("cpu", "cuda"):
        backbone = shaken(load_backbone(tiny_model_dir, options(device=device)))
        batch = backbone.batch(ROWS)
        hidden = backbone.hidden(batch)
        assert hidden.device.type == device
        logprobs_N = backbone.answer_logprobs(batch, hidden)
        pooled_AH = pooled(hidden, batch.packed)
        (logprobs_N.sum() + pooled_AH.sum()).backward()
        gradients = [parameter.grad for parameter in backbone.adapter.parameters().values()]
        with torch.no_grad():
            kl_N = backbone.answer_kl(batch, hidden, backbone.hidden(batch, with_adapter=False))
        found.append([logprobs_N.detach(), pooled_AH.detach(), kl_N, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert theirs is not None
        assert theirs.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
