"""Datasets: what people said, as a snapshot of the log and as examples for each method."""
