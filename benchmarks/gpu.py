"""Tests and measures the Triton kernels and the CUDA decoder on a machine with a GPU: `make gpu`.

Owns the order (wheels, tests, figures, table), the budget of ten minutes and the result file. Each
figure is withheld unless the tests of what it measures passed in this very run. Needs no network:
packages that are missing are taken from a folder of wheels. The figures' code is in gpu_rows/.

    python benchmarks/gpu.py [--wheels wheels] [--only decode,sample] [--skip-tests] [--minutes 10]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = [ROOT / name for name in ("proto", "kernels", "server")]
EXTRA = ROOT / ".gpu-packages"
TESTS = ("tests/kernels", "tests/server/model/test_cuda_decoder.py",
         "tests/server/model/test_cuda_deterministic.py",
         "tests/server/engine/test_draws.py")  # fmt: skip
NO_DEVICE = 2
# The tests may take this share of the time, the figures get the rest.
TEST_SHARE = 0.5
_LINE = re.compile(r"^(tests/\S+?)::.*\b(PASSED|FAILED|ERROR)\b")


def install_wheels(folder: Path) -> list[str]:
    """Install wheels whose package is missing here; return their names."""
    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.split("-")[0]
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    if missing:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", str(EXTRA), *map(str, missing)], check=True)
    return [wheel.name for wheel in missing]


def run_tests(seconds: float) -> dict[str, list[int]]:
    """Run the tests that need a GPU; [passed, failed] of every file, as far as they got."""
    command = [
        sys.executable, "-P", "-m", "pytest", "-c", str(HERE / "gpu_rows" / "pytest.ini"),
        "--rootdir", str(ROOT), "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", *TESTS,
    ]  # fmt: skip
    paths = [*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH", "")]), str(EXTRA)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    log = HERE / "results" / "gpu-tests.log"
    with log.open("w") as output:
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"the tests were cut off after {seconds:.0f} s", flush=True)
    return count_outcomes(log.read_text(errors="replace"))


def count_outcomes(text: str) -> dict[str, list[int]]:
    """[passed, failed] by file, from pytest's verbose output."""
    counts: dict[str, list[int]] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found:
            number = counts.setdefault(Path(found[1]).stem, [0, 0])
            number[found[2] != "PASSED"] += 1
        elif line.startswith("ERROR tests/"):
            # A file that could not be collected.
            path = line.removeprefix("ERROR ").split(" ")[0].split("::")[0]
            counts.setdefault(Path(path).stem, [0, 0])[1] += 1
    return counts


def print_table(rows: list[dict[str, object]]) -> None:
    """Floor, figure, peers and ratio of every row."""
    print("\n| what | shape | floor | figure | unit | peers | ratio | target |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        peers = row["peers"]
        assert isinstance(peers, dict)
        shown = ", ".join(f"{name} {_number(value)}" for name, value in peers.items())
        cells = [row["what"], row["shape"], _number(row["floor"]),
                 row["withheld"] or _number(row["figure"]), row["unit"], shown or "none",
                 _number(row["ratio"]), row["target"]]  # fmt: skip
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--only", default="", help="topics, separated by commas")
    parser.add_argument("--skip-tests", action="store_true", help="then every figure is withheld")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


def main() -> None:
    """Check for a device, test, measure, print and write the dated result."""
    given, started_s = parse(), time.monotonic()
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed for this Python: nothing was measured")
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use: nothing was tested or measured", file=sys.stderr)
        sys.exit(NO_DEVICE)
    installed = install_wheels(given.wheels)
    sys.path[:0] = [str(path) for path in SOURCES]
    sys.path.append(str(EXTRA))
    seconds = given.minutes * 60
    outcomes = {} if given.skip_tests else run_tests(seconds * TEST_SHARE)
    for name, (passed, failed) in sorted(outcomes.items()):
        print(f"{name}: {passed} passed, {failed} failed", flush=True)
    # Imported now, because it needs the sources and wheels.
    from gpu_rows import measure_all, measured_device

    chosen = [name for name in given.only.split(",") if name]
    rows = measure_all(outcomes, chosen, started_s + seconds - 20)
    print_table(rows)
    device = measured_device()
    result = {
        "benchmark": "gpu",
        "command": " ".join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "wheels": installed,
        "tests": outcomes,
        "rows": rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", str(device["name"]).lower()).strip("-")
    out = given.out or HERE / "results" / f"{slug}-{datetime.now(UTC):%Y-%m-%d}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out} after {time.monotonic() - started_s:.0f} s")


if __name__ == "__main__":
    main()
