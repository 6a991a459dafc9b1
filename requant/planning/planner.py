"""Planner: a source and its losses, and the best plan for any request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.container.infos import round_up
from requant.container.metadata import read_alignment
from requant.container.source import Source, require_model
from requant.container.splitting import total_size
from requant.errors import BadInput, InfeasibleBudget, RequantError, UsageError, brief
from requant.model.engine_settings import CELL_PADDING, DEFAULT_UBATCH
from requant.model.hyperparameters import Hyperparameters, read_hyperparameters
from requant.planning.constraints import size_limit
from requant.planning.output_layout import output_layouts
from requant.planning.plan import Plan
from requant.planning.request import MEMORY_OPTIONS, PlanRequest, check_request
from requant.planning.rules import AUTO, MAX_CONTEXT
from requant.planning.searches import attempt, search_cache_types, search_context
from requant.planning.settled import SettledRequest
from requant.planning.solver.solve import BARE
from requant.planning.summaries import compare_mixtures
from requant.planning.ubatch import BATCHES, describe_batch
from requant.scoring.losses import ALREADY_QUANTIZED, UNSCORED, Losses, TensorLosses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix


class Planner:
    """A source, its losses, and the imatrix that converting will use.

    Losses may be those of a sibling, a file with the same tensors. Raises BadInput for losses of another model.
    """

    def __init__(self, source: Source, losses: Losses, imatrix: Imatrix | None = None) -> None:
        self.source, self.losses, self.imatrix = source, _adopt_losses(losses, source), imatrix

    def best(self, request: PlanRequest) -> Plan:
        """Return the best plan for the request, with llama-quantize's mixtures for comparison.

        Raises UsageError for an invalid request, BadInput where memory needs are not known, InfeasibleBudget.
        """
        plan = self._note_batch(self.solve(request), request)
        return replace(plan, mixtures=compare_mixtures(self.source, self.losses, has_imatrix=self.imatrix is not None))

    def solve(self, request: PlanRequest) -> Plan:
        """Return the plan of `best` without the mixtures and the note on its batch: for callers that solve often."""
        check_request(request)
        if request.n_ctx == MAX_CONTEXT:
            return search_context(self.solve, request, self._hyperparameters())
        if AUTO in (request.cache_type_k, request.cache_type_v):
            return search_cache_types(self._solve_devices, request, self._hyperparameters(), self.losses.caches)
        return self._solve_devices(request)

    def _solve_devices(self, request: PlanRequest, cache_loss: float = 0.0) -> Plan:
        """Solve with known context and cache types. With --ram the plan is no worse than without.

        A given --time-price says itself how much loss the speed is worth.
        """
        if request.vram is None or request.ram is None or request.price is not None:
            return self._solve_settled(request, cache_loss=cache_loss)
        alone = attempt(self._solve_settled, replace(request, ram=None), cache_loss=cache_loss)
        both = attempt(self._solve_settled, request, cache_loss=cache_loss)
        if isinstance(alone, Plan) and (isinstance(both, InfeasibleBudget) or _is_worse(both, alone)):
            both = self._plan_on_gpu(request, alone, cache_loss) or both
        if isinstance(both, InfeasibleBudget):
            raise both
        return both

    def _plan_on_gpu(self, request: PlanRequest, alone: Plan, cache_loss: float) -> Plan | None:
        """Return a plan with all layers on the GPU that is no worse than `alone`, the plan without --ram.

        Its batch is the largest with which the RAM holds what is never in VRAM; None where there is none.
        """
        own = alone.budget["ubatch"]
        smaller = (n for n in reversed(BATCHES) if n < own and request.n_ubatch is None)
        requests = (replace(request, n_ubatch=n) for n in (own, *smaller))
        found = (attempt(self._solve_settled, one, cache_loss=cache_loss, spread=False) for one in requests)
        return next((x for x in found if isinstance(x, Plan) and not _is_worse(x, alone)), None)

    def _solve_settled(self, request: PlanRequest, *, cache_loss: float = 0.0, spread: bool = True) -> Plan:
        settled = SettledRequest.settle(self.source, self.losses, request, cache_loss=cache_loss, spread=spread)
        return settled.solve() if request.size is None else self._fit_file(settled, request.size)

    def _note_batch(self, plan: Plan, request: PlanRequest) -> Plan:
        """Return the plan; where a smaller batch than the default was chosen, with a note on the default's price."""
        n_ubatch = plan.budget.get("ubatch", DEFAULT_UBATCH)
        if request.n_ubatch is not None or n_ubatch >= DEFAULT_UBATCH:
            return plan
        kinds = {f"cache_type_{x}": plan.budget[f"cache_type_{x}"] for x in "kv"}
        usual = replace(request, n_ctx=plan.budget["ctx"], n_ubatch=DEFAULT_UBATCH, **kinds)
        found = attempt(self._solve_devices, usual, plan.cache_loss)
        return replace(plan, notes=(*plan.notes, describe_batch(plan, found)))

    def _fit_file(self, settled: SettledRequest, size: int) -> Plan:
        """Return the best plan whose file, header and padding included, has at most `size` bytes.

        The header describes the plan, so its size is known only afterwards: it is taken from the last solution until
        it no longer grows.
        """
        alignment, overhead = read_alignment(self.source.metadata), 0
        plan = settled.solve()
        while (found := self._overhead(plan, alignment)) > overhead:
            overhead = found
            plan = settled.solve(size_limit(size, overhead, alignment))
        return plan

    def _overhead(self, plan: Plan, alignment: int) -> int:
        """Bytes of the file that are in no tensor of the plan: the header, and scales that it adds."""
        layouts = output_layouts(self.source, plan, self.imatrix)
        return total_size(layouts) - sum(round_up(c.n_bytes, alignment) for c in plan.choices)

    def _hyperparameters(self) -> Hyperparameters:
        return read_hyperparameters(self.source.metadata, self.source.tensors)


