"""`make gpu` on a machine without a GPU, and what it makes of test outcomes."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heedful_gpu", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_rows

        yield gpu_rows
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_ends_at_once_and_writes_nothing(tmp_path: Path) -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    done = subprocess.run(
        [sys.executable, "-P", str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out.json").exists()
    assert sorted((BENCHMARKS / "results").iterdir()) == before


def test_outcomes_are_counted_by_file_and_broken_files_count_as_failed(program: ModuleType) -> None:
    text = """
tests/kernels/test_sample.py::test_one[a] PASSED                         [  1%]
tests/kernels/test_sample.py::test_two FAILED                            [  2%]
tests/kernels/test_lora.py::test_three PASSED                            [  3%]
tests/kernels/test_lora.py::test_four SKIPPED (there is no GPU)          [  4%]
ERROR tests/server/model/test_cuda_decoder.py - ModuleNotFoundError: No module named 'msgspec'
"""
    assert program.count_outcomes(text) == {
        "test_sample": [1, 1],
        "test_lora": [1, 0],
        "test_cuda_decoder": [0, 1],
    }


def test_a_figure_is_withheld_unless_its_tests_passed(rows: ModuleType) -> None:
    outcomes = {"test_sample": [5, 1], "test_lora": [3, 0]}
    assert rows.why_withheld(("test_lora",), outcomes) == ""
    assert "1 of test_sample failed" in rows.why_withheld(("test_lora", "test_sample"), outcomes)
    assert "did not run" in rows.why_withheld(("test_lora", "test_rmsnorm"), outcomes)
    for topic in rows.TOPICS:
        (row,) = rows.measure_all({}, [topic], 0.0)
        assert row["figure"] is None
        assert str(row["withheld"]).startswith("withheld")


def test_tests_that_figures_rest_on_exist(rows: ModuleType, program: ModuleType) -> None:
    known = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name for tests, _ in rows.TOPICS.values() for name in tests} <= known
    assert all((ROOT / path).exists() for path in program.TESTS)


def test_ratios_say_how_much_better_than_the_best_peer(rows: ModuleType) -> None:
    row = rows.common.Row
    faster = row("a", "", "µs", 10.0, 8.0, {"x": 30.0, "y": 20.0, "z": "absent (z)"})
    assert faster.ratio == pytest.approx(2.0)
    assert row("a", "", "tokens/s", 10.0, 20.0, {"x": 5.0}, rises=True).ratio == pytest.approx(2.0)
    assert row("a", "", "tokens/s", 10.0, 20.0, rises=True).ratio == pytest.approx(0.5)
    assert row("a", "", "µs", 10.0, 8.0, {"z": "absent (z)"}).ratio == pytest.approx(0.8)
    assert row("a", "", "µs", withheld="failed").ratio is None
