"""A planning request: the options of a plan as the user gave them, and the checks that they make sense together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.errors import UsageError
from requant.model.engine_settings import EngineSettings
from requant.planning.constraints import Constraints, Rule, loss_limit
from requant.planning.engines import ENGINES, ONLY_FOR_ODD_ROWS, SLOW_ON_CPU, Engine, engine_named
from requant.planning.options import MEMORY, PLAN_OPTIONS
from requant.planning.rule_matches import check_rules
from requant.planning.rules import AUTO, MAX_CONTEXT, read_tensor_types
from requant.scoring.losses import NATS, POINTS, loss_unit

if TYPE_CHECKING:
    from requant.planning.plan import Plan
    from requant.scoring.losses import Losses

MEMORY_OPTIONS = {  # those that have a meaning only where memory or speed is limited
    o.field: o.flag for o in PLAN_OPTIONS if o.heading == MEMORY and o.field not in ("engine", "prefer_within")
}
LIMITS = ("--vram SIZE", "--ram SIZE", "--size SIZE", "--bpw X", "--max-loss X")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The options of a plan, parsed; sizes in bytes, None or () where not given.

    Fields stand in the order in which a plan records its options; `planning.options` has a row for each.
    """

    vram: int | None = None
    ram: int | None = None
    n_ctx: int | None = None  # or OWN_CONTEXT, or MAX_CONTEXT: the largest that keeps max_loss
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    n_parallel: int | None = None
    n_ubatch: int | None = None
    reserve: int | None = None
    draft: Path | None = None
    mmproj: Path | None = None
    mtp: bool | None = None  # layers of multi-token prediction are used
    assume: bool | None = None
    min_speed: float | None = None
    bandwidth: tuple[tuple[str, float], ...] | None = None
    price: float | None = None
    engine: str | None = None
    prefer_within: float | None = None
    max_loss: float | None = None
    size: int | None = None
    bpw: float | None = None
    pins: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = ()
    groups: tuple[str, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    types: tuple[str, ...] = ()

    @property
    def has_budget(self) -> bool:
        """Return whether an option limits the bytes."""
        return any(x is not None for x in (self.vram, self.ram, self.size, self.bpw, self.max_loss))

    @property
    def on_devices(self) -> bool:
        """Return whether an option depends on the device of each tensor."""
        return any(x is not None for x in (self.vram, self.ram, self.min_speed))

    @property
    def profile(self) -> Engine:
        """Return the engine, with the bandwidths of --bandwidth."""
        engine = engine_named(self.engine)
        return replace(engine, bandwidth={**engine.bandwidth, **dict(self.bandwidth or ())})

    @property
    def settings(self) -> dict[str, Any]:
        """Return the fields of `model.engine_settings.EngineSettings` that are options; None where not given."""
        return {f.name: getattr(self, f.name) for f in fields(EngineSettings) if hasattr(self, f.name)}

    @property
    def constraints(self) -> Constraints:
        """Return the constraints on types, without a limit."""
        return Constraints(
            pins=self.pins,
            floors=self.floors,
            groups=self.groups,
            types=self.types,
            output_type=self.output_type,
            embedding_type=self.embedding_type,
        )

    def try_rules(self, losses: Losses) -> None:
        """Call `check_rules` with these rules; do it in the main thread, where Ctrl-C can stop a slow expression."""
        check_rules(losses, self.constraints)

    @property
    def types_to_score(self) -> tuple[str, ...]:
        """Return --types, or the engine's candidates, and every type that another option names."""
        usual = self.types or tuple(t for t in engine_named(self.engine).candidates if t not in self._useless)
        return tuple(dict.fromkeys((*usual, *self._named_types)))

    @property
    def not_on_cpu(self) -> frozenset[str]:
        """Return the types that are too slow for the CPU to multiply with, where the user names none of them."""
        return frozenset() if self.types or not self.on_devices else SLOW_ON_CPU.difference(self._named_types)

    @property
    def odd_rows(self) -> frozenset[str]:
        """Return the types that only rows get which no super-block divides, where the user names none of them."""
        return frozenset() if self.types else ONLY_FOR_ODD_ROWS.difference(self._named_types)

    @property
    def _useless(self) -> frozenset[str]:
        """The candidates that no tensor could have: without --vram, all of them are on the CPU."""
        return self.not_on_cpu if self.ram is not None and self.vram is None else frozenset()

    @property
    def _named_types(self) -> tuple[str, ...]:
        """The types that rules name."""
        named = (*(r.type for r in self.pins + self.floors), self.output_type, self.embedding_type)
        return tuple(t for t in named if t is not None)


OPTIONS_BY_FIELD = tuple(o for f in fields(PlanRequest) for o in PLAN_OPTIONS if o.field == f.name)  # fields' order


def build_request(values: Mapping[str, Any]) -> PlanRequest:
    """Return the request of parsed values by keyword; None where not given.

    Rules of --tensor-type-file follow those of --tensor-type. Raises BadInput for that file.
    """
    given: dict[str, Any] = {}
    for option in PLAN_OPTIONS:
        value = values.get(option.keyword)
        if value is not None and option.keyword == "tensor_type_file":
            value = given.get(option.field, ()) + read_tensor_types(value)
        if value is not None:
            given[option.field] = value
    return PlanRequest(**given)


def check_request(request: PlanRequest) -> None:
    """Raise UsageError where there is no budget, or an option that has no meaning without another."""
    if not request.has_budget:
        raise UsageError(f"no budget given; say {', '.join(LIMITS[:-1])} or {LIMITS[-1]}")
    check_memory_options(request)


def check_memory_options(request: PlanRequest) -> None:
    """Raise UsageError for options that have no meaning without another, or that contradict each other."""
    engine = engine_named(request.engine)
    values = {option: getattr(request, name) for name, option in MEMORY_OPTIONS.items()}
    alone = [option for option, value in values.items() if value is not None and value is not False]  # 0 is given
    if alone and not request.on_devices:
        raise UsageError(f"{alone[0]} says how memory is spent; give --vram SIZE or --ram SIZE with it")
    if not engine.has_gpu and request.vram is not None:
        raise UsageError(f"--engine {engine.name} has no GPU; give --ram SIZE, not --vram")
    if request.n_ctx == MAX_CONTEXT and (request.max_loss is None or request.vram is None):
        raise UsageError("--ctx max is the largest context that keeps a loss in VRAM; give --vram and --max-loss")
    if request.prefer_within is not None and not engine.preferred:
        having = ", ".join(e.name for e in ENGINES.values() if e.preferred)
        raise UsageError(f"--prefer-within is for an engine with a type of its own; give --engine {having}")


def option_in_nats(request: PlanRequest) -> tuple[str, str] | None:
    """Return the first option that compares predicted losses with nats per token, and what to give in its place."""
    if request.max_loss is not None:
        return "--max-loss", "give --size, --bpw, --vram or --ram"
    if AUTO in (request.cache_type_k, request.cache_type_v):
        return "a cache type of auto", "name the cache types"
    return ("--time-price", "give --min-speed") if request.price else None


def check_loss_unit(request: PlanRequest, method: str, remedy: str) -> None:
    """Raise UsageError where the request compares nats with losses of another unit; remedy: the hint's first part."""
    if request.max_loss is not None:
        loss_limit(request.max_loss)
    found = option_in_nats(request)
    if found is not None and loss_unit(method) == POINTS:
        what = f"{found[0]} needs losses in {NATS}, and losses by {method} are in {POINTS}"
        raise UsageError(f"{what}; {remedy}{found[1]}")


def check_frontier(request: PlanRequest) -> None:
    """Raise UsageError where the curve of loss against bytes cannot be computed for the request."""
    if request.n_ctx == MAX_CONTEXT:
        raise UsageError("--frontier is of one context; give --ctx a number")


@dataclass(frozen=True, slots=True)
class FromPlan:
    """Types of a plan, given as data or as a file (--plan)."""

    plan: Plan | Path


@dataclass(frozen=True, slots=True)
class FromType:
    """One type for all tensors that may be quantized (--type)."""

    type: str


@dataclass(frozen=True, slots=True)
class FromPreset:
    """Types of a mixture of llama-quantize (--preset)."""

    preset: str


@dataclass(frozen=True, slots=True)
class FromModel:
    """Types of another GGUF (--like)."""

    like: Path


@dataclass(frozen=True, slots=True)
class FromBudget:
    """Types of least loss within a budget; `like`: a GGUF with the largest types allowed."""

    like: Path | None = None


PlanFrom = FromPlan | FromType | FromPreset | FromModel | FromBudget


def choose_plan_from(
    request: PlanRequest,
    plan: Plan | Path | None = None,
    type_name: str | None = None,
    preset: str | None = None,
    like: Path | None = None,
    *,
    others: tuple[str, ...] = ("--plan FILE", "--type T"),
) -> PlanFrom:
    """Return what decides the types: exactly one of a budget, --plan, --type, --preset and --like.

    --like may go with a budget. `others`: what else the command accepts, for the message. Raises UsageError.
    """
    given: dict[str, PlanFrom] = {
        **({"a budget (--vram, --ram, --size, --bpw, --max-loss)": FromBudget(like)} if request.has_budget else {}),
        **({"--plan": FromPlan(plan)} if plan is not None else {}),
        **({"--type": FromType(type_name)} if type_name is not None else {}),
        **({"--preset": FromPreset(preset)} if preset is not None else {}),
        **({"--like": FromModel(like)} if like is not None and not request.has_budget else {}),
    }
    if not given:
        raise UsageError(f"nothing decides the types; give {', '.join((*LIMITS, *others))}, --preset M or --like F")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be given together; each decides the types")
    check_memory_options(request)
    if plan is not None and request != PlanRequest():
        raise UsageError("--plan decides every type; edit the plan, or plan again with these options")
    if preset is not None and request != PlanRequest():
        raise UsageError("--preset decides every type; leave other options out")
    if type_name is not None and request.types:
        raise UsageError("--type and --types cannot be given together")
    return next(iter(given.values()))


def plan_from_option(plan_from: PlanFrom) -> dict[str, Plan | Path | str]:
    """Return {name without dashes: value} of --plan, --type, --preset or --like; {} for a budget alone."""
    return {f.name: value for f in fields(plan_from) if (value := getattr(plan_from, f.name)) is not None}
