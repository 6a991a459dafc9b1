"""Fit a GGUF language model to the memory you have."""

from typing import Any

__all__ = ["dequantize", "quantize"]
__version__ = "0.1.0"  # the only place that says so: pyproject.toml reads it here


def __getattr__(name: str) -> Any:
    """`quantize` and `dequantize`, looked up when somebody asks: most commands need no NumPy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from requant import arrays

    return getattr(arrays, name)
