"""Answers that the policy under training gave: drawn by the running server, stored before use."""
