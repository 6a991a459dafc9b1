"""Fit a GGUF language model to the memory you have."""

from typing import Any

__all__ = ["dequantize", "quantize"]


def __getattr__(name: str) -> Any:
    """`__version__`, `quantize` and `dequantize`, looked up when somebody asks: most commands need neither NumPy nor
    importlib.metadata, which takes longer to import than an inspect runs.
    """
    if name in __all__:
        from requant import arrays

        return getattr(arrays, name)
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # run from a checkout
        return "0+unknown"
