"""Losses and Plan: what scoring found and what was chosen, as data and as JSON that a person can edit.

Reading is strict: an unknown key, a wrong type, a figure that is not finite or an n_bytes that its type and shape do
not give is a BadInput which names the place. Sizes are bytes, losses nats (predicted KL) unless the method says other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from requant.common.notebook import html
from requant.common.serialization import dump, parse, parse_record, parse_value, read_text, to_plain
from requant.errors import BadInput, InfeasibleBudget, brief
from requant.formats import Effort, parse_type_name
from requant.planning.constraints import Limit, Timing, Use
from requant.planning.engines import ENGINES
from requant.scoring.losses import Candidate, bytes_of_type, check_unique

PLAN_SCHEMA = "requant.plan/2"
DEVICES = ("gpu", "cpu", "none")  # none: not loaded, as layers of multi-token prediction that are not asked for
_HELD_BY_HOST = ("token_embd", "per_layer_token_embd")  # roles that are in RAM whatever else
# what is read of `budget` and `runtime` when it is said how to start the engine; the rest is only kept
_STARTED: dict[str, dict[str, Any]] = {
    "budget": {"ctx": int, "parallel": int, "ubatch": int, "cache_type_k": str, "cache_type_v": str},
    "runtime": {
        **{"engine": str, "n_gpu_layers": int, "all_layers": bool, "experts_on_cpu": tuple[int, ...]},
        **{"draft": str, "draft_arch": str, "mmproj": str, "mtp": bool, "reference_type": str},
    },
}
EDITED = "the plan was edited after solving: how far it is from the best is not known"


@dataclass(frozen=True, slots=True)
class Choice:
    """The type one tensor gets."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    source_type: str = field(metadata={"parse": parse_type_name})
    type: str = field(metadata={"parse": parse_type_name})
    n_bytes: int
    loss: float
    rmse: float
    device: str  # gpu, cpu, none
    reason: str | None = None  # why it stays as it is, or None
    notes: tuple[str, ...] = ()  # types that were out of the question, and why
    share: float = 1.0  # of the tensor that is read for each token: an expert's is n_used / n_expert, a lookup's 0

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are taken over."""
        return self.type == self.source_type


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer for whoever places layers on devices; `layer` is None for all that is in no layer.

    `sensitivity`: predicted loss if its matrices all had the `reference` type of the plan's runtime, nats per token,
    None where that was not scored. `loss`: predicted for the types it has. `kv_bytes` at the planned context.
    """

    layer: int | None
    device: str  # gpu, cpu, none; `gpu+cpu` where its experts are apart from the rest
    n_bytes: int
    kv_bytes: int
    loss: float
    sensitivity: float | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """What one of llama-quantize's mixtures would be of the same model: bytes of all tensors, predicted loss."""

    name: str
    n_bytes: int
    gpu_bytes: int  # of them in VRAM with all layers there
    loss: float


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
    choices: tuple[Choice, ...] = field(repr=False)  # in file order
    predicted_loss: float | None  # None: edited by hand
    gap: float | None  # (loss - proven bound) / loss; None: not known
    solver: str = ""
    notes: tuple[str, ...] = ()
    effort: Effort = Effort.DEFAULT  # that the encoders are to spend
    measured_kld: float | None = None  # nats per token, on held-out text; None: not measured
    timing: Timing | None = None  # None: speed was no matter
    runtime: Mapping[str, Any] = field(default_factory=dict)  # how the engine must be started for the figures to hold
    layers: tuple[LayerSummary, ...] = field(default=(), repr=False)
    # tensor -> type it could have -> loss
    candidates: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    mixtures: tuple[Mixture, ...] = field(default=(), repr=False)  # those whose every type was scored, for comparison
    options: tuple[str, ...] = ()  # of `requant plan` that decided it, as one types them; (): not known
    scoring: tuple[str, ...] = ()  # those of `requant score`, where the losses came from a file

    def __post_init__(self) -> None:
        for limit in self.limits:
            used = self.used(limit)
            if used > limit.budget:
                over = f", {used - limit.budget} bytes over" if limit.unit == "bytes" else ", beyond"
                what = f"the plan needs {limit.show(used)}{over} its {limit.option} of {limit.show(limit.budget)}"
                raise InfeasibleBudget(limit.budget, used, f"{what}; choose other types, or loosen the limit")

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
        """What the plan takes of the limit's budget, what is no tensor included."""
        return limit.other + sum(limit.cost(self.use(c)) for c in self.choices)

    def parts(self, limit: Limit) -> dict[str, int]:
        """What fills a limit in bytes: the weights, then what is in memory beside them, then the rest."""
        used = self.used(limit)
        found = {"weights": used - limit.other}
        if limit.device == "gpu" and self.memory:
            found |= {name: size for name, size in self.memory.items() if name != "weights"}
        if rest := used - sum(found.values()):
            found["header" if limit.option == "--size" else "other"] = rest
        return found

    def use(self, c: Choice) -> Use:
        """What a choice takes."""
        return use_of(c, c.device, c.role, c.share, self.timing)

    @property
    def ns_per_token(self) -> int | None:
        """Predicted nanoseconds per token of decoding; None where no bandwidth was given or assumed."""
        return None if self.timing is None else self.timing.fixed_ns + sum(self.use(c).ns for c in self.choices)

    def types(self) -> dict[str, str]:
        """Tensor name -> type, in file order."""
        return {c.name: c.type for c in self.choices}

    def sha256(self) -> str:
        """Hash of what decides the output's bytes: the source's header, each tensor's type and the effort."""
        decides = {"header_sha256": self.header_sha256, "types": self.types(), "effort": to_plain(self.effort)}
        return hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """The file's text: ASCII, one tensor a line, the same for the same plan."""
        return dump({"schema": PLAN_SCHEMA, "sha256": self.sha256()} | to_plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "plan.json") -> Plan:
        """The plan in `text`. A type changed by hand gets its true n_bytes, and the plan loses its prediction.

        Raises BadInput naming `path`, and InfeasibleBudget when the edited plan is over its limits.
        """
        raw = parse(text, PLAN_SCHEMA, path)
        plan = _plan_record(raw, raw.pop("sha256", None), path)
        check_unique((c.name for c in plan.choices), path)
        return plan


