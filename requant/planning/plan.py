"""Plan: the type and device of every tensor, with its limits and predictions, as data and as JSON to edit by hand.

Reading is strict: an unknown key, a wrong type, a figure that is not finite or an n_bytes that does not follow from
type and shape raises a BadInput that names the place. Sizes are bytes; losses are in the unit of the method that
`scoring.losses.loss_unit` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from requant.common.notebook import html
from requant.common.serialization import (
    IN_MEMORY,
    dump,
    hash_json,
    parse,
    parse_record,
    parse_value,
    read_text,
    to_plain,
)
from requant.common.shapes import check_shape
from requant.errors import BadInput, InfeasibleBudget, brief
from requant.formats import Effort
from requant.planning.constraints import Limit, Timing, Use, use_of
from requant.planning.engines import ENGINES
from requant.scoring.losses import (
    NATS,
    bytes_of_type,
    check_unique,
    loss_unit,
    parse_file_path,
    parse_type_name,
    take_loss_unit,
)

PLAN_SCHEMA = "requant.plan/2"
EDITED = "the plan was edited after solving: how far it is from the best is not known"
COPY = "every tensor keeps its type"
COMPENSATIONS = ("fast", "best")  # how the encoders may compensate their errors
DEVICES = ("gpu", "cpu", "none")  # none: not loaded, as layers of multi-token prediction that are not asked for
# types of the keys in `budget` and `runtime` that become the start command; all other keys are free
_START_KEYS: dict[str, dict[str, Any]] = {
    "budget": {"ctx": int, "parallel": int, "ubatch": int, "cache_type_k": str, "cache_type_v": str},
    "runtime": {
        **{"engine": str, "n_gpu_layers": int, "all_layers": bool, "experts_on_cpu": tuple[int, ...]},
        **{
            "draft": str,
            "draft_arch": str,
            "draft_type": str,
            "mmproj": str,
            "kind": str,
            "mtp": bool,
            "reference_type": str,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The type and device of one tensor."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...] = field(metadata={"parse": check_shape})
    source_type: str = field(metadata={"parse": parse_type_name})
    type: str = field(metadata={"parse": parse_type_name})
    n_bytes: int
    loss: float
    rmse: float
    device: str  # gpu, cpu, none
    reason: str | None = None  # why it stays as it is, or None
    notes: tuple[str, ...] = ()  # types that could not be used, and why
    share: float = 1.0  # the part of the tensor read for each token: n_used / n_expert of experts, 0 of a lookup

    @property
    def n_weights(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def copied(self) -> bool:
        """Return whether the source's bytes are copied."""
        return self.type == self.source_type


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer in figures, for tools that place layers on devices; `layer` is None for tensors outside all layers.

    `sensitivity`: predicted loss if all its matrices had the `reference_type` of the plan's runtime; None where it was
    not scored. `loss`: predicted for the chosen types. `kv_bytes`: at the planned context.
    """

    layer: int | None
    device: str  # gpu, cpu, none; `gpu+cpu` where its experts are on the CPU and the rest is not
    n_bytes: int
    kv_bytes: int
    loss: float
    sensitivity: float | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """One of llama-quantize's mixtures of the same model: bytes of all tensors, predicted loss."""

    name: str
    n_bytes: int
    gpu_bytes: int  # of them in VRAM with all layers on the GPU
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A type for every tensor of one source. Raises InfeasibleBudget where it is over its own limits.

    The JSON also has the `loss_unit` and the `sha256` of what decides the output.
    """

    source: str
    header_sha256: str
    arch: str
    method: str
    budget: Mapping[str, Any]  # the request in the user's words
    limits: tuple[Limit, ...]
    memory: Mapping[str, int]  # component -> bytes in VRAM beside the weights
    choices: tuple[Choice, ...] = field(repr=False)  # in file order
    predicted_loss: float | None  # None: edited by hand
    gap: float | None  # (loss - proven bound) / loss; None: not known
    solver: str = ""
    notes: tuple[str, ...] = ()
    effort: Effort = Effort.DEFAULT  # of the encoders
    compensation: str | None = None  # fast or best: how the encoders compensate their errors; None: they do not
    measured_kld: float | None = None  # nats per token, on held-out text; None: not measured
    cache_loss: float = 0.0  # measured for the KV cache's types, where these were chosen with the weights' types
    timing: Timing | None = None  # None: time was not considered
    runtime: Mapping[str, Any] = field(default_factory=dict)  # settings of the engine under which the figures hold
    layers: tuple[LayerSummary, ...] = field(default=(), repr=False)
    # tensor -> type it could have -> loss
    candidates: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    mixtures: tuple[Mixture, ...] = field(default=(), repr=False)  # those whose every type was scored, for comparison
    options: tuple[str, ...] = ()  # of `requant plan`, as typed on the command line; (): not known
    scoring: tuple[str, ...] = ()  # of `requant score`, where the losses came from a file
    imatrix: str | None = None  # name of the importance to encode with, as outputs record it; None without
    imatrix_sha256: str | None = None  # of its file
    # its file, relative to the folder of the plan; in memory and in a conversion's record its name
    imatrix_file: str | None = field(default=None, metadata={"parse": parse_file_path})
    # the importance as an Imatrix, or the Path of the file that this plan was read from
    importance: Any = field(default=None, repr=False, compare=False, metadata=IN_MEMORY)

    def __post_init__(self) -> None:
        for limit in self.limits:
            used = self.used(limit)
            if used > limit.budget:
                over = f", {used - limit.budget} bytes over" if limit.unit == "bytes" else ", beyond"
                asked, need = self.show(limit, limit.budget), self.show(limit, used)
                what = f"the plan needs {need}{over} its {limit.option} of {asked}"
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
        """Bits per weight over all tensors of the file, copied ones included."""
        return 8 * self.n_bytes / max(self.n_weights, 1)

    @property
    def is_copy(self) -> bool:
        """Return whether every tensor keeps its type, so that nothing is lost and nothing had to be predicted."""
        return all(c.copied for c in self.choices)

    @property
    def predicted_kl(self) -> float | None:
        """The predicted KL divergence in nats per token; None for losses in points, a copy, or an edited plan."""
        return self.predicted_loss if self.loss_unit == NATS and not self.is_copy else None

    @property
    def total_loss(self) -> float | None:
        """The predicted loss of weights and KV cache; None where that of the weights is not known."""
        return None if self.predicted_loss is None else self.predicted_loss + self.cache_loss

    @property
    def minimized(self) -> float:
        """The figure that a larger budget never makes larger: total loss and price of the time, or bytes.

        With --max-loss it is the bytes of tensors and KV cache.
        """
        if "max_loss" in self.budget:
            return float(self.n_bytes + self.memory.get("kv_cache", 0))
        price: float = self.budget.get("time_price", 0.0)
        return (self.total_loss or 0.0) + price * 1e-9 * (self.ns_per_token or 0)

    def used(self, limit: Limit) -> int:
        """The part of the limit's budget that the plan takes, headers and buffers included."""
        return limit.other + sum(limit.cost(self.use(c)) for c in self.choices)

    @property
    def loss_unit(self) -> str | None:
        """Unit of the predicted losses; None where nothing was scored."""
        return loss_unit(self.method)

    def show(self, limit: Limit, amount: int) -> str:
        """`amount` of the unit of one of the plan's limits, as text."""
        return limit.show(amount, self.loss_unit)

    def parts(self, limit: Limit) -> dict[str, int]:
        """The components that fill a limit in bytes: the weights, then the other memory, then the rest."""
        used = self.used(limit)
        found = {"weights": used - limit.other}
        if limit.device == "gpu" and self.memory:
            found |= {name: size for name, size in self.memory.items() if name != "weights"}
        if rest := used - sum(found.values()):
            found["header" if limit.option == "--size" else "other"] = rest
        return found

    def use(self, c: Choice) -> Use:
        """Memory, time and loss of a choice."""
        return use_of(c, c.device, c.role, c.share, self.timing)

    @property
    def ns_per_token(self) -> int | None:
        """Predicted nanoseconds per token of decoding; None where no bandwidth was given or assumed."""
        return None if self.timing is None else self.timing.fixed_ns + sum(self.use(c).ns for c in self.choices)

    def types(self) -> dict[str, str]:
        """Tensor name -> type, in file order."""
        return {c.name: c.type for c in self.choices}

    def sha256(self) -> str:
        """Hash of what determines the output's bytes: the source's header, the types, effort and compensation."""
        decides = {"header_sha256": self.header_sha256, "types": self.types(), "effort": to_plain(self.effort)}
        own = {} if self.compensation is None else {"compensation": self.compensation}
        return hash_json(decides | own)

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """The file's text: ASCII, one tensor a line, the same for the same plan."""
        head = {"schema": PLAN_SCHEMA, "sha256": self.sha256(), "loss_unit": self.loss_unit}
        return dump(head | to_plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "plan.json") -> Plan:
        """Read the plan in `text`. A type changed by hand gets its true n_bytes, and the plan loses its prediction.

        Raises BadInput naming `path`, and InfeasibleBudget where the edited plan is over its limits.
        """
        raw = parse(text, PLAN_SCHEMA, path)
        take_loss_unit(raw, path)
        plan = _build_plan(raw, raw.pop("sha256", None), path)
        check_unique((c.name for c in plan.choices), path)
        return plan


