"""Decode throughput of llama.cpp (xllamacpp, in process). Runs in an environment of its own.

Usage: python llamacpp_peer.py MODEL.gguf PROMPT NEW_TOKENS CONCURRENCY[,CONCURRENCY...]
Prints one JSON object.
"""

import importlib.metadata
import json
import os
import sys
import threading
import time

import xllamacpp


def run(server: xllamacpp.Server, prompt: str, new_tokens: int, level: int) -> float:
    """Return the seconds that level simultaneous completions take."""
    counts = [0] * level

    def complete(idx: int) -> None:
        reply = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )
        counts[idx] = reply["usage"]["completion_tokens"]

    threads = [threading.Thread(target=complete, args=(idx,)) for idx in range(level)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert counts == [new_tokens] * level, counts
    return seconds


def main() -> None:
    """Load once with room for the largest concurrency, then time each after a warm-up."""
    path, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    levels = [int(level) for level in sys.argv[4].split(",")]
    figures = {}
    for level in levels:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_parallel = level
        params.n_ctx = 512 * level
        params.cpuparams.n_threads = os.cpu_count()
        params.cpuparams_batch.n_threads = os.cpu_count()
        params.warmup = True
        server = xllamacpp.Server(params)
        seconds = [run(server, prompt, new_tokens, level) for _ in range(3)]
        figures[level] = level * new_tokens / min(seconds[1:])
        del server
    print(
        json.dumps(
            {
                "peer": f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})",
                "weights": "GGUF Q4_1/Q8_0",
                "tokens_per_s": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
