"""Decode throughput of OpenVINO GenAI on a GGUF file. Runs in an environment of its own.

Usage: python openvino_peer.py MODEL.gguf PROMPT NEW_TOKENS CONCURRENCY[,CONCURRENCY...]
Prints one JSON object.
"""

import json
import sys
import time

import openvino_genai


def main() -> None:
    """Load once, then time each concurrency after a warm-up."""
    path, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    levels = [int(level) for level in sys.argv[4].split(",")]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = max(levels)
    scheduler.max_num_batched_tokens = 512
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.LLMPipeline(path, "CPU", scheduler_config=scheduler)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    figures = {}
    for level in levels:
        prompts = [prompt] * level
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            result = pipeline.generate(prompts, config)
            seconds.append(time.perf_counter() - started)
        assert len(result.texts) == level
        figures[level] = level * new_tokens / min(seconds[1:])
    print(
        json.dumps(
            {
                "peer": f"OpenVINO GenAI {openvino_genai.__version__}",
                "weights": "GGUF Q4_1/Q8_0",
                "tokens_per_s": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
