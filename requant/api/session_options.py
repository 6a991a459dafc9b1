"""The options of a session beside its request: losses, importance, effort, threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from requant.conversion.options import POLICIES
from requant.formats import Effort
from requant.scoring.losses import Losses


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """Options of scoring and encoding in a session; losses: given as data or as a file, None to measure them.

    no_imatrix: weigh no columns, whatever the plan or the losses point to. compensate: how the encoders of a conversion
    compensate their errors, one of COMPENSATIONS; None for what the plan says, which no_compensate overrules.
    max_memory: bytes that a compensated conversion stays below. effort: None for that of the losses or the plan.
    threads: None for one per processor. nonfinite: of a conversion, its policy for tensors that hold NaN or infinity.
    """

    imatrix: Path | None = None
    no_imatrix: bool = False
    compensate: str | None = None
    no_compensate: bool = False
    max_memory: int | None = None
    losses: Losses | Path | None = None
    threads: int | None = None
    effort: Effort | None = None
    allow_requantize: bool = False
    nonfinite: str = POLICIES[0]
