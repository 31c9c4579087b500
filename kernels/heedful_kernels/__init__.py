"""Kernels: one operation a file, each with a torch reference. Imports torch and triton only."""
