"""Losses and Plan: what scoring found and what was chosen, as data and as JSON that a person can edit.

Reading is strict: an unknown key, a wrong type, a figure that is not finite or an n_bytes that its type and shape do
not give is a BadInput which names the place. Sizes are bytes, losses nats (predicted KL) unless the method says other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from requant.errors import BadInput, InfeasibleBudget, printable
from requant.formats import Effort, by_name
from requant.records import dump, parse, plain, read_text, record, value_of
from requant.units import format_size

LOSSES_SCHEMA = "requant.losses/1"
PLAN_SCHEMA = "requant.plan/1"
IN_NATS = ("fisher", "kfac")  # methods whose losses are predicted KL divergence, in nats per token
EDITED = "the plan was edited after solving: the predicted loss and the gap are not known"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A type that a tensor could have: its size and the predicted harm."""

    type: str
    n_bytes: int
    loss: float
    rmse: float = 0.0  # relative to the tensor's root mean square
    loss_error: float = 0.0  # standard error of loss, where rows were sampled


@dataclass(frozen=True, slots=True)
class TensorLosses:
    """One tensor of the source and its candidates, the source's own type (a copy, loss 0) among them."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]  # ggml order, shape[0] is n_per_row
    source_type: str
    n_bytes: int  # in the source
    on_gpu: bool  # counts against VRAM
    reason: str | None  # why it must stay as it is, or None
    candidates: tuple[Candidate, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # type -> why it is not a candidate

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Losses:
    """Every tensor of one source with the loss of every candidate, in file order."""

    source: str  # file name, no folder
    header_sha256: str
    arch: str
    method: str  # fisher, kfac (both in nats), cfix, dfix
    imatrix: str | None
    imatrix_sha256: str | None
    tensors: tuple[TensorLosses, ...]
    notes: tuple[str, ...] = ()
    effort: Effort = Effort.DEFAULT  # of the encoders whose errors were measured

    def to_json(self) -> str:
        """The file's text: ASCII, one candidate a line, the same for the same losses."""
        return dump({"schema": LOSSES_SCHEMA} | plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "losses.json") -> Losses:
        """The losses in `text`; `path` is what BadInput names."""
        losses: Losses = record(cls, parse(text, LOSSES_SCHEMA, path), "", path)
        _check_unique((t.name for t in losses.tensors), path)
        for index, tensor in enumerate(losses.tensors):
            _check_tensor(tensor, f"tensors[{index}]", path)
        return losses


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on bytes: sum of the tensors' costs + `other` <= `budget`."""

    option: str  # as the user knows it: --vram, --size, --bpw
    budget: int
    other: int = 0  # bytes inside the budget that are no tensor: KV cache and buffers, or the header
    gpu_only: bool = False  # count only tensors that are on the GPU
    alignment: int = 1  # bytes to which every tensor is rounded up
    n_weights: int = 0  # for --bpw: the weights it is over

    @property
    def bpw(self) -> float:
        """The budget in bits per weight, where the limit is over weights."""
        return round(8 * self.budget / max(self.n_weights, 1), 4)

    def cost(self, n_bytes: int, on_gpu: bool) -> int:
        """What a tensor of `n_bytes` takes of the budget, in bytes."""
        return 0 if self.gpu_only and not on_gpu else -(-n_bytes // self.alignment) * self.alignment


@dataclass(frozen=True, slots=True)
class Choice:
    """The type one tensor gets."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    source_type: str
    type: str
    n_bytes: int
    loss: float
    rmse: float
    on_gpu: bool
    reason: str | None = None  # why it stays as it is, or None
    notes: tuple[str, ...] = ()  # types that were out of the question, and why

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are taken over."""
        return self.type == self.source_type


@dataclass(frozen=True, slots=True)
class Plan:
    """A type for every tensor of one source. Over its own limits it cannot be made: InfeasibleBudget."""

    source: str
    header_sha256: str
    arch: str
    method: str
    budget: Mapping[str, Any]  # what was asked for, in the user's words
    limits: tuple[Limit, ...]
    memory: Mapping[str, int]  # component -> bytes in VRAM beside the weights
    choices: tuple[Choice, ...]  # in file order
    predicted_loss: float | None  # None: edited by hand
    gap: float | None  # (loss - proven bound) / loss; None: not known
    solver: str = ""
    notes: tuple[str, ...] = ()
    effort: Effort = Effort.DEFAULT  # that the encoders are to spend
    measured_kld: float | None = None  # nats per token, on held-out text; None: not measured

    def __post_init__(self) -> None:
        for limit in self.limits:
            used = self.used(limit)
            if used > limit.budget:
                what = f"the plan needs {format_size(used)}, {used - limit.budget} bytes over its {limit.option} of"
                hint = "choose smaller types, or raise the limit"
                raise InfeasibleBudget(limit.budget, used, f"{what} {format_size(limit.budget)}; {hint}")

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(c.n_bytes for c in self.choices)

    @property
    def n_weights(self) -> int:
        """Elements of all tensors."""
        return sum(c.n_weights for c in self.choices)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors of the file, those that stay as they are included."""
        return 8 * self.n_bytes / max(self.n_weights, 1)

    def used(self, limit: Limit) -> int:
        """Bytes of the limit's budget that the plan takes, those that are no tensor included."""
        return limit.other + sum(limit.cost(c.n_bytes, c.on_gpu) for c in self.choices)

    def types(self) -> dict[str, str]:
        """Tensor name -> type, in file order."""
        return {c.name: c.type for c in self.choices}

    def sha256(self) -> str:
        """Hash of what decides the output's bytes: the source's header, each tensor's type and the effort."""
        decides = {"header_sha256": self.header_sha256, "types": self.types(), "effort": plain(self.effort)}
        return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """The file's text: ASCII, one tensor a line, the same for the same plan."""
        return dump({"schema": PLAN_SCHEMA, "sha256": self.sha256()} | plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "plan.json") -> Plan:
        """The plan in `text`. A type changed by hand gets its true n_bytes, and the plan loses its prediction.

        Raises BadInput naming `path`, and InfeasibleBudget when the edited plan is over its limits.
        """
        raw = parse(text, PLAN_SCHEMA, path)
        plan = _plan_record(raw, raw.pop("sha256", None), path)
        _check_unique((c.name for c in plan.choices), path)
        return plan


def read_losses(path: Path) -> Losses:
    """The losses in the file at `path`. Raises BadInput, InputOutputError."""
    return Losses.from_json(read_text(path), path)


def read_plan(path: Path) -> Plan:
    """The plan in the file at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    return Plan.from_json(read_text(path), path)


def _plan_record(raw: dict[str, Any], recorded: object, path: object) -> Plan:
    """A Plan; the limits are applied last, when hand-edited choices have their true sizes."""
    limits = value_of(tuple[Limit, ...], raw.get("limits"), "limits", path)
    if any(limit.alignment < 1 for limit in limits):
        raise BadInput(path, "alignment in limits must be 1 or above", got=0)
    plan: Plan = record(Plan, raw | {"limits": []}, "", path)
    choices = tuple(
        replace(c, n_bytes=_n_bytes(c.type, c.shape, f"choices[{i}]", path)) for i, c in enumerate(plan.choices)
    )
    if recorded is not None and recorded != plan.sha256():
        notes = (*plan.notes, *(() if EDITED in plan.notes else (EDITED,)))
        plan = replace(plan, predicted_loss=None, gap=None, measured_kld=None, notes=notes)
    elif stale := [c.name for c, true in zip(plan.choices, choices, strict=True) if c.n_bytes != true.n_bytes]:
        raise BadInput(path, f"n_bytes of '{printable(stale[0])}' is not what its type and shape give")
    return replace(plan, choices=choices, limits=limits)


def _n_bytes(type_name: str, shape: tuple[int, ...], where: str, path: object) -> int:
    """Bytes of a tensor; BadInput where its rows are not whole blocks."""
    fmt = by_name(type_name)
    assert fmt is not None, type_name
    if not fmt.divides(shape[0] if shape else 1):
        raise BadInput(
            path,
            f"{where} cannot be {fmt.name}",
            got=f"shape {list(shape)}",
            limit=f"rows of whole blocks of {fmt.block_weights}",
        )
    return fmt.n_bytes(math.prod(shape))


def _check_unique(names: Iterable[str], path: object) -> None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise BadInput(path, f"tensor '{printable(name)}' appears twice")


def _check_tensor(tensor: TensorLosses, where: str, path: object) -> None:
    """The types are unique, the source's own is among them, and the sizes are right."""
    types = [c.type for c in tensor.candidates]
    if len(set(types)) < len(types) or tensor.source_type not in types:
        what = f"{where}.candidates must name {tensor.source_type} (the source's own type) and no type twice"
        raise BadInput(path, what, got=", ".join(types) or "none")
    sizes = {c.type: c.n_bytes for c in tensor.candidates}
    if tensor.n_bytes != sizes[tensor.source_type]:
        raise BadInput(path, f"{where}.n_bytes is not that of {tensor.source_type}", got=tensor.n_bytes)
    for type_name, n_bytes in sizes.items():
        true = _n_bytes(type_name, tensor.shape, where, path)
        if n_bytes != true:
            raise BadInput(path, f"{where}: n_bytes of {type_name} is wrong", got=n_bytes, limit=true)
