"""The configuration: order of sources, unknown keys, ranges, binding."""

import tomllib
from pathlib import Path

import pytest
from heedful_server.config import load_config, settings, to_toml
from heedful_server.errors import InvalidConfig


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text("grace_s = 1.5\n[grpc]\nport = 1001\n[http]\nport = 1002\n")
    return path


def test_defaults_listen_on_loopback_only() -> None:
    config = load_config(None, {}, [])
    assert (config.grpc.host, config.grpc.port) == ("127.0.0.1", 50051)
    assert (config.http.host, config.http.port) == ("127.0.0.1", 8080)
    assert config.model.name_or_path == "SmolLM2-135M-Instruct"


def test_command_line_beats_environment_beats_file_beats_default(file: Path) -> None:
    environ = {"HEEDFUL_GRPC__PORT": "2001", "HEEDFUL_HTTP__PORT": "2002"}
    config = load_config(file, environ, [("grpc.port", "3001")])
    assert config.grpc.port == 3001
    assert config.http.port == 2002
    assert config.grace_s == 1.5
    assert config.engine.block_size == 16


def test_last_of_equal_overrides_wins() -> None:
    assert load_config(None, {}, [("grpc.port", "1"), ("grpc.port", "2")]).grpc.port == 2


def test_file_in_the_working_directory_is_read_by_itself(tmp_path: Path) -> None:
    (tmp_path / "heedful.toml").write_text('[log]\nlevel = "debug"\n')
    assert load_config(None, {}, []).log.level == "debug"


def test_home_of_the_user_is_expanded() -> None:
    config = load_config(None, {"HEEDFUL_HOME": "~/models"}, [])
    assert config.home_dir == Path("~/models").expanduser()


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("grpc.prot", "grpc.port"), ("block_size", "engine.block_size"), ("grace", "grace_s")],
)
def test_unknown_key_on_the_command_line_names_the_nearest(path: str, nearest: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"'{path}' .*command line.*did you mean '{nearest}'"):
        load_config(None, {}, [(path, "1")])


def test_unknown_key_in_the_file_names_file_and_nearest(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[engine]\nthread = 2\n")
    with pytest.raises(InvalidConfig, match=r"engine.thread.*x\.toml.*engine\.threads"):
        load_config(path, {}, [])


def test_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(InvalidConfig, match=r"HEEDFUL_GRPC__PROT.*grpc\.port"):
        load_config(None, {"HEEDFUL_GRPC__PROT": "1"}, [])


def test_variables_of_the_client_and_the_tests_are_left_alone() -> None:
    environ = {"HEEDFUL_API_KEY": "k", "HEEDFUL_TEST_POSTGRES_URL": "u", "HEEDFUL_CPU_ISA": "avx2"}
    assert load_config(None, environ, []) == load_config(None, {}, [])


def test_unknown_key_without_a_neighbour_is_still_refused() -> None:
    with pytest.raises(InvalidConfig, match="unknown setting 'zzzzzz'"):
        load_config(None, {}, [("zzzzzz", "1")])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("grpc.port", "65536"),
        ("grpc.port", "many"),
        ("engine.max_sequences", "0"),
        ("stream_interval_s", "nan"),
        ("grpc.write_timeout_s", "inf"),
        ("log.level", "loud"),
        ("engine.prefix_cache", "perhaps"),
    ],
)
def test_value_out_of_range_is_refused_by_name(path: str, value: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"{path}: .*{value}"):
        load_config(None, {}, [(path, value)])


@pytest.mark.parametrize("text", ["grpc = ", "[grpc", "\xff"])
def test_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidConfig, match=r"broken\.toml"):
        load_config(path, {}, [])


def test_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml", {}, [])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
@pytest.mark.parametrize("setting", ["grpc.host", "http.host"])
def test_listening_beyond_loopback_needs_insecure(setting: str, host: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"{setting}.*--insecure"):
        load_config(None, {}, [(setting, host)])
    load_config(None, {}, [(setting, host), ("insecure", "true")])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert load_config(None, {}, [("grpc.host", host)]).grpc.host == host


def test_http_host_counts_for_nothing_where_http_is_off() -> None:
    load_config(None, {}, [("http.host", "0.0.0.0"), ("http.enabled", "false")])


def test_every_setting_has_a_description() -> None:
    described = dict(settings())
    assert len(described) > 20
    assert [path for path, text in described.items() if not text.endswith(".")] == []


def test_shown_configuration_can_be_read_back(tmp_path: Path) -> None:
    config = load_config(None, {}, [("grpc.port", "7"), ("model.name_or_path", 'a "b" \\ ü')])
    path = tmp_path / "shown.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path, {}, []) == config
    assert set(tomllib.loads(to_toml(config))) >= {"home", "grpc", "engine"}


def test_engine_is_told_what_was_configured(tmp_path: Path) -> None:
    overrides = [("engine.threads", "3"), ("model.quantize", "bf16"), ("engine.block_size", "32")]
    told = load_config(None, {}, overrides).engine_config(tmp_path)
    assert (told.num_threads, told.quantize, told.block_size) == (3, "bf16", 32)
    assert told.model_dir == str(tmp_path)


def test_the_trainers_table_and_variables_are_left_to_the_trainer(tmp_path: Path) -> None:
    file = tmp_path / "heedful.toml"
    file.write_text('[trainer.dpo]\nbeta = 0.2\n[deployment]\nmode = "shadow"\n')
    config = load_config(file, {"HEEDFUL_TRAINER__DPO__BETA": "0.1"}, [])
    assert config.deployment.mode == "shadow"
    file.write_text("[trainers]\nbeta = 0.2\n")
    with pytest.raises(InvalidConfig, match="trainers"):
        load_config(file, {}, [])


def test_the_engine_is_told_how_many_adapters_it_may_have(tmp_path: Path) -> None:
    overrides = [("deployment.max_adapters", "3"), ("deployment.max_adapter_rank", "16")]
    told = load_config(None, {}, overrides).engine_config(tmp_path)
    assert (told.max_adapters, told.max_adapter_rank) == (3, 16)
