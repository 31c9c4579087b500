"""Tokenizer and chat template without torch. Runs in the server process and in the engine child."""
