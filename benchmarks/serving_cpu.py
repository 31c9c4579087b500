"""Decode throughput on a CPU through gRPC, beside peers on the same model in the same run.

heedful is a real server process and its figures are taken from the client's side of gRPC; peers
run in process, each in an environment of its own (see README.md here), best of their own
defaults. Everything runs one after the other on the same cores. Correctness comes first: if
heedful answers wrongly, or a request's tokens depend on its neighbours, no figure is printed.

Usage: python benchmarks/serving_cpu.py [--peer NAME=PYTHON ...] [--levels 1,8,32] [--rounds 2]
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import heedful
from heedful.bench import BenchConfig, run_bench

HERE = Path(__file__).resolve().parent
PROMPT = "The capital of France is"
NEW_TOKENS = 128
GGUF_PEERS = frozenset({"openvino", "llamacpp"})


@contextmanager
def server(model: str, flags: list[str]) -> Iterator[str]:
    """Run a server on a free port with a store of its own; yield its target once it serves."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        command = [str(Path(sys.executable).parent / "heedful-server"), "serve", "--model", model]
        command += [
            "--set",
            f"grpc.port={target.rpartition(':')[2]}",
            "--set",
            "http.enabled=false",
        ]
        command += ["--set", f"feedback.store_url=sqlite:///{directory}/store.db", *flags]
        log = (Path(directory) / "log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with heedful.Client(target) as client:
                client.wait_ready(120)
            yield target
        finally:
            process.terminate()
            process.wait(30)


def check(target: str) -> None:
    """Raise SystemExit unless the server answers rightly and without regard to neighbours."""
    with heedful.Client(target) as client:
        question = [
            heedful.Message("system", "Answer in one sentence."),
            heedful.Message("user", "What is the capital of France?"),
        ]
        answer = client.generate(question, temperature=0.0, max_tokens=16)
        if "Paris" not in answer.text:
            raise SystemExit(f"wrong answer, no figures: {answer.text!r}")
    asyncio.run(_check_neighbours(target))


async def _check_neighbours(target: str) -> None:
    prompts = [f"Count from {idx} on:" for idx in range(32)]
    async with heedful.AsyncClient(target) as client:

        async def ids(prompt: str) -> tuple[int, ...]:
            reply = await client.generate(prompt, temperature=0.0, max_tokens=32)
            return tuple(reply.completions[0].token_ids)

        together = await asyncio.gather(*(ids(prompt) for prompt in prompts))
        for idx in (0, 7, 31):
            if await ids(prompts[idx]) != together[idx]:
                raise SystemExit(f"tokens depend on neighbours (prompt {idx}), no figures")


def measure(target: str, levels: list[int], rounds: int) -> dict[int, float]:
    """Return tokens/s by concurrency: the best of some rounds after a warm-up, as for peers."""
    figures = {}
    for level in levels:
        config = BenchConfig(
            target=target,
            concurrency=level,
            num_requests=level,
            num_warmup=level,
            prompt_tokens=8,
            output_tokens=NEW_TOKENS,
        )
        reports = [asyncio.run(run_bench(config)) for _ in range(rounds)]
        if any(report.errors for report in reports):
            raise SystemExit(f"errors under load: {[report.errors for report in reports]}")
        figures[level] = max(report.output_tokens_per_s for report in reports)
    return figures


def run_peer(name: str, python: str, model: Path, levels: list[int]) -> dict[str, object]:
    """Run a peer's script in its own environment and return what it printed."""
    script = HERE / "peers" / f"{name}_peer.py"
    command = [python, str(script), str(model), PROMPT, str(NEW_TOKENS)]
    command.append(",".join(map(str, levels)))
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    result: dict[str, object] = json.loads(output.stdout.strip().splitlines()[-1])
    return result


def write_dense_copy(model_dir: Path, target_dir: Path) -> None:
    """Write the bf16 form of the served weights for peers that read no GGUF."""
    import torch
    from heedful_server.model.loader import dequantized_state_dict
    from safetensors.torch import save_file

    state = dequantized_state_dict(model_dir, dtype=torch.bfloat16)
    save_file(state, target_dir / "model.safetensors", metadata={"format": "pt"})
    for path in model_dir.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, target_dir / path.name)


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def print_table(rows: list[dict[str, object]], levels: list[int]) -> None:
    """Print one row a system, and the ratio to the best peer."""
    print("| system | weights | " + " | ".join(f"{level} seq" for level in levels) + " |")
    print("|---|---|" + "---|" * len(levels))
    for row in rows:
        figures = row["tokens_per_s"]
        assert isinstance(figures, dict)
        cells = [f"{figures[str(level)]:.0f}" for level in levels]
        print(f"| {row['peer']} | {row['weights']} | " + " | ".join(cells) + " |")


def ratios(rows: list[dict[str, object]], levels: list[int]) -> dict[str, float]:
    """Return heedful's figure over the best peer's, by concurrency."""
    ours, peers = rows[0]["tokens_per_s"], [row["tokens_per_s"] for row in rows[1:]]
    assert isinstance(ours, dict)
    if not peers:
        return {}
    return {
        str(level): ours[str(level)] / max(peer[str(level)] for peer in peers)  # type: ignore[index]
        for level in levels
    }


def main() -> None:
    """Check, measure, print and write the dated result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--levels", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flag", action="append", default=[], help="passed to heedful-server")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    levels = [int(level) for level in args.levels.split(",")]
    model_dir = Path(args.model)
    if not model_dir.is_dir():
        model_dir = Path.home() / ".heedful" / "models" / args.model
    flags = [part for flag in args.flag for part in flag.split()]
    with server(args.model, flags) as target:
        check(target)
        with heedful.Client(target) as client:
            served_by = client.generate("Hi", max_tokens=1).served_by
        figures = {str(k): v for k, v in measure(target, levels, args.rounds).items()}
    rows: list[dict[str, object]] = [
        {"peer": "heedful (gRPC)", "weights": served_by.quantization, "tokens_per_s": figures}
    ]
    with tempfile.TemporaryDirectory() as directory:
        write_dense_copy(model_dir, Path(directory))
        for peer in args.peer:
            name, _, python = peer.partition("=")
            model = model_dir / "model.gguf" if name in GGUF_PEERS else Path(directory)
            rows.append(run_peer(name, python, model, levels))
    print_table(rows, levels)
    reached = ratios(rows, levels)
    print("ratio to the best peer:", {level: round(ratio, 2) for level, ratio in reached.items()})
    result = {
        "benchmark": "serving_cpu",
        "command": " ".join(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "shape": {"prompt": "short", "new_tokens": NEW_TOKENS, "decoding": "greedy"},
        "rows": rows,
        "ratio_to_best_peer": reached,
    }
    out = args.out or HERE / "results" / f"serving_cpu-{datetime.now(UTC):%Y-%m-%d}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
