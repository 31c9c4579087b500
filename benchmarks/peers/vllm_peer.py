"""Decode throughput of vLLM on a CPU, bf16. Runs in an environment of its own.

Usage: python vllm_peer.py MODEL_DIR PROMPT NEW_TOKENS CONCURRENCY[,CONCURRENCY...]
Prints one JSON object as its last line.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm


def main() -> None:
    """Load once, then time each concurrency after a warm-up."""
    path, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    levels = [int(level) for level in sys.argv[4].split(",")]
    engine = vllm.LLM(model=path, dtype="bfloat16", max_model_len=512, max_num_seqs=max(levels))
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    figures = {}
    for level in levels:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            outputs = engine.generate([prompt] * level, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        figures[level] = level * new_tokens / min(seconds[1:])
    print(
        json.dumps(
            {"peer": f"vLLM {vllm.__version__} (CPU)", "weights": "bf16", "tokens_per_s": figures}
        )
    )


if __name__ == "__main__":
    main()
