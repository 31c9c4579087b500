"""`heedful bench`: load over gRPC and the figures a client sees.

Owns the options and the table; `heedful.bench` owns load and figures.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from heedful.bench import BenchConfig, BenchReport, Percentiles
from heedful.bench import bench as run
from heedful.cli import sampling
from heedful.cli.connection import TARGET, TargetOption, WaitOption, api_key, ready_client, tls
from heedful.cli.output import ExitCode, errors_as_lines, fail, stderr, to_json, write


def bench(
    target: TargetOption = TARGET,
    wait: WaitOption = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight at any time.")
    ] = 1,
    requests: Annotated[
        int | None,
        typer.Option("--requests", min=1, help="Measured requests; default 4 x concurrency."),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option("--duration", metavar="SECONDS", min=0.001, help="Instead of --requests."),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", min=0, help="Requests before; default concurrency.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Length of the random prompts.")
    ] = 32,
    text: Annotated[
        str | None, typer.Option("--text", help="One user message instead of random prompts.")
    ] = None,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", min=1, help="Tokens of every completion.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    unary: Annotated[bool, typer.Option("--unary", help="Generate instead of streams.")] = False,
    model: sampling.Model = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of prompts and sampling.")] = 0,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Limit for one request.")
    ] = 600.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; '-' prints it.")
    ] = None,
) -> None:
    """Measure throughput and latency: a closed loop of requests over gRPC.

    Ends with code 1 when a request failed.
    """
    config = BenchConfig(
        target=target,
        concurrency=concurrency,
        num_requests=requests,
        duration_s=duration,
        num_warmup=warmup,
        prompt_tokens=prompt_tokens,
        text=text,
        output_tokens=output_tokens,
        temperature=temperature,
        streaming=not unary,
        model=model or "",
        seed=seed,
        timeout_s=timeout,
    )
    if requests is not None and duration is not None:
        raise typer.BadParameter("--requests and --duration exclude each other")
    with ready_client(target, timeout, wait):
        pass
    with errors_as_lines(target), stderr().status("measuring"):
        report = run(config, api_key=api_key(), tls=tls())
    _deliver(report, json_file)
    if report.errors:
        counts = ", ".join(f"{number} x {name}" for name, number in report.errors.items())
        raise fail(f"some requests failed: {counts}", ExitCode.FAILED)


def _deliver(report: BenchReport, json_file: Path | None) -> None:
    if json_file == Path("-"):
        write(to_json(report) + "\n")
        return
    if json_file is not None:
        json_file.write_text(to_json(report) + "\n", encoding="utf-8")
    Console().print(_table(report))


def _table(report: BenchReport) -> Table:
    served_by = report.served_by
    table = Table(
        title=f"{served_by.get('base_model', '?')} {served_by.get('quantization', '')} · "
        f"concurrency {report.config.concurrency} · {report.num_ok} requests in "
        f"{report.wall_s:.2f} s",
        title_justify="left",
    )
    table.add_column("")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    table.add_row("output tokens/s", f"{report.output_tokens_per_s:.1f}")
    table.add_row("total tokens/s", f"{report.total_tokens_per_s:.1f}")
    if report.decode_tokens_per_s is not None:
        table.add_row("decode tokens/s", f"{report.decode_tokens_per_s:.1f}")
    table.add_row("requests/s", f"{report.requests_per_s:.2f}")
    _add_times(table, "first token, ms", report.ttft_ms)
    _add_times(table, "between messages, ms", report.inter_message_ms)
    _add_times(table, "between tokens, ms", report.inter_token_ms)
    _add_times(table, "whole request, ms", report.request_ms)
    table.add_row("client CPU share", f"{report.client_cpu_share:.2f}")
    return table


def _add_times(table: Table, name: str, times: Percentiles | None) -> None:
    if times is None:
        return
    values = (times.mean, times.p50, times.p90, times.p99, times.max)
    table.add_row(name, *(f"{value:.2f}" for value in values))