def use_of(candidate: Candidate | Choice, device: str, role: str, share: float, timing: Timing | None) -> Use:
    """What a tensor takes of memory, time and loss when it has the candidate's type and is on the device."""
    n_bytes, loss = candidate.n_bytes, candidate.loss
    ns = 0 if timing is None else timing.ns(n_bytes, candidate.type, device, share)
    in_ram = device == "cpu" or (device != "none" and role in _HELD_BY_HOST)
    return Use(n_bytes, device, in_ram, ns, loss)


def read_plan(path: Path | str) -> Plan:
    """The plan in the file at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    return Plan.from_json(read_text(path), path)


def _plan_record(raw: dict[str, Any], recorded: object, path: object) -> Plan:
    """A Plan; the limits are applied last, when hand-edited choices have their true sizes."""
    limits = parse_value(tuple[Limit, ...], raw.get("limits"), "limits", path)
    if any(limit.alignment < 1 for limit in limits):
        raise BadInput(path, "alignment in limits must be 1 or above", got=0)
    plan: Plan = parse_record(Plan, raw | {"limits": []}, "", path)
    if any(c.device not in DEVICES for c in plan.choices):
        raise BadInput(path, f"device must be one of {', '.join(DEVICES)}")
    _check_started(plan, path)
    for type_name in {name for losses in plan.candidates.values() for name in losses}:
        parse_type_name(type_name, "candidates", path)
    if plan.timing is not None and min(plan.timing.gpu, plan.timing.cpu) < 1:
        raise BadInput(path, "the bandwidths of timing must be at least 1 byte per second")
    choices = tuple(
        replace(c, n_bytes=bytes_of_type(c.type, c.shape, f"choices[{i}]", path)) for i, c in enumerate(plan.choices)
    )
    if recorded is not None and recorded != plan.sha256():
        notes = (*plan.notes, *(() if EDITED in plan.notes else (EDITED,)))
        choices = tuple(_repriced(c, plan.candidates.get(c.name, {})) for c in choices)
        known = all(c.reason is not None or c.type in plan.candidates.get(c.name, {}) for c in choices)
        loss = math.fsum(c.loss for c in choices) if known else None
        plan = replace(plan, predicted_loss=loss, gap=None, measured_kld=None, notes=notes, layers=(), options=())
        limits = tuple(limit for limit in limits if limit.unit != "loss")
    elif stale := [c.name for c, true in zip(plan.choices, choices, strict=True) if c.n_bytes != true.n_bytes]:
        raise BadInput(path, f"n_bytes of '{brief(stale[0])}' is not what its type and shape give")
    return replace(plan, choices=choices, limits=limits)


def _repriced(choice: Choice, losses: Mapping[str, float]) -> Choice:
    """The choice with the loss of its type, and where that is another than it was solved for, no predicted error."""
    loss = losses.get(choice.type)
    if loss is None or math.isclose(loss, choice.loss, rel_tol=1e-5):
        return choice
    return replace(choice, loss=loss, rmse=0.0)


def _check_started(plan: Plan, path: object) -> None:
    """Raise BadInput for what would come out of `start_command` as something else than it is meant for."""
    for part, kinds in _STARTED.items():
        for key, raw in getattr(plan, part).items():
            if key in kinds:
                parse_value(kinds[key], raw, f"{part}.{key}", path)
            if raw and key in ("cache_type_k", "cache_type_v", "reference_type"):
                parse_type_name(raw, f"{part}.{key}", path)
    engine = plan.runtime.get("engine")
    if engine is not None and engine not in ENGINES:
        raise BadInput(path, "runtime.engine is not known", got=brief(engine), hint=f"known are {', '.join(ENGINES)}")
