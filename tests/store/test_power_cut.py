"""The power fails, the disk breaks, the disk fills: at the level of the system calls.

A preloaded shim records every write and sync of the writer process, its acknowledgements among
them, so that the disk can be rebuilt as it would be after a power cut at any moment: what was
synced is there, of the rest any part.
"""

import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from heedful_store import DatabaseOptions, FeedbackFilter, Store, StoreFull, uuid7

HERE = Path(__file__).parent
HEADER = struct.Struct("<cBQQ")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the shim")
NO_RESERVE = DatabaseOptions(min_free_bytes=0)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "powercut.so"
    assert COMPILER is not None
    source = str(HERE / "powercut.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([COMPILER, *flags, "-o", str(library), source, "-ldl", "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Record:
    kind: str  # w, t, s, u
    name: str
    offset: int
    data: bytes


@dataclass
class Disk:
    """Files as they were last synced, and what was asked for since."""

    synced: dict[str, bytearray] = field(default_factory=dict)
    unsynced: dict[str, list[Record]] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        pending = self.unsynced.setdefault(record.name, [])
        if record.kind == "u":
            self.synced.pop(record.name, None)
            pending.clear()
        elif record.kind == "s":
            content = self.synced.setdefault(record.name, bytearray())
            for earlier in pending:
                change(content, earlier)
            pending.clear()
        else:
            pending.append(record)

    def after_power_cut(self, folder: Path, chance: random.Random | None) -> None:
        """Write the files; of unsynced changes none, or any part that ``chance`` picks."""
        for name in {*self.synced, *self.unsynced} - {"acks"}:
            content = bytearray(self.synced.get(name, b""))
            for record in self.unsynced.get(name, ()):
                if chance is not None and chance.random() < 0.5:
                    change(content, record)
            if not name.endswith("-shm"):
                (folder / name).write_bytes(content)


def change(content: bytearray, record: Record) -> None:
    if record.kind == "t":
        del content[record.offset :]
        content.extend(bytes(record.offset - len(content)))
        return
    content.extend(bytes(max(0, record.offset + len(record.data) - len(content))))
    content[record.offset : record.offset + len(record.data)] = record.data


def records(log: Path) -> Iterator[Record]:
    raw, place = log.read_bytes(), 0
    while place < len(raw):
        kind, name_len, offset, length = HEADER.unpack_from(raw, place)
        place += HEADER.size
        name = raw[place : place + name_len].decode()
        place += name_len
        data = raw[place : place + length] if kind == b"w" else b""
        place += len(data)
        yield Record(kind.decode(), name, offset, data)


def record_run(shim: Path, tmp_path: Path, template: Path, mode: str, count: int) -> Path:
    """Let a child write ``count`` events under the shim; return the log of its system calls."""
    disk, log = tmp_path / "disk", tmp_path / "calls"
    disk.mkdir()
    shutil.copyfile(template, disk / "store.db")
    acks = os.open(disk / "acks", os.O_WRONLY | os.O_CREAT)
    environment = {
        "LD_PRELOAD": str(shim),
        "POWERCUT_DIR": str(disk),
        "POWERCUT_LOG": str(log),
        "CHAOS_ACK_FD": str(acks),
    }
    run_child(f"sqlite:///{disk / 'store.db'}", mode, count, environment, pass_fds=(acks,))
    os.close(acks)
    return log


def run_child(
    url: str, mode: str, count: int, environment: dict[str, str], pass_fds: tuple[int, ...] = ()
) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, str(HERE / "chaos_child.py"), url, mode],
        input="\n".join(uuid7() for _ in range(count)),
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
        pass_fds=pass_fds,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def survivors(folder: Path) -> list[str]:
    """Return what a store finds after the power is back; the database itself must be sound."""
    raw = sqlite3.connect(folder / "store.db")
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    raw.close()
    with Store(f"sqlite:///{folder / 'store.db'}", database=NO_RESERVE) as store:
        return [s.feedback_id for s in store.list_feedback(FeedbackFilter(), limit=99999)]


def lost_events(log: Path, template: Path, folder: Path, cuts: int) -> int:
    """Cut the power at moments spread over a run; return how many acknowledged events were lost.

    Half of the cuts lose everything that was not synced, half a random part of it.
    """
    chance = random.Random(7)
    calls = list(records(log))
    ack_places = [i for i, record in enumerate(calls) if record.name == "acks"]
    moments = {chance.choice(ack_places) for _ in range(cuts)} | {ack_places[-1]}
    disk = Disk(synced={"store.db": bytearray(template.read_bytes())})
    acked: list[str] = []
    lost = 0
    for place, record in enumerate(calls):
        disk.apply(record)
        if record.name == "acks" and record.data.startswith(b"acked"):
            acked.append(record.data.split()[1].decode())
        if place in moments:
            after = folder / f"cut{place}"
            after.mkdir()
            disk.after_power_cut(after, chance if chance.random() < 0.5 else None)
            found = survivors(after)
            assert len(found) == len(set(found))
            lost += len(set(acked) - set(found))
            shutil.rmtree(after)
    assert len(acked) > 100
    return lost


