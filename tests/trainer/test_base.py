"""Which model a run trains on, and that it stays the same one."""

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from heedful_store import Scope, Store
from heedful_trainer.base import Base, find_base
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place, with_overrides


def _never() -> NoReturn:
    raise AssertionError("a stated directory needs no server")


@pytest.fixture
def found(tmp_path: Path, tiny_model_dir: Path, store: Store) -> "Finder":
    return Finder(tmp_path, tiny_model_dir, store)


class Finder:
    """Looks for the base of one run, as often as a test wants."""

    def __init__(self, home: Path, model: Path, store: Store) -> None:
        self._home, self._model, self._store = home, model, store

    def __call__(self, dtype: str) -> Base:
        stated = {"base.directory": str(self._model), "base.base_id": "tiny@1", "base.dtype": dtype}
        config = with_overrides(TrainerConfig(), stated)
        place = Place(self._home, "", "personal")
        run_dir = self._home / "run"
        return find_base(config, place, self._store, Scope("local", "default"), run_dir, _never)


def test_a_note_from_before_types_were_noted_is_understood(found: Finder, tmp_path: Path) -> None:
    begun = found("bfloat16")
    note = tmp_path / "run" / "base.json"
    content = json.loads(note.read_text())
    del content["dtype"]
    note.write_text(json.dumps(content))
    assert found("float32") == begun


def _with_capabilities(monkeypatch: pytest.MonkeyPatch, **capabilities: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


def test_a_processor_without_bf16_trains_in_fp32(
    found: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_capabilities(monkeypatch, avx512_f=True, avx512_bf16=False, amx_bf16=False)
    assert found("auto").dtype == "float32"


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_bf16_trains_in_it(
    found: Finder, monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    _with_capabilities(monkeypatch, **{instructions: True})
    assert found("auto").dtype == "bfloat16"


def test_a_stated_type_is_kept(found: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_capabilities(monkeypatch)
    assert found("bfloat16").dtype == "bfloat16"


def test_a_run_that_goes_on_elsewhere_keeps_its_type(
    found: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_capabilities(monkeypatch, avx512_bf16=True)
    begun = found("auto")
    _with_capabilities(monkeypatch)
    assert found("auto") == begun
