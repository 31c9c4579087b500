"""What importing a package pulls in, and that no folder of ours shadows another's package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL_CODE = ("torch", "transformers", "safetensors", "xgrammar", "triton")


def run_python(code: str, *flags: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("heedful", (*MODEL_CODE, "numpy", "sqlalchemy")),
        ("heedful.cli", (*MODEL_CODE, "numpy", "sqlalchemy")),
        ("heedful_store", MODEL_CODE),
        ("heedful_server.main", MODEL_CODE),
        ("heedful_server.serving", MODEL_CODE),
    ],
)
def test_importing_leaves_heavy_packages_alone(module, unwanted, tmp_path):
    code = f"import sys, {module}; print(*(set({unwanted!r}) & sys.modules.keys()))"
    assert run_python(code, "-P", cwd=tmp_path).split() == []


def test_no_folder_of_the_repository_is_taken_for_another_package():
    # Without -P the root comes first on the path, as for anybody who runs Python there.
    code = (
        "import importlib.util, json\n"
        "names = ('kernels', 'proto', 'server', 'trainer', 'clients')\n"
        "specs = {name: importlib.util.find_spec(name) for name in names}\n"
        "print(json.dumps({name: spec.origin for name, spec in specs.items() if spec}))"
    )
    for origin in json.loads(run_python(code, cwd=ROOT)).values():
        assert origin is None or not Path(origin).is_relative_to(ROOT)


def test_transformers_works_from_the_root_of_the_repository():
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run_python(code, cwd=ROOT).strip() == "LlamaForCausalLM"
