"""Adapter directories: whole or refused by the name of the file, visible or not there at all."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from heedful_store import AdapterDamaged, AlreadyExists, ForeignAdapter, adapter_files

BASE = "tiny@0123456789abcdef"
TEMPLATE = "t" * 64


def tensors(**shapes: tuple[int, ...]) -> bytes:
    """A safetensors file of float32 zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def write_adapter(directory: Path, role: str = "policy", **info: object) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    (directory / "adapter_model.safetensors").write_bytes(tensors(a=(2, 3), b=(3, 2)))
    if role == "reward":
        (directory / "reward_heads.safetensors").write_bytes(tensors(weight=(2, 3), bias=(2,)))
    fields = {
        "format": 1,
        "role": role,
        "base_id": BASE,
        "template_hash": TEMPLATE,
        "base_model": "tiny",
        "hidden_size": 3,
        "num_layers": 1,
        "run_id": "run",
        "method": "dpo",
    }
    (directory / "heedful.json").write_text(json.dumps(fields | info))
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", "reward")


FILES = [
    "MANIFEST.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "heedful.json",
    "reward_heads.safetensors",
]


def test_a_sealed_directory_verifies_and_tells_what_it_is(adapter: Path) -> None:
    content_hash = adapter_files.seal(adapter)
    found = adapter_files.verify(adapter, content_hash, base_id=BASE, template_hash=TEMPLATE)
    assert found.content_hash == content_hash
    assert (found.info.role, found.info.hidden_size, found.config["r"]) == ("reward", 3, 2)
    assert sorted([*found.files, "MANIFEST.json"]) == FILES
    sizes = [(adapter / name).stat().st_size for name in found.files]
    assert found.num_bytes == sum(sizes)


def test_sealing_again_gives_the_same_hash_and_other_bytes_give_another(
    adapter: Path, tmp_path: Path
) -> None:
    first = adapter_files.seal(adapter)
    assert adapter_files.seal(adapter) == first
    other = write_adapter(tmp_path / "other", "reward", method="kto")
    assert adapter_files.seal(other) != first


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_link(path: Path) -> None:
    copy = path.parent.parent / f"copy-{path.name}"
    shutil.move(path, copy)
    path.symlink_to(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink, replace_by_link])
@pytest.mark.parametrize("knows_hash", [True, False])
def test_every_damaged_file_is_refused_by_name(
    adapter: Path, name: str, damage: Callable[[Path], None], knows_hash: bool
) -> None:
    content_hash = adapter_files.seal(adapter)
    damage(adapter / name)
    with pytest.raises(AdapterDamaged) as caught:
        adapter_files.verify(adapter, content_hash if knows_hash else None)
    # Half of a manifest's bytes are the hashes of other files; the flip then shows there.
    is_manifest_flip = name == "MANIFEST.json" and damage is flip and not knows_hash
    assert caught.value.file in (FILES if is_manifest_flip else [name])
    assert str(adapter) in str(caught.value)


def test_every_flipped_bit_of_a_manifest_is_noticed_by_its_hash(adapter: Path) -> None:
    content_hash = adapter_files.seal(adapter)
    text = (adapter / "MANIFEST.json").read_bytes()
    for place in range(len(text)):
        damaged = bytearray(text)
        damaged[place] ^= 1 << place % 8
        (adapter / "MANIFEST.json").write_bytes(damaged)
        with pytest.raises(AdapterDamaged):
            adapter_files.verify(adapter, content_hash)


def test_an_added_file_or_folder_is_refused_by_name(adapter: Path) -> None:
    adapter_files.seal(adapter)
    (adapter / "extra.py").write_text("print()")
    with pytest.raises(AdapterDamaged, match=r"extra\.py: is not in the manifest"):
        adapter_files.verify(adapter)
    (adapter / "extra.py").unlink()
    (adapter / "folder").mkdir()
    with pytest.raises(AdapterDamaged, match="folder: is not a plain file"):
        adapter_files.verify(adapter)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterDamaged, match=r"MANIFEST\.json: is missing"):
        adapter_files.verify(tmp_path / "nowhere")


