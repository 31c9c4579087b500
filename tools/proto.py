"""Generates the Python code of the contract, or checks that the committed code is fresh.

The generator's version (grpcio-tools in pyproject.toml) is the oldest grpcio and protobuf that
users can run, so it is pinned low on purpose.
"""

import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out_dir: Path) -> None:
    """Write the generated modules below out_dir."""
    sources = [str(path) for path in sorted(PROTO_ROOT.glob("heedful_proto/v1/*.proto"))]
    plugins = Path(sys.executable).parent
    includes = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{includes}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out_dir}",
            f"--grpc_python_out={out_dir}",
            f"--mypy_out=quiet:{out_dir}",
            f"--mypy_grpc_out=quiet:{out_dir}",
            *sources,
        ]
    )
    if status != 0:
        raise SystemExit(status)


def drifted(generated: Path) -> list[str]:
    """Return the committed files that differ from the generated ones."""
    committed = PROTO_ROOT / "heedful_proto" / "v1"
    fresh = generated / "heedful_proto" / "v1"
    names = sorted(path.name for path in fresh.iterdir() if path.name.endswith(SUFFIXES))
    return [
        name
        for name in names
        if not (committed / name).is_file()
        or not filecmp.cmp(committed / name, fresh / name, shallow=False)
    ]


def main() -> None:
    """Generate in place, or with --check fail when the committed code is stale."""
    if "--check" not in sys.argv[1:]:
        generate(PROTO_ROOT)
        return
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        stale = drifted(Path(directory))
    if stale:
        raise SystemExit(f"stale generated code, run `make proto`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
