"""Constraints on a plan: limits on bytes, time per token and predicted loss, and rules for the types of tensors."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from requant.common.units import format_size
from requant.errors import UsageError, brief
from requant.formats.base import DEVICE_ALIGNMENT, HOST_ALIGNMENT

if TYPE_CHECKING:
    from requant.planning.plan import Choice
    from requant.scoring.losses import Candidate, Losses, TensorLosses

LOSS_STEP = 1e-12  # of a loss; a loss limit is a whole number of them
_HELD_BY_HOST = ("token_embd", "per_layer_token_embd")  # roles that are always in RAM
_FILTERS = threading.Lock()  # warning filters belong to the whole process
_BRACKETS = re.compile(r"\\.|\[\^?\]?(?:\[:[a-z]+:\]|\\.|[^]\\])*\]", re.DOTALL)  # an escape, or a set with classes
_CLASSES = {  # of POSIX, as std::regex takes them: what stands for them in a set
    **{"digit": "0-9", "d": "0-9", "xdigit": "0-9A-Fa-f", "lower": "a-z", "upper": "A-Z", "alpha": "A-Za-z"},
    **{"alnum": "0-9A-Za-z", "w": "0-9A-Za-z_", "space": r"\s", "s": r"\s", "blank": r" \t"},
    **{"cntrl": r"\x00-\x1f\x7f", "graph": "!-~", "print": " -~", "punct": r"!-/:-@\[-`{-~"},
}


@dataclass(frozen=True, slots=True)
class Use:
    """Memory, time per token and predicted loss of tensors with given types on given devices."""

    n_bytes: int
    device: str
    in_ram: bool
    ns: int
    loss: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Time per token: the bytes read on each device over its bandwidth, and `fixed_ns` for everything else.

    Bandwidths in bytes per second. `slower`: factor by which a type takes longer than its bytes alone. `hop_ns`: one
    trip GPU-CPU-GPU per layer with experts on the CPU; each of its three expert matrices gets a third.
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


def use_of(candidate: Candidate | Choice, device: str, role: str, share: float, timing: Timing | None) -> Use:
    """Memory, time and loss of a tensor that has the candidate's type and is on the device."""
    n_bytes, loss = candidate.n_bytes, candidate.loss
    ns = 0 if timing is None else timing.ns(n_bytes, candidate.type, device, share)
    in_ram = device == "cpu" or (device != "none" and role in _HELD_BY_HOST)
    return Use(n_bytes, device, in_ram, ns, loss)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound: sum of the tensors' costs + `other` <= `budget`, in `unit`s: bytes, ns per token, or LOSS_STEP."""

    option: str  # as the user knows it: --vram, --ram, --size, --bpw, --min-speed, --max-loss
    budget: int
    other: int = 0  # of the budget, used by no tensor: KV cache and buffers, or the header
    device: str = ""  # count only what is held there: gpu, cpu (that is RAM), or all
    alignment: int = 1  # bytes to which every tensor is rounded up
    n_weights: int = 0  # for --bpw: the weights it is over
    unit: str = "bytes"

    @property
    def bpw(self) -> float:
        """The budget in bits per weight, where the limit is over weights."""
        return round(8 * self.budget / max(self.n_weights, 1), 4)

    @property
    def room(self) -> int:
        """The rest of the budget, for tensors, in the limit's unit."""
        return self.budget - self.other

    def cost(self, use: Use) -> int:
        """The part of the budget that a tensor takes, in the limit's unit."""
        if self.unit == "ns":
            return use.ns
        if self.unit == "loss":
            return math.ceil(use.loss / LOSS_STEP)
        held = not self.device or (use.in_ram if self.device == "cpu" else use.device == self.device)
        return -(-use.n_bytes // self.alignment) * self.alignment if held else 0

    def show(self, amount: int, loss_unit: str | None) -> str:
        """`amount` of the limit's unit as text; loss_unit: that of the losses."""
        if self.unit == "ns":
            return f"{1e9 / max(amount, 1):.2f} tokens/s"
        return f"{amount * LOSS_STEP:.4g} {loss_unit or ''}".rstrip() if self.unit == "loss" else format_size(amount)

    def given(self) -> float:
        """The budget as the user gave it: bits per weight, tokens per second, loss or bytes."""
        if self.n_weights:
            return self.bpw
        return {"ns": 1e9 / max(self.budget, 1), "loss": self.budget * LOSS_STEP}.get(self.unit, self.budget)


PART_NAMES = {"kv_cache": "KV cache", "compute": "compute buffer"}  # parts of a limit -> in words


def name_part(part: str, limit: Limit) -> str:
    """The name of a part of a limit for the user: `KV cache` for `kv_cache`."""
    other = {"--size": "header", "--ram": "KV cache and compute buffer"}.get(limit.option, part)
    return (PART_NAMES | {"other": other}).get(part, part)


def vram_limit(budget: int, weights_limit: int) -> Limit:
    """--vram: of `budget` bytes, `weights_limit` are left for weights (negative where the rest alone is over)."""
    return Limit("--vram", budget, budget - weights_limit, device="gpu", alignment=DEVICE_ALIGNMENT)


def ram_limit(budget: int, other: int) -> Limit:
    """--ram: `other` bytes of it are no weights: caches and buffers of what runs on the CPU."""
    return Limit("--ram", budget, other, device="cpu", alignment=HOST_ALIGNMENT)


def size_limit(budget: int, overhead: int, alignment: int = HOST_ALIGNMENT) -> Limit:
    """--size: bytes of the output file; `overhead` is its header up to the data, `alignment` the file's own."""
    return Limit("--size", budget, overhead, alignment=alignment)


def bpw_limit(bpw: float, losses: Losses) -> Limit:
    """--bpw: bits per weight over all tensors of the file. Raises UsageError unless 0 < bpw <= 64."""
    if not 0 < bpw <= 64:
        raise UsageError(f"--bpw must be above 0 and at most 64 (got {bpw:g})")
    n_weights = sum(t.n_weights for t in losses.tensors)
    return Limit("--bpw", math.floor(Fraction(str(bpw)) * n_weights / 8), n_weights=n_weights)


def speed_limit(tokens_per_second: float, timing: Timing) -> Limit:
    """--min-speed. Raises UsageError unless it is above 0."""
    if not 0 < tokens_per_second <= 1e6:
        raise UsageError(f"--min-speed must be above 0 and at most 1000000 (got {tokens_per_second:g})")
    return Limit("--min-speed", math.floor(1e9 / tokens_per_second), timing.fixed_ns, unit="ns")


def loss_limit(loss: float, cache_loss: float = 0.0) -> Limit:
    """--max-loss; `cache_loss` of it is the KV cache's. Raises UsageError unless it is above 0."""
    if not 0 < loss < 1e3:
        raise UsageError(f"--max-loss must be above 0 and below 1000 (got {loss:g})")
    return Limit("--max-loss", math.floor(loss / LOSS_STEP), math.ceil(cache_loss / LOSS_STEP), unit="loss")


@dataclass(frozen=True, slots=True)
class Rule:
    """REGEX=TYPE and the option that gave it."""

    option: str
    pattern: str
    type: str

    def __str__(self) -> str:
        return f"{self.option} '{brief(self.pattern)}={self.type}'"


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """Compile the regular expression that an option gives. Raises UsageError."""
    try:
        with _FILTERS, warnings.catch_warnings():
            # Python only warns of sets within sets, which it reads unlike other engines; refuse them
            warnings.simplefilter("error", FutureWarning)
            return re.compile(_spell_out_classes(pattern))
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise UsageError(f"{option}: '{brief(pattern)}' is not a regular expression: {error}") from error


def _spell_out_classes(pattern: str) -> str:
    """Return the expression with the classes of POSIX, `[[:digit:]]`, as Python spells them; others are left in."""

    def spell_out(brackets: re.Match[str]) -> str:
        inside = re.sub(r"\[:([a-z]+):\]", lambda name: _CLASSES.get(name[1], name[0]), brackets[0][1:])
        return brackets[0][0] + inside

    return _BRACKETS.sub(spell_out, pattern)


@dataclass(frozen=True, slots=True)
class Constraints:
    """Limits on a plan, rules for its types, devices for its tensors, and the objective."""

    limits: tuple[Limit, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)  # component -> bytes in VRAM beside the weights
    pins: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = ()
    groups: tuple[str, ...] = ()
    types: tuple[str, ...] = ()  # empty: all that were scored
    odd_rows: frozenset[str] = frozenset()  # types that only rows get which no super-block divides
    output_type: str | None = None
    embedding_type: str | None = None
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> where it may be; else as scored
    units: Mapping[str, str] = field(default_factory=dict)  # tensor -> group that shares its device, where it may vary
    shares: Mapping[str, float] = field(default_factory=dict)  # tensor -> the share read for each token, else 1
    unusable: Mapping[str, frozenset[str]] = field(default_factory=dict)  # device -> types that do not run there
    not_on_cpu: frozenset[str] = frozenset()  # types that the CPU does not multiply with, because they are slow there
    largest_on_cpu: int | None = None  # bytes; no tensor there is larger
    timing: Timing | None = None
    price: float = 0.0  # loss that a second per token is worth
    objective: str = "loss"  # minimize loss (with the price of time), bytes, or weights not of type `preferred`
    preferred: str = ""

    def allowed_devices(self, tensor: TensorLosses) -> tuple[str, ...]:
        """The devices where the tensor may be."""
        return self.devices.get(tensor.name, ("gpu",) if tensor.on_gpu else ("cpu",))

    def share(self, tensor: TensorLosses) -> float:
        """The share of the tensor that is read for each token."""
        return self.shares.get(tensor.name, 1.0)

    def can_run(self, tensor: TensorLosses, type_name: str, device: str) -> bool:
        """Return whether the engine runs the tensor in that type on the device; copied tensors run anywhere."""
        if tensor.reason is not None:
            return True
        slow = device == "cpu" and type_name in self.not_on_cpu and type_name != tensor.source_type
        return type_name not in self.unusable.get(device, ()) and not (slow and self.share(tensor) > 0)

    def use(self, tensor: TensorLosses, candidate: Candidate, device: str) -> Use:
        """Memory, time and loss of the tensor as `candidate` on the device."""
        return use_of(candidate, device, tensor.role, self.share(tensor), self.timing)

    def value(self, use: Use) -> float:
        """The contribution of tensors to what is minimized: bytes, or loss and the price of their time."""
        return float(use.n_bytes) if self.objective == "bytes" else use.loss + self._time_cost(use.ns)

    @property
    def given_rules(self) -> list[str]:
        """The options that were given and limit the types."""
        given = (
            *(rule.option for rule in (*self.pins, *self.floors)),
            *(["--types"] if self.types else []),
            *(["--output-tensor-type"] if self.output_type else []),
            *(["--token-embedding-type"] if self.embedding_type else []),
        )
        return list(dict.fromkeys(given))

    @property
    def fixed_cost(self) -> float:
        """The price of the time per token that no choice of types changes."""
        return 0.0 if self.timing is None else self._time_cost(self.timing.fixed_ns)

    def _time_cost(self, ns: int) -> float:
        return self.price * 1e-9 * ns

    def describe(self) -> dict[str, Any]:
        """The request in the user's words for the plan's file; only what was given."""
        given = {
            **{x.option.removeprefix("--").replace("-", "_"): x.given() for x in self.limits},
            "tensor_type": [f"{r.pattern}={r.type}" for r in self.pins],
            "min_type": [f"{r.pattern}={r.type}" for r in self.floors],
            "group": list(self.groups),
            "types": list(self.types),
            "output_tensor_type": self.output_type,
            "token_embedding_type": self.embedding_type,
        }
        return {key: value for key, value in given.items() if value}
