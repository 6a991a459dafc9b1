"""Limits on a plan, and what a tensor takes of them: bytes, time per token, predicted loss."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from requant.common.units import format_size
from requant.errors import UsageError, brief
from requant.formats.base import DEVICE_ALIGNMENT, HOST_ALIGNMENT
from requant.scoring.losses import Losses, TensorLosses

LOSS_UNIT = 1e-12  # nats; a limit on the loss counts in them


@dataclass(frozen=True, slots=True)
class Use:
    """What a tensor of some type takes where it is: bytes, time per token, predicted loss."""

    n_bytes: int
    device: str
    in_ram: bool
    ns: int
    loss: float


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a token takes: what is read of each device over its bandwidth, and `fixed_ns` for all the rest.

    Bandwidths in bytes per second. `slower`: how many times longer than its bytes alone a type takes. `hop_ns`: to the
    CPU and back, for the experts of a layer that are there; a third of it counts for each of their three matrices.
    """

    gpu: float
    cpu: float
    fixed_ns: int = 0
    slower: Mapping[str, float] = field(default_factory=dict)
    hop_ns: int = 0

    def ns(self, n_bytes: int, type_name: str, device: str, share: float) -> int:
        """Nanoseconds per token, rounded up, to read a tensor of which a `share` is used for each token."""
        if device not in ("gpu", "cpu"):
            return 0
        rate = self.gpu if device == "gpu" else self.cpu
        hop = self.hop_ns // 3 if device == "cpu" and 0 < share < 1 else 0
        return math.ceil(1e9 * n_bytes * share * self.slower.get(type_name, 1.0) / rate) + hop


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound: sum of the tensors' costs + `other` <= `budget`, in `unit`s: bytes, ns per token, or LOSS_UNIT nats."""

    option: str  # as the user knows it: --vram, --ram, --size, --bpw, --min-speed, --max-loss
    budget: int
    other: int = 0  # inside the budget, but no tensor: KV cache and buffers, or the header
    device: str = ""  # count only what is held there: gpu, cpu (that is RAM), or all
    alignment: int = 1  # bytes to which every tensor is rounded up
    n_weights: int = 0  # for --bpw: the weights it is over
    unit: str = "bytes"

    @property
    def bpw(self) -> float:
        """The budget in bits per weight, where the limit is over weights."""
        return round(8 * self.budget / max(self.n_weights, 1), 4)

    def cost(self, use: Use) -> int:
        """What a tensor takes of the budget, in the limit's unit."""
        if self.unit == "ns":
            return use.ns
        if self.unit == "loss":
            return math.ceil(use.loss / LOSS_UNIT)
        held = not self.device or (use.in_ram if self.device == "cpu" else use.device == self.device)
        return -(-use.n_bytes // self.alignment) * self.alignment if held else 0

    def show(self, amount: int) -> str:
        """`amount` of its unit, for reading."""
        if self.unit == "ns":
            return f"{1e9 / max(amount, 1):.2f} tokens/s"
        return f"{amount * LOSS_UNIT:.4g} nats" if self.unit == "loss" else format_size(amount)


PART_NAMES = {"kv_cache": "KV cache", "compute": "compute buffer"}  # parts of a limit -> in words


def name_part(part: str, limit: Limit) -> str:
    """What fills a part of a limit, in words: `KV cache` for `kv_cache`."""
    other = {"--size": "header", "--ram": "KV cache and compute buffer"}.get(limit.option, part)
    return (PART_NAMES | {"other": other}).get(part, part)


def vram_limit(budget: int, weights_limit: int) -> Limit:
    """--vram: of `budget` bytes, `weights_limit` are left for weights (negative where the rest alone is over)."""
    return Limit("--vram", budget, budget - weights_limit, device="gpu", alignment=DEVICE_ALIGNMENT)


def ram_limit(budget: int, other: int) -> Limit:
    """--ram: `other` bytes of it are no weights: caches and buffers of what runs on the CPU."""
    return Limit("--ram", budget, other, device="cpu", alignment=HOST_ALIGNMENT)


def speed_limit(tokens_per_second: float, timing: Timing) -> Limit:
    """--min-speed. Raises UsageError unless it is above 0."""
    if not 0 < tokens_per_second <= 1e6:
        raise UsageError(f"--min-speed must be above 0 and at most 1000000 (got {tokens_per_second:g})")
    return Limit("--min-speed", math.floor(1e9 / tokens_per_second), timing.fixed_ns, unit="ns")


def loss_limit(loss: float) -> Limit:
    """--max-loss. Raises UsageError unless it is above 0."""
    if not 0 < loss < 1e3:
        raise UsageError(f"--max-loss must be above 0 and below 1000 (got {loss:g})")
    return Limit("--max-loss", math.floor(loss / LOSS_UNIT), unit="loss")


def size_limit(budget: int, overhead: int, alignment: int = HOST_ALIGNMENT) -> Limit:
    """--size: bytes of the output file; `overhead` is its header up to the data, `alignment` the file's own."""
    return Limit("--size", budget, overhead, alignment=alignment)


def bpw_limit(bpw: float, losses: Losses) -> Limit:
    """--bpw: bits per weight over all tensors of the file. Raises UsageError unless 0 < bpw <= 64."""
    if not 0 < bpw <= 64:
        raise UsageError(f"--bpw must be above 0 and at most 64 (got {bpw:g})")
    n_weights = sum(t.n_weights for t in losses.tensors)
    return Limit("--bpw", math.floor(Fraction(str(bpw)) * n_weights / 8), n_weights=n_weights)


@dataclass(frozen=True, slots=True)
class Constraints:
    """A budget and the request that go with it."""

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


def allowed_devices(tensor: TensorLosses, constraints: Constraints) -> tuple[str, ...]:
    """Where the tensor may be."""
    return constraints.devices.get(tensor.name, ("gpu",) if tensor.on_gpu else ("cpu",))


def _asked(limit: Limit) -> float:
    """The figure of a limit as the user gave it."""
    if limit.n_weights:
        return limit.bpw
    return {"ns": 1e9 / max(limit.budget, 1), "loss": limit.budget * LOSS_UNIT}.get(limit.unit, limit.budget)


@dataclass(frozen=True, slots=True)
class Rule:
    """REGEX=TYPE of the option that said so."""

    option: str
    pattern: str
    type: str

    def __str__(self) -> str:
        return f"{self.option} '{brief(self.pattern)}={self.type}'"


_FILTERS = threading.Lock()  # of warnings, which are the process's


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    try:
        with _FILTERS, warnings.catch_warnings():
            # Python warns where it reads a set in another way than other engines, as in [[:digit:]]
            warnings.simplefilter("error", FutureWarning)
            return re.compile(pattern)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise UsageError(f"{option}: '{brief(pattern)}' is not a regular expression: {error}") from error
