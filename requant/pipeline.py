"""From a model and what was asked for to a plan: the stages in one go, for whoever holds a budget and not a Request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from requant.budget import Request, Rule, bpw_limit, constrain, size_limit, vram_limit
from requant.container.infos import padded
from requant.container.metadata import alignment_of
from requant.container.source import Source, require_model
from requant.errors import BadInput, InfeasibleBudget, UsageError, printable
from requant.formats import by_name
from requant.guard import guarded
from requant.model.companions import SECOND_LEVEL
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.model.memory import (
    DEFAULT_RESERVE,
    DEVICE_ALIGNMENT,
    RESERVE_SHARE,
    Memory,
    Settings,
    default_settings,
    device_bytes,
    memory_for,
    shrink_batch,
)
from requant.plan import Losses, Plan
from requant.solve import solve

if TYPE_CHECKING:
    from requant.container.layout import Layout
    from requant.imatrix import Imatrix

MIN_UBATCH = 32  # tokens; the least that shrink_batch goes to
MODEL_OPTIONS = {"n_ctx": "--ctx", "cache_type_k": "--cache-type-k", "cache_type_v": "--cache-type-v"}
VRAM_OPTIONS = MODEL_OPTIONS | {"n_parallel": "--parallel", "reserve": "--reserve"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for, as the options of the command line say it; sizes in bytes, None and () where not given."""

    vram: int | None = None
    n_ctx: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    n_parallel: int | None = None
    reserve: int | None = None
    size: int | None = None
    bpw: float | None = None
    pins: tuple[Rule, ...] = ()
    floors: tuple[Rule, ...] = ()
    groups: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None

    @property
    def has_budget(self) -> bool:
        """Whether anything limits the bytes."""
        return not (self.vram is None and self.size is None and self.bpw is None)

    @property
    def request(self) -> Request:
        """The wishes about types, without a limit."""
        return Request(
            pins=self.pins,
            floors=self.floors,
            groups=self.groups,
            types=self.types,
            output_type=self.output_type,
            embedding_type=self.embedding_type,
        )

    def types_to_score(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """--types, or the `default`, and every type that a wish names."""
        named = (*(r.type for r in self.pins + self.floors), self.output_type, self.embedding_type)
        return tuple(dict.fromkeys((*(self.types or default), *(t for t in named if t is not None))))


def check_wishes(wishes: Wishes) -> None:
    """Raise UsageError where there is no budget, or an option that says nothing without --vram."""
    if not wishes.has_budget:
        raise UsageError("no budget given; say --vram SIZE, --size SIZE or --bpw X")
    check_vram_options(wishes)


def check_vram_options(wishes: Wishes) -> None:
    """Raise UsageError for an option that says nothing without --vram."""
    alone = [option for name, option in VRAM_OPTIONS.items() if getattr(wishes, name) is not None]
    if alone and wishes.vram is None:
        raise UsageError(f"{alone[0]} says how a budget in VRAM is spent; give --vram SIZE with it")


def check_ways(wishes: Wishes, plan_file: object, type_name: object) -> None:
    """Raise UsageError unless exactly one of a budget, --plan and --type decides the types."""
    given = [
        *(["a budget (--vram, --size, --bpw)"] if wishes.has_budget else []),
        *(["--plan"] if plan_file is not None else []),
        *(["--type"] if type_name is not None else []),
    ]
    if not given:
        raise UsageError("nothing decides the types; give --vram SIZE, --size SIZE, --bpw X, --plan FILE or --type T")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be given together; each decides the types")
    check_vram_options(wishes)
    if plan_file is not None and wishes != Wishes():
        raise UsageError("--plan decides every type; edit the plan, or plan again with these options")
    if type_name is not None and wishes.types:
        raise UsageError("--type and --types cannot be given together")


def check_feasible(
    source: Source,
    wishes: Wishes,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    has_importance: bool = False,
) -> None:
    """Raise, without scoring, all that can be wrong with planning for `source` from losses of `types`.

    That is what `make_plan` raises, and BadInput for a source that must not be quantized again.
    """
    from requant.sensitivity import check_requantization, survey

    tensors = survey(source, types=types, imatrix=imatrix, has_importance=has_importance)
    check_requantization(source, tensors, allow_requantize)
    arch = require_model(source)
    make_plan(source, Losses(source.name, source.header_sha256, arch, "", None, None, tensors), wishes, imatrix=imatrix)


def make_plan(source: Source, losses: Losses, wishes: Wishes, *, imatrix: Imatrix | None = None) -> Plan:
    """The best plan for `source` within all that `wishes` limit; `imatrix` is the one that converting will use.

    Raises UsageError for wishes that cannot be meant, BadInput for losses of another model or memory needs that are
    not known, InfeasibleBudget.
    """
    check_wishes(wishes)
    if losses.header_sha256 != source.header_sha256:
        hint = "score this file first, or leave --losses out"
        raise BadInput(source.path, "the losses are of another file", got=losses.source, limit=source.name, hint=hint)
    request, asked, notes = wishes.request, dict[str, Any](), list[str]()
    if wishes.vram is not None:
        request, settings = _with_vram(source, losses, request, wishes, notes)
        asked = _described(settings, wishes)
    if wishes.bpw is not None:
        request = replace(request, limits=(*request.limits, bpw_limit(wishes.bpw, losses)))

    def finish(plan: Plan) -> Plan:
        return replace(plan, budget={**plan.budget, **asked}, notes=(*plan.notes, *notes))

    if wishes.size is None:
        return finish(_solved(losses, request))
    return _within_size(source, losses, request, wishes.size, imatrix=imatrix, finish=finish)


def off_plan(target: Source, plan: Plan) -> Iterator[str]:
    """A line for each tensor of `target` that is missing, or not of the type that the plan gives it."""
    for name, type_name in plan.types().items():
        if name not in target:
            yield f"tensor '{printable(name)}' of the plan is missing"
        elif (found := target.tensor(name).format.name) != type_name:
            yield f"tensor '{printable(name)}' is {found}, the plan says {type_name}"


def _with_vram(
    source: Source, losses: Losses, request: Request, wishes: Wishes, notes: list[str]
) -> tuple[Request, Settings]:
    """The request with --vram's limit and what takes its part of it, and how the engine is to be started."""
    assert wishes.vram is not None
    hp = read_hyperparameters(source.metadata, source.tensors)
    settings = engine_settings(hp, wishes)
    if settings.n_ctx > hp.context_length:
        notes.append(f"a context of {settings.n_ctx} is above the {hp.context_length} that the model was made for")
    padding = _row_padding(losses)
    memory = memory_for(hp, settings, vram=wishes.vram, reserve=wishes.reserve)
    limited = replace(request, limits=(vram_limit(wishes.vram, memory.weights_limit(wishes.vram)),))
    for considered in (guarded(losses, limited), losses):  # a smaller batch rather than a poor output
        smallest = padding + _smallest(considered, limited)
        fitted = shrink_batch(hp, memory, wishes.vram, smallest)
        if fitted.weights_limit(wishes.vram) >= smallest:
            break
    else:
        fitted = _least_memory(hp, memory, wishes.reserve, smallest)
    if fitted.settings.n_ubatch != settings.n_ubatch:
        notes.append(
            f"the compute buffer of a batch of {settings.n_ubatch} leaves too little for weights: "
            f"the plan is for batches of {fitted.settings.n_ubatch}, which read prompts more slowly"
        )
    parts = _parts(fitted, padding)
    limit = vram_limit(wishes.vram, wishes.vram - sum(parts.values()))
    return replace(request, limits=(*request.limits, limit), memory=parts), fitted.settings


def _least_memory(hp: Hyperparameters, memory: Memory, reserve: int | None, smallest: int) -> Memory:
    """What the smallest plan of all needs beside its weights, so that the error names a budget that will do.

    The default reserve grows with the budget, so it is the one of that larger budget.
    """
    least = memory_for(hp, replace(memory.settings, n_ubatch=MIN_UBATCH), reserve=0)
    needed = least.total + smallest
    if reserve is None:
        reserve = min(DEFAULT_RESERVE, -(-needed // (RESERVE_SHARE - 1)))
    return replace(least, reserve=reserve)


def engine_settings(hp: Hyperparameters, wishes: Wishes) -> Settings:
    """How the engine will be started: what was asked for, the engine's defaults for the rest."""
    given = {name: getattr(wishes, name) for name in (*MODEL_OPTIONS, "n_parallel")}
    given = {
        name: value.upper() if isinstance(value, str) else value for name, value in given.items() if value is not None
    }
    return replace(default_settings(hp), **given)


def _parts(memory: Memory, padding: int) -> dict[str, int]:
    parts = {"kv_cache": memory.kv_cache, "compute": memory.compute, "padding": padding, "reserve": memory.reserve}
    return {name: size for name, size in parts.items() if size or name != "padding"}


def _row_padding(losses: Losses) -> int:
    """Bytes at most by which CUDA's padding of last rows, and companions, exceed the aligned sizes of a limit."""
    total = 0
    for tensor in losses.tensors:
        if tensor.on_gpu and tensor.shape:
            formats = [fmt for c in tensor.candidates if (fmt := by_name(c.type)) is not None]
            total += max(
                device_bytes(fmt, tensor.shape)
                - -(-fmt.n_bytes(tensor.n_weights) // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
                for fmt in formats
            )
            total += DEVICE_ALIGNMENT * any(fmt.name == SECOND_LEVEL for fmt in formats)
    return total


def _smallest(losses: Losses, request: Request) -> int:
    """Bytes of the only limit that the smallest plan takes."""
    return sum(min(option.costs[0] for option in item.options) for item in constrain(losses, request).items)


def _described(settings: Settings, wishes: Wishes) -> dict[str, Any]:
    """What the engine must be told for the plan to hold, for the plan's file."""
    asked = {
        "ctx": settings.n_ctx,
        "parallel": settings.n_parallel,
        "ubatch": settings.n_ubatch,
        "cache_type_k": settings.cache_type_k,
        "cache_type_v": settings.cache_type_v,
    }
    return asked if wishes.reserve is None else asked | {"reserve": wishes.reserve}


def _solved(losses: Losses, request: Request) -> Plan:
    """The best plan behind the guard rail; without it, and with a note, where the budget is too small for that."""
    behind = guarded(losses, request)
    try:
        return solve(behind, request)
    except InfeasibleBudget:
        if behind is losses:
            raise
    plan = solve(losses, request)
    note = "the budget is too small to keep the output at the type of llama-quantize's mixtures"
    return replace(plan, notes=(*plan.notes, note))


def _within_size(
    source: Source,
    losses: Losses,
    request: Request,
    size: int,
    *,
    imatrix: Imatrix | None,
    finish: Callable[[Plan], Plan],
) -> Plan:
    """The best plan whose file, header and padding included, has at most `size` bytes.

    The header says a little about the plan, so its size is known only afterwards: it is taken from the last try until
    it has stopped growing.
    """
    from requant.convert import output_layout

    alignment = alignment_of(source.metadata)
    plan, overhead = finish(solve(losses, replace(request, limits=(), memory={}))), 0
    while (found := _overhead(output_layout(source, plan, imatrix), plan, alignment)) > overhead:
        overhead = found
        limited = replace(request, limits=(*request.limits, size_limit(size, overhead, alignment)))
        plan = finish(_solved(losses, limited))
    return plan


def _overhead(layout: Layout, plan: Plan, alignment: int) -> int:
    """Bytes of the file that are in no tensor of the plan: the header, and scales that it adds."""
    return layout.size - sum(padded(c.n_bytes, alignment) for c in plan.choices)
