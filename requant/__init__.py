"""Fit a GGUF language model to the memory you have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from requant._version import __version__ as __version__

if TYPE_CHECKING:
    from requant import errors
    from requant.api.arrays import dequantize, quantize
    from requant.api.model import Model, open, verify
    from requant.common.monitor import Progress
    from requant.common.units import format_size
    from requant.conversion.record import Conversion, read_conversion
    from requant.conversion.verification import Verification
    from requant.model.inspection import Inspection
    from requant.planning.frontier import Curve
    from requant.planning.plan import Plan, read_plan
    from requant.scoring.evaluate import Evaluation, read_evaluation
    from requant.scoring.losses import Losses, read_losses
    from requant.scoring.statistics import Statistics

# public name -> the module that it is in
_EXPORTS = {
    **dict.fromkeys(["Model", "open", "verify"], "api.model"),
    **dict.fromkeys(["dequantize", "quantize"], "api.arrays"),
    **dict.fromkeys(["Conversion", "read_conversion"], "conversion.record"),
    "Curve": "planning.frontier",
    **dict.fromkeys(["Evaluation", "read_evaluation"], "scoring.evaluate"),
    "Inspection": "model.inspection",
    **dict.fromkeys(["Losses", "read_losses"], "scoring.losses"),
    **dict.fromkeys(["Plan", "read_plan"], "planning.plan"),
    "Progress": "common.monitor",
    "Statistics": "scoring.statistics",
    "Verification": "conversion.verification",
    "format_size": "common.units",
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
    if name in _EXPORTS:
        return getattr(import_module(f"requant.{_EXPORTS[name]}"), name)
    if name == "errors":
        return import_module("requant.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for whoever completes them."""
    return [*__all__, "__version__"]
