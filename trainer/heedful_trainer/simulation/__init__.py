"""Simulated raters with stated tastes, always labelled as simulated, to watch the loop at work."""
