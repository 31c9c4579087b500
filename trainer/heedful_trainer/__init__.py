"""The background trainer: turns the log of feedback into reward models and policies."""
