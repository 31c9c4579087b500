"""What an export writes loads elsewhere, and is refused where it would not be whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import heedful
import pytest
import torch
from heedful_store import (
    AdapterDamaged,
    NotFound,
    PolicyVersion,
    Scope,
    Store,
    adapter_files,
    migrate,
)
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides
from heedful_trainer.errors import StageFailed
from heedful_trainer.exporting import ExportFormat, export_version, find_scope, find_version
from peft import PeftModel
from transformers import AutoModelForCausalLM

PROMPT = torch.tensor([[5, 17, 40, 99, 7]])


class Published:
    """A store with one version of the tiny model."""

    def __init__(self, home: Path, store: Store, config: TrainerConfig) -> None:
        self.home, self.store, self.config = home, store, config
        self.policy = find_version(store, Scope(), "v1")
        self.adapter = home / self.policy.path

    def export(self, output: Path, format_: ExportFormat) -> None:
        place = Place(self.home, "", "personal")
        export_version(self.policy, output, format_, self.config, place, self.store, _no_server)


def _no_server() -> heedful.Client:
    raise AssertionError("the base is configured: nobody has to be asked")


@pytest.fixture
def published(tmp_path: Path, tiny_model_dir: Path, save_adapter: Callable[..., Path]):
    home = tmp_path / "home"
    path = Path("policies/default/default/v1")
    (home / path).parent.mkdir(parents=True)
    directory = save_adapter(tiny_model_dir).rename(home / path)
    info = {
        "format": 1,
        "role": "policy",
        "base_id": "tiny@1",
        "template_hash": "t",
        "base_model": "tiny",
        "hidden_size": 64,
        "num_layers": 2,
        "run_id": "run",
        "method": "dpo",
    }
    (directory / "heedful.json").write_text(json.dumps(info))
    content_hash = adapter_files.seal(directory)
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    config = with_overrides(
        TrainerConfig(),
        {"base.directory": str(tiny_model_dir), "base.base_id": "tiny@1"},
    )
    with Store(url) as store:
        store.publish_policy(
            PolicyVersion(
                scope=Scope(),
                version="v1",
                content_hash=content_hash,
                base_id="tiny@1",
                template_hash="t",
                path=str(path),
                run_id="run",
            )
        ).result()
        yield Published(home, store, config)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_merged_weights_answer_as_base_and_adapter_do(
    published: Published, tiny_model_dir: Path, tmp_path: Path
) -> None:
    published.export(tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(published.adapter)))
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_adapter_files_are_copied_whole(published: Published, tmp_path: Path) -> None:
    published.export(tmp_path / "peft", "peft")
    assert adapter_files.verify(tmp_path / "peft").content_hash == published.policy.content_hash


def test_nothing_is_overwritten(published: Published, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(StageFailed, match="exists"):
        published.export(tmp_path / "there", "peft")


def test_damaged_versions_are_refused_and_leave_nothing(
    published: Published, tmp_path: Path
) -> None:
    weights = published.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterDamaged, match="adapter_model"):
        published.export(tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_unknown_versions_and_the_base_are_not_found(published: Published) -> None:
    for name in ("v2", "base", "champion"):
        with pytest.raises(NotFound):
            find_version(published.store, Scope(), name)


def test_the_tenant_is_found_unless_several_have_the_project(published: Published) -> None:
    store = published.store
    assert find_scope(store, "", "default") == Scope("default", "default")
    assert find_scope(store, "acme", "default") == Scope("acme", "default")
    with pytest.raises(NotFound, match="project other"):
        find_scope(store, "", "other")
    store.publish_policy(replace(published.policy, scope=Scope("acme", "default"))).result()
    with pytest.raises(StageFailed, match="acme, default have a project default"):
        find_scope(store, "", "default")