def test_another_base_or_template_is_foreign(adapter: Path) -> None:
    adapter_files.seal(adapter)
    with pytest.raises(ForeignAdapter, match="not for other@1"):
        adapter_files.verify(adapter, base_id="other@1")
    with pytest.raises(ForeignAdapter, match="template"):
        adapter_files.verify(adapter, base_id=BASE, template_hash="u" * 64)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("heedful.json", b'{"format": 2}', "format 1"),
        ("heedful.json", b'{"format": 1, "role": "policy"}', "missing or of another type"),
        ("heedful.json", b"[]", "not a JSON object"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b" " * (1 << 20) + b"{}", "too large"),
        ("adapter_model.safetensors", b"\x00" * 4, "no safetensors header"),
        ("adapter_model.safetensors", b"\xff" * 64, "no safetensors header"),
        ("adapter_model.safetensors", tensors(a=(2, 3))[:-4], "do not fill"),
        ("adapter_model.safetensors", tensors(a=(2, 3)) + b"\x00", "do not fill"),
        ("adapter_model.safetensors", b"\x02" + b"\x00" * 7 + b"[]", "bad safetensors header"),
        (
            "adapter_model.safetensors",
            tensors(a=(2, 3)).replace(b"[2, 3]", b"[3, 3]"),
            "do not fit its shape",
        ),
        ("reward_heads.safetensors", None, "is missing"),
    ],
)
def test_what_is_no_adapter_is_not_sealed(
    adapter: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(content)
    with pytest.raises(AdapterDamaged, match=reason) as caught:
        adapter_files.seal(adapter)
    assert caught.value.file == name
    assert not (adapter / "MANIFEST.json").exists()


def test_a_policy_with_reward_heads_is_refused(tmp_path: Path) -> None:
    policy = write_adapter(tmp_path / "policy")
    shutil.copy(write_adapter(tmp_path / "reward", "reward") / "reward_heads.safetensors", policy)
    with pytest.raises(AdapterDamaged, match="does not belong to a policy"):
        adapter_files.seal(policy)


def test_publishing_twice_is_harmless_and_other_content_is_refused(
    adapter: Path, tmp_path: Path
) -> None:
    content_hash = adapter_files.seal(adapter)
    final = tmp_path / "policies" / "v1"
    again = shutil.copytree(adapter, tmp_path / "again")
    adapter_files.publish(adapter, final)
    assert not adapter.exists()
    adapter_files.publish(again, final)
    assert not again.exists()
    assert adapter_files.verify(final).content_hash == content_hash
    other = write_adapter(tmp_path / "other")
    adapter_files.seal(other)
    with pytest.raises(AlreadyExists, match="something else"):
        adapter_files.publish(other, final)
    assert adapter_files.verify(final).content_hash == content_hash


PUBLISH = """
import sys
from pathlib import Path
from heedful_store import adapter_files
temp, final = map(Path, sys.argv[1:])
adapter_files.seal(temp)
adapter_files.publish(temp, final)
"""


@pytest.mark.parametrize(
    ("place", "visible"), [("before_publish_rename", False), ("after_publish_rename", True)]
)
def test_a_kill_around_the_rename_leaves_all_or_nothing_and_a_retry_ends_it(
    adapter: Path, tmp_path: Path, place: str, visible: bool
) -> None:
    final = tmp_path / "policies" / "v1"

    def run(failpoints: str) -> int:
        command = [sys.executable, "-P", "-c", PUBLISH, str(adapter), str(final)]
        environment = os.environ | {"HEEDFUL_FAILPOINTS": failpoints}
        return subprocess.run(command, env=environment, timeout=30).returncode

    backup = shutil.copytree(adapter, tmp_path / "backup")
    assert run(f"{place}=1:kill") == -signal.SIGKILL
    assert final.exists() is visible
    if visible:
        adapter_files.verify(final)
        shutil.move(backup, adapter)
    assert run("") == 0
    adapter_files.verify(final)
    assert not adapter.exists()
