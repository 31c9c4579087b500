"""The gate: whether a candidate may become champion, with its evidence."""
