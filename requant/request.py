"""A budget and the wishes that go with it, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from requant.errors import brief
from requant.limits import LOSS_UNIT, Limit, Timing
from requant.plan import TensorLosses


@dataclass(frozen=True, slots=True)
class Rule:
    """REGEX=TYPE of the option that said so."""

    option: str
    pattern: str
    type: str

    def __str__(self) -> str:
        return f"{self.option} '{brief(self.pattern)}={self.type}'"


@dataclass(frozen=True, slots=True)
class Request:
    """A budget and the wishes that go with it."""

    limits: tuple[Limit, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)  # component -> bytes in VRAM beside the weights
    pins: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = ()
    groups: tuple[str, ...] = ()
    types: tuple[str, ...] = ()  # empty: all that were scored
    output_type: str | None = None
    embedding_type: str | None = None
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> where it may be; else as scored
    units: Mapping[str, str] = field(default_factory=dict)  # tensor -> what it is placed with, if it may be anywhere
    shares: Mapping[str, float] = field(default_factory=dict)  # tensor -> the share read for each token, else 1
    unusable: Mapping[str, frozenset[str]] = field(default_factory=dict)  # device -> types that do not run there
    largest_on_cpu: int | None = None  # bytes; no tensor there is larger
    timing: Timing | None = None
    price: float = 0.0  # loss that a second per token is worth
    objective: str = "loss"  # what is least: loss (with the price of time), bytes, or weights not of `preferred`
    preferred: str = ""

    def describe(self) -> dict[str, Any]:
        """What was asked for, for the plan's file; only what was given."""
        asked = {
            **{x.option.removeprefix("--").replace("-", "_"): _asked(x) for x in self.limits},
            "tensor_type": [f"{r.pattern}={r.type}" for r in self.pins],
            "min_type": [f"{r.pattern}={r.type}" for r in self.floors],
            "group": list(self.groups),
            "types": list(self.types),
            "output_tensor_type": self.output_type,
            "token_embedding_type": self.embedding_type,
        }
        return {key: value for key, value in asked.items() if value}


def devices_of(tensor: TensorLosses, request: Request) -> tuple[str, ...]:
    """Where the tensor may be."""
    return request.devices.get(tensor.name, ("gpu",) if tensor.on_gpu else ("cpu",))


def _asked(limit: Limit) -> float:
    """The figure of a limit as the user gave it."""
    if limit.n_weights:
        return limit.bpw
    return {"ns": 1e9 / max(limit.budget, 1), "loss": limit.budget * LOSS_UNIT}.get(limit.unit, limit.budget)