@needs_compiler
def test_a_power_cut_loses_no_acknowledged_event(
    shim: Path, tmp_path: Path, migrated_file: Path
) -> None:
    log = record_run(shim, tmp_path, migrated_file, "full", 1500)
    calls = [(call.kind, call.name) for call in records(log)]
    # The run must be long enough to move the WAL into the database before its end.
    assert ("s", "store.db") in calls[: calls.index(("w", "acks"), len(calls) // 2)]
    assert lost_events(log, migrated_file, tmp_path, cuts=12) == 0


@needs_compiler
def test_the_power_cut_test_notices_a_weaker_synchronous_setting(
    shim: Path, tmp_path: Path, migrated_file: Path
) -> None:
    log = record_run(shim, tmp_path, migrated_file, "normal", 300)
    assert lost_events(log, migrated_file, tmp_path, cuts=4) > 0


@needs_compiler
def test_a_failed_sync_ends_the_writer_and_nothing_false_is_acknowledged(
    shim: Path, sqlite_url: str, tmp_path: Path
) -> None:
    environment = {
        "LD_PRELOAD": str(shim),
        "POWERCUT_DIR": str(tmp_path),
        "POWERCUT_LOG": str(tmp_path.parent / "calls"),
        "POWERCUT_FAIL_SYNC": "9",
    }
    said = run_child(sqlite_url, "unready", 200, environment)
    acked = {line[1] for line in said if line[0] == "acked"}
    failed = {line[1]: line[2] for line in said if line[0] == "failed"}
    assert said[-1] == ["death", "True"]
    assert len(acked) + len(failed) == 200
    assert acked
    assert set(failed.values()) == {"StoreDead"}
    with Store(sqlite_url) as store:
        found = {s.feedback_id for s in store.list_feedback(FeedbackFilter(), limit=999)}
        # The group whose sync failed may or may not be there; its clients retry by id.
        assert acked <= found
        assert store.death is None


@needs_compiler
def test_a_full_disk_refuses_and_recovers_without_reopening(
    shim: Path, sqlite_url: str, tmp_path: Path
) -> None:
    environment = {
        "LD_PRELOAD": str(shim),
        "POWERCUT_DIR": str(tmp_path),
        "POWERCUT_LOG": str(tmp_path.parent / "calls"),
        "POWERCUT_FULL": str(tmp_path / "full"),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", FULL_DISK_SCRIPT, sqlite_url, str(tmp_path / "full")],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert said.split() == ["stored", "StoreFull", "StoreFull", "alive", "stored", "2"]


FULL_DISK_SCRIPT = """
import sys
from pathlib import Path
from heedful_store import *
flag = Path(sys.argv[2])

def log(store):
    payload = CompletionPayload([1] * 9000, [2] * 9000, "p" * 40000, "a")
    answer = Completion(completion_id=uuid7(), scope=Scope(), policy_version="v1",
                        created_at_ms=1, payload=payload)
    try:
        store.append_completion(answer).result()
    except StoreError as error:
        print(type(error).__name__)
    else:
        print("stored")

with Store(sys.argv[1], database=DatabaseOptions(min_free_bytes=0)) as store:
    log(store)
    flag.touch()
    log(store)
    log(store)
    print("dead" if store.death else "alive")
    flag.unlink()
    log(store)
    with store.read() as connection:
        print(connection.exec_driver_sql("SELECT count(*) FROM completion_payloads").scalar())
"""


def test_the_reserve_refuses_answers_but_lets_people_be_forgotten(sqlite_url: str, make) -> None:
    with Store(sqlite_url, database=DatabaseOptions(min_free_bytes=1 << 60)) as store:
        with pytest.raises(StoreFull, match="bytes are free"):
            store.append_completion(make.completion()).result()
        assert store.death is None
        assert store.erase_user("default", "ann").result().scrubbed


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "volume"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_volume_refuses_and_recovers(
    small_volume: Path, migrated_file: Path, make
) -> None:
    path = small_volume / "store.db"
    shutil.copyfile(migrated_file, path)
    ballast = small_volume / "ballast"
    with Store(f"sqlite:///{path}", database=NO_RESERVE) as store:
        store.append_completion(make.completion()).result()
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(4 << 20))
        large = make.completion(payload=make.payload("p" * 100_000))
        for _ in range(2):
            with pytest.raises(StoreFull):
                store.append_completion(large).result()
        assert store.death is None
        ballast.unlink()
        assert store.append_completion(large).result() is True
        assert store.get_completion(large.scope, large.completion_id).payload is not None
