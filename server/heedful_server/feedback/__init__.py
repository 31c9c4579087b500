"""Feedback in the server: the log of completions, judgements, comparisons, and their upkeep."""
