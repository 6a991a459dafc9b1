"""Options of scoring and of calibration, and the types that are scored by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import UsageError
from requant.formats import Effort

if TYPE_CHECKING:
    from requant.common.cluster import Cluster
    from requant.container.imatrix import Imatrix

# types that every engine runs fast on every device; planning.engines has those that an engine adds
DEFAULT_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """The types to score and how their errors are measured.

    imatrix: the importance by which the encoders weight columns. weigh: without an imatrix, they weight them by the
    mean squares that the model's inputs have in the same run. threads: None for one per processor. cluster: its
    workers encode; the model is run in this process.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    imatrix: Imatrix | None = None
    effort: Effort = Effort.DEFAULT
    allow_requantize: bool = False
    weigh: bool = False
    threads: int | None = None
    cluster: Cluster | None = None


@dataclass(frozen=True, slots=True)
class StatisticsOptions:
    """Options of a calibration.

    gradients: sum them too. max_memory: bytes. threads: None for one per processor. engine: run the model in llama.cpp,
    which has no gradients.
    """

    gradients: bool = True
    max_memory: int | None = None
    threads: int | None = None
    engine: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """The options --text, --tokens, --windows, --window, --quick and --statistics."""

    text: Path | None = None
    tokens: Path | None = None
    n_windows: int | None = 8
    window: int = 512
    quick: bool = False
    statistics: Path | None = None


def check_calibration(asked: CalibrationOptions) -> None:
    """Raise UsageError for options that contradict each other."""
    if asked.text is not None and asked.tokens is not None:
        raise UsageError("--text and --tokens cannot be given together")
    if asked.quick and (asked.text or asked.tokens or asked.statistics):
        raise UsageError("--quick scores without data; leave --text, --tokens and --statistics out")
