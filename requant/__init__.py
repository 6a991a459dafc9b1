"""Fit a GGUF language model to the memory you have."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when somebody asks: importlib.metadata takes longer to import than an inspect runs."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # run from a checkout
        return "0+unknown"
