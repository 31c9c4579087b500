"""What importing the client gives and costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import heedful

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "pydantic", "msgspec", "heedful_server"}


def test_all_lists_exactly_what_is_exported():
    tree = ast.parse(Path(heedful.__file__).read_text(encoding="utf-8"))
    imported = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(imported) == sorted(heedful.__all__)
    assert all(hasattr(heedful, name) for name in heedful.__all__)


def test_every_error_is_exported_and_in_the_docstring_of_the_tree():
    errors = {
        name
        for name, value in vars(heedful.errors).items()
        if isinstance(value, type) and issubclass(value, heedful.HeedfulError)
    }
    assert errors <= set(heedful.__all__)
    assert all(name in heedful.errors.__doc__ for name in errors)


def imported_by(statement: str) -> dict[str, object]:
    program = (
        "import json, sys, time\n"
        "started = time.process_time()\n"
        f"{statement}\n"
        "cpu_s = time.process_time() - started\n"
        "print(json.dumps({'cpu_s': cpu_s, 'modules': list(sys.modules)}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_importing_the_client_is_light():
    seen = imported_by("import heedful")
    roots = {name.partition(".")[0] for name in seen["modules"]}
    assert not roots & (HEAVY | {"typer", "rich"})
    # 0.3 s is the promise on a quiet machine; CPU time with a margin does not depend on neighbours.
    assert seen["cpu_s"] < 0.6


def test_importing_the_command_line_pulls_in_no_server():
    seen = imported_by("import heedful.cli")
    roots = {name.partition(".")[0] for name in seen["modules"]}
    assert not roots & HEAVY
