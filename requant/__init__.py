"""Fit a GGUF language model to the memory you have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the only place that says so: pyproject.toml reads it here

if TYPE_CHECKING:
    from requant import errors
    from requant.api import Model, open, verify
    from requant.arrays import dequantize, quantize
    from requant.conversion import Conversion, read_conversion
    from requant.evaluate import Evaluation, read_evaluation
    from requant.frontier import Curve
    from requant.plan import Losses, Plan, read_losses, read_plan
    from requant.report.inspect import Inspection
    from requant.statistics import Statistics
    from requant.teller import Progress
    from requant.units import format_size
    from requant.verification import Verification

# name -> the room that it is in
_ROOMS = {
    **dict.fromkeys(["Model", "open", "verify"], "api"),
    **dict.fromkeys(["dequantize", "quantize"], "arrays"),
    **dict.fromkeys(["Conversion", "read_conversion"], "conversion"),
    **dict.fromkeys(["Losses", "Plan", "read_losses", "read_plan"], "plan"),
    "Curve": "frontier",
    **dict.fromkeys(["Evaluation", "read_evaluation"], "evaluate"),
    "Inspection": "report.inspect",
    "Progress": "teller",
    "Statistics": "statistics",
    "Verification": "verification",
    "format_size": "units",
}
__all__ = [
    "Conversion",
    "Curve",
    "Evaluation",
    "Inspection",
    "Losses",
    "Model",
    "Plan",
    "Progress",
    "Statistics",
    "Verification",
    "dequantize",
    "errors",
    "format_size",
    "open",
    "quantize",
    "read_conversion",
    "read_evaluation",
    "read_losses",
    "read_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, looked up when somebody asks: most commands need no NumPy."""
    if name in _ROOMS:
        return getattr(import_module(f"requant.{_ROOMS[name]}"), name)
    if name == "errors":
        return import_module("requant.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for whoever completes them."""
    return [*__all__, "__version__"]
