"""The trainer's settings: order of the sources, one file with the server, errors that help."""

from pathlib import Path

import pytest
from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import load, settings, with_overrides
from heedful_trainer.errors import InvalidConfig

FILE = """
home = "/srv/heedful"
[grpc]
host = "0.0.0.0"
[feedback]
store_url = "postgresql://db/heedful"
[trainer]
method = "kto"
[trainer.dpo]
beta = 0.3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "heedful.toml"
    path.write_text(FILE)
    return path


def test_command_line_beats_environment_beats_file(file: Path) -> None:
    environ = {"HEEDFUL_TRAINER__METHOD": "sft", "HEEDFUL_TRAINER__DPO__BETA": "0.2"}
    loaded = load(file, environ, [("dpo.beta", "0.1")])
    assert (loaded.trainer.method, loaded.trainer.dpo.beta) == ("sft", 0.1)
    assert load(file, {}).trainer.dpo.beta == 0.3


def test_home_store_and_profile_are_the_servers(file: Path) -> None:
    place = load(file, {}).place
    assert str(place.home) == "/srv/heedful"
    assert place.store_url == "postgresql://db/heedful"
    assert place.profile == "team"
    assert load(file, {"HEEDFUL_FEEDBACK__PROFILE": "public"}).place.profile == "public"


def test_without_a_file_it_is_personal_and_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(None, {}, home=tmp_path)
    assert loaded.trainer == TrainerConfig()
    assert loaded.place.store_url == f"sqlite:///{tmp_path / 'heedful.db'}"
    assert loaded.place.profile == "personal"


def test_a_misspelt_key_names_the_nearest(file: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"dpo\.betta.*did you mean 'dpo\.beta'"):
        load(file, {}, [("dpo.betta", "1")])


def test_a_bad_value_is_named_with_its_path(file: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"trainer\.dpo\.beta.*greater than 0"):
        load(file, {}, [("dpo.beta", "-1")])
    with pytest.raises(InvalidConfig, match="held-out shares"):
        load(file, {}, [("dataset.gate_share", "0.9")])


def test_a_run_changes_the_processs_settings() -> None:
    changed = with_overrides(TrainerConfig(), {"dpo.beta": "0.5", "run.seed": "7"})
    assert (changed.dpo.beta, changed.run.seed) == (0.5, 7)
    assert changed.kto == TrainerConfig().kto


def test_every_setting_is_described() -> None:
    ours = {name: text for name, text in settings() if not name.startswith("gate.")}
    assert all(ours.values())
