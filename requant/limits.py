"""Limits on a plan, and what a tensor takes of them: bytes, time per token, predicted loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from requant.units import format_size

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


def part_name(part: str, limit: Limit) -> str:
    """What fills a part of a limit, in words: `KV cache` for `kv_cache`."""
    other = {"--size": "header", "--ram": "KV cache and compute buffer"}.get(limit.option, part)
    return {"kv_cache": "KV cache", "compute": "compute buffer", "other": other}.get(part, part)