def read_plan(path: Path | str) -> Plan:
    """Read the plan in the file at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    return replace(Plan.from_json(read_text(path), path), importance=Path(path))


def _build_plan(raw: dict[str, Any], recorded: object, path: object) -> Plan:
    """Build a Plan; the limits are applied last, when hand-edited choices have their true sizes."""
    limits = parse_value(tuple[Limit, ...], raw.get("limits"), "limits", path)
    if any(limit.alignment < 1 for limit in limits):
        raise BadInput(path, "alignment in limits must be 1 or above", got=0)
    plan: Plan = parse_record(Plan, raw | {"limits": []}, "", path)
    if plan.compensation not in (None, *COMPENSATIONS):
        raise BadInput(path, "compensation is not known", got=brief(plan.compensation), hint=" or ".join(COMPENSATIONS))
    if any(c.device not in DEVICES for c in plan.choices):
        raise BadInput(path, f"device must be one of {', '.join(DEVICES)}")
    _check_start_keys(plan, path)
    for type_name in {name for losses in plan.candidates.values() for name in losses}:
        parse_type_name(type_name, "candidates", path)
    if plan.timing is not None and min(plan.timing.gpu, plan.timing.cpu) < 1:
        raise BadInput(path, "the bandwidths of timing must be at least 1 byte per second")
    choices = tuple(
        replace(c, n_bytes=bytes_of_type(c.type, c.shape, f"choices[{i}]", path)) for i, c in enumerate(plan.choices)
    )
    if recorded is not None and recorded != plan.sha256():
        notes = (*plan.notes, *(() if EDITED in plan.notes else (EDITED,)))
        choices = tuple(_reprice(c, plan.candidates.get(c.name, {})) for c in choices)
        known = all(c.reason is not None or c.type in plan.candidates.get(c.name, {}) for c in choices)
        loss = math.fsum(c.loss for c in choices) if known else None
        plan = replace(plan, predicted_loss=loss, gap=None, measured_kld=None, notes=notes, layers=(), options=())
        limits = tuple(limit for limit in limits if limit.unit != "loss")
    elif stale := [c.name for c, true in zip(plan.choices, choices, strict=True) if c.n_bytes != true.n_bytes]:
        raise BadInput(path, f"n_bytes of '{brief(stale[0])}' is not what its type and shape give")
    return replace(plan, choices=choices, limits=limits)


def _reprice(choice: Choice, losses: Mapping[str, float]) -> Choice:
    """Return the choice with the loss of its type, and without a predicted error where the type was changed."""
    loss = losses.get(choice.type)
    if loss is None or math.isclose(loss, choice.loss, rel_tol=1e-5):
        return choice
    return replace(choice, loss=loss, rmse=0.0)


def _check_start_keys(plan: Plan, path: object) -> None:
    """Raise BadInput for a setting that would change the meaning of the start command."""
    for part, kinds in _START_KEYS.items():
        for key, raw in getattr(plan, part).items():
            if key in kinds:
                parse_value(kinds[key], raw, f"{part}.{key}", path)
            if raw and key in ("cache_type_k", "cache_type_v", "reference_type"):
                parse_type_name(raw, f"{part}.{key}", path)
    engine = plan.runtime.get("engine")
    if engine is not None and engine not in ENGINES:
        raise BadInput(path, "runtime.engine is not known", got=brief(engine), hint=f"known are {', '.join(ENGINES)}")
