"""Fit a GGUF language model to the memory you have."""
