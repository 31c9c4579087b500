"""Decode throughput of transformers' generate, bf16. Runs in any environment with transformers.

Usage: python transformers_peer.py MODEL_DIR PROMPT NEW_TOKENS CONCURRENCY[,CONCURRENCY...]
Prints one JSON object.
"""

import json
import sys
import time

import torch
import transformers


@torch.inference_mode()
def main() -> None:
    """Load once, then time each batch size after a warm-up."""
    path, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    levels = [int(level) for level in sys.argv[4].split(",")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    figures = {}
    for level in levels:
        batch = ids.expand(level, -1).contiguous()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            output = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            seconds.append(time.perf_counter() - started)
        assert output.shape[1] - ids.shape[1] == new_tokens
        figures[level] = level * new_tokens / min(seconds[1:])
    print(
        json.dumps(
            {
                "peer": f"transformers {transformers.__version__} generate",
                "weights": "bf16",
                "tokens_per_s": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