def _is_worse(plan: Plan, other: Plan) -> bool:
    """Return whether the plan has more predicted loss, or with --max-loss more bytes."""
    if "max_loss" in plan.budget:
        return plan.minimized > other.minimized
    return (plan.predicted_loss or 0.0) > (other.predicted_loss or 0.0)


def _adopt_losses(losses: Losses, source: Source) -> Losses:
    """Return `losses` as those of `source`, where they are its own or a sibling's: the same shapes and types."""
    if losses.header_sha256 == source.header_sha256:
        return losses
    hint = "score this file first, or leave --losses out"
    ours = [(t.name, t.shape, t.format.name) for t in source.tensors]
    theirs = [(t.name, t.shape, t.source_type) for t in losses.tensors]
    if losses.arch != require_model(source) or sorted(ours) != sorted(theirs):
        other = next((a for a in sorted(ours) if a not in set(theirs)), None)
        what = "the losses are of another model" + ("" if other is None else f": tensor {brief(other[0])} differs")
        raise BadInput(source.path, what, got=losses.source, expected=source.name, hint=hint)
    tensors = {t.name: t for t in losses.tensors}
    note = f"the losses are those of a sibling, {brief(losses.source)}: same tensors, other weights"
    return replace(
        losses,
        source=source.name,
        header_sha256=source.header_sha256,
        tensors=tuple(tensors[t.name] for t in source.tensors),
        notes=(*losses.notes, note),
    )


def check_feasible(
    source: Source,
    request: PlanRequest,
    types: Sequence[str],
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    has_importance: bool = False,
    method: str = "",
) -> None:
    """Plan with all losses 0, so that every planning error appears before hours of scoring.

    method: that of the losses, where it is known before.
    Raises what `Planner.best` raises with losses of `types`, BadInput where all that does not fit is quantized already.
    """
    from requant.scoring.candidates import build_losses, survey_tensors

    def survey(*, again: bool) -> tuple[TensorLosses, ...]:
        return survey_tensors(
            source, types=types, imatrix=imatrix, has_importance=has_importance, allow_requantize=again
        )

    def fault_of(tensors: tuple[TensorLosses, ...]) -> InfeasibleBudget | UsageError | None:
        try:
            Planner(source, build_losses(source, tensors, method), imatrix).solve(smallest)
        except (InfeasibleBudget, UsageError) as fault:
            return fault
        return None

    types_kv = [("F16" if x == AUTO else x) for x in (request.cache_type_k, request.cache_type_v)]
    n_ctx = CELL_PADDING if request.n_ctx == MAX_CONTEXT else request.n_ctx
    smallest = replace(request, cache_type_k=types_kv[0], cache_type_v=types_kv[1], n_ctx=n_ctx)
    tensors = survey(again=allow_requantize)
    fault = fault_of(tensors)
    if fault is None:
        return
    if all(t.reason != ALREADY_QUANTIZED for t in tensors):
        raise fault
    raise _explain_copies(source, tensors, fault, fault_of(survey(again=True)))


def _explain_copies(
    source: Source,
    tensors: Sequence[TensorLosses],
    fault: InfeasibleBudget | UsageError,
    again: InfeasibleBudget | UsageError | None,
) -> RequantError:
    """The error of a request that fails while tensors below Q8_0 are copied; `again`: that with --allow-requantize."""
    from requant.scoring.candidates import check_requantization

    if isinstance(fault, UsageError) or isinstance(again, UsageError):
        return again if isinstance(again, UsageError) else fault
    if fault.budget < BARE:
        return fault
    what = f"--allow-requantize alone is not enough: {again}"
    try:
        check_requantization(source, tensors)
    except BadInput as error:
        return error if again is None else error.with_hint(f"start from an F16, BF16 or Q8_0 file; {what}")
    if again is None:
        return fault
    return InfeasibleBudget(fault.budget, fault.smallest, f"{fault}; {what}", proven=fault.proven)


def losses_without_scoring(source: Source, request: PlanRequest) -> Losses | None:
    """Losses that keep every tensor as it is, where that meets the request and so no plan is better; else None."""
    from requant.scoring.candidates import build_losses, survey_tensors

    whole = request
    if request.vram is not None:  # no smaller batch is chosen
        whole = replace(request, n_ubatch=request.n_ubatch or DEFAULT_UBATCH)
    asked = {name: getattr(whole, name) for name in ("vram", "size", "bpw", "engine", *MEMORY_OPTIONS)}
    least = request.n_ctx == MAX_CONTEXT or AUTO in (request.cache_type_k, request.cache_type_v) or request.price
    if least or PlanRequest(**asked) != whole:  # the request also sets --max-loss, a price or types
        return None
    tensors = tuple(
        replace(t, candidates=tuple(c for c in t.candidates if c.type == t.source_type), skipped={})
        for t in survey_tensors(source, types=())
    )
    note = "the model fits as it is, so nothing was scored: every tensor is copied"
    losses = build_losses(source, tensors, UNSCORED, notes=(note,))
    try:
        Planner(source, losses).solve(whole)
    except (InfeasibleBudget, UsageError):  # the latter: the engine does not run a type that could be converted
        return None
    return losses
