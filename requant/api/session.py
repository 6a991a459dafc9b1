"""A session: an open model with the options of planning, its small input files read; it makes the plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.importance import Importance, find_importance, point_to_importance
from requant.api.invocation import record_options
from requant.api.kernels import Purpose, prepare_kernels
from requant.api.measure import check_can_run, score
from requant.api.session_options import SessionOptions
from requant.common.interrupt import run_interruptible
from requant.common.monitor import SILENT, Monitor
from requant.container.imatrix import Imatrix
from requant.container.source import Source, add_model_inputs, open_source
from requant.conversion.options import KEEP_TYPE
from requant.conversion.record import read_any_plan
from requant.errors import UsageError
from requant.formats import Effort, by_name
from requant.model.kinds import LANGUAGE_MODEL, kind_of
from requant.planning.planner import Planner, check_feasible, losses_without_scoring
from requant.planning.request import (
    FromBudget,
    FromModel,
    FromPlan,
    FromPreset,
    FromType,
    PlanFrom,
    PlanRequest,
    check_loss_unit,
    option_in_nats,
    plan_from_option,
)
from requant.planning.rules import AUTO
from requant.scoring.calibration_data import read_windows
from requant.scoring.losses import GRADIENTS, Losses, ScoringResult, read_losses
from requant.scoring.options import CalibrationOptions, ScoringOptions

if TYPE_CHECKING:
    from requant.common.cluster import Cluster
    from requant.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and the importance to convert with."""

    plan: Plan
    importance: Importance


@dataclass(frozen=True, slots=True)
class Session:
    """An open model with the options of planning; losses, plan and imatrix were read."""

    source: Source
    request: PlanRequest
    calibration: CalibrationOptions
    plan_from: PlanFrom
    options: SessionOptions
    importance: Importance
    losses: Losses | None
    plan: Plan | None  # of --plan
    cluster: Cluster | None = None
    monitor: Monitor = SILENT

    @property
    def imatrix(self) -> Imatrix | None:
        """Return the importance matrix, None without one or before scoring measures it."""
        return self.importance.imatrix

    @property
    def measures_importance(self) -> bool:
        """Return whether scoring also measures importance: it runs the model, and no imatrix is given or unwanted."""
        from requant.scoring.fisher import find_run_obstacle

        if self.imatrix is not None or self.options.no_imatrix or self.calibration.quick:
            return False
        return find_run_obstacle(self.source) is None

    @property
    def method_to_come(self) -> str:
        """Return the method by which losses would be measured where it is one without gradients, else an empty name."""
        from requant.scoring.fisher import find_run_obstacle

        quick, by_statistics = self.calibration.quick, self.calibration.statistics is not None
        if not quick and (by_statistics or find_run_obstacle(self.source) is None):
            return ""
        return "dfix" if self.imatrix is None else "cfix"

    @property
    def compensates(self) -> bool:
        """Return whether encoders are to compensate their errors, by an option or by the plan."""
        asked = self.options.compensate or (None if self.plan is None else self.plan.compensation)
        return asked is not None and not self.options.no_compensate

    @property
    def needs_scoring(self) -> bool:
        """Return whether a plan needs losses that are not given; scoring may take hours."""
        return isinstance(self.plan_from, FromBudget) and self.losses is None

    def check_measure(self, n: int | None) -> None:
        """Raise UsageError or BadInput where `n` plans near the best cannot be measured; None: no plan is measured."""
        if n is None:
            return
        if not self.request.has_budget:
            raise UsageError("--measure chooses among plans for a budget; give --vram, --size or --bpw with it")
        check_can_run(self.source, "leave --measure out, and compare outputs with `requant evaluate`")

    def check_rounding(self) -> None:
        """Raise UsageError where other options do not go with how the encoders round."""
        if self.calibration.quick and self.compensates:
            what = "--quick runs no model, and --compensate measures what comes out of it"
            raise UsageError(f"{what}; leave one of them out, or give --no-compensate")
        if self.options.max_memory is not None and not self.compensates:
            raise UsageError("--max-memory limits only what --compensate takes; leave it out, or give --compensate too")

    def check_loss_unit(self) -> None:
        """Raise UsageError where an option is in nats per token and the losses are, or will be, in another unit."""
        from requant.scoring.fisher import find_run_obstacle

        quick = self.calibration.quick
        if not isinstance(self.plan_from, FromBudget) or option_in_nats(self.request) is None:
            return
        obstacle = find_run_obstacle(self.source)
        if obstacle is not None:
            remedy = f"the model cannot be run, which others need: {obstacle.what}; "
        else:
            remedy = f"{'leave --quick out' if quick and self.losses is None else 'score again without --quick'}, or "
        if self.losses is not None:
            check_loss_unit(self.request, self.losses.method, remedy)
        elif self.method_to_come:
            check_loss_unit(self.request, self.method_to_come, remedy)

    def check_importance(self) -> None:
        """Raise BadInput where the imatrix that the plan or the losses point to is missing, before all encoding."""
        if self.importance.missing is not None:
            raise self.importance.missing

    def make_plan(self, *, weigh: bool = True, measure: int | None = None) -> Planned:
        """Return the plan; for a budget the best one, scored first where no losses are given.

        --effort, where it is given, replaces that of the plan or the losses. weigh: take the importance that scoring
        measures, where it does. measure: build so many plans near the best, run each on held-out text, return
        the one of least KL divergence.
        """
        if self.plan is not None:
            file = self.plan.imatrix_file  # records hold names without folders
            plan = self.plan if file is None else replace(self.plan, imatrix_file=Path(file).name)
            return Planned(record_options(plan, self), self.importance)
        planned = self._make_plan(weigh, measure)
        plan = point_to_importance(planned.plan, planned.importance, self.losses)
        kind = kind_of(self.source.metadata, {t.name for t in self.source.tensors})
        if kind is not LANGUAGE_MODEL:
            plan = replace(plan, runtime={**plan.runtime, "kind": kind.name})
        return replace(planned, plan=record_options(plan, self, measure))

    def _make_plan(self, weigh: bool, measure: int | None) -> Planned:
        from requant.planning import recipe

        given, again = self.importance, self.options.allow_requantize
        match self.plan_from:
            case FromType(name):
                constraints = self.request.constraints
                plan = recipe.uniform_plan(
                    self.source, name, imatrix=self.imatrix, constraints=constraints, allow_requantize=again
                )
                return Planned(plan, given)
            case FromPreset(name):
                return Planned(
                    recipe.preset_plan(self.source, name, imatrix=self.imatrix, allow_requantize=again), given
                )
            case FromModel(path):
                with open_source(path) as other:
                    return Planned(
                        recipe.clone_plan(self.source, other, imatrix=self.imatrix, allow_requantize=again), given
                    )
            case _:
                losses, importance = self.find_losses(weigh=weigh)
                if measure is not None:
                    return Planned(self._measure_plans(losses, importance.imatrix, measure), importance)
                with self.monitor.working("solving"):
                    plan = run_interruptible(Planner(self.source, losses, importance.imatrix).best, self.request)
                return Planned(plan, importance)

    def losses_without_scoring(self) -> Losses | None:
        """Return losses that leave every tensor as it is where the model fits the request as it is, else None."""
        limited = isinstance(self.plan_from, FromBudget) and self.plan_from.like is not None
        return None if limited else losses_without_scoring(self.source, self.request)

    def least_bytes(self) -> int:
        """Return the sum over all tensors of the bytes of the smallest candidate."""
        from requant.scoring.candidates import survey_tensors

        tensors = survey_tensors(
            self.source,
            types=self.types,
            imatrix=self.imatrix,
            has_importance=True,
            allow_requantize=self.options.allow_requantize,
        )
        return sum(min(c.n_bytes for c in t.candidates) for t in tensors)

    @property
    def types(self) -> tuple[str, ...]:
        """Return the types to score."""
        return self.request.types_to_score

    def find_losses(self, *, weigh: bool = True, any_budget: bool = False) -> tuple[Losses, Importance]:
        """Return the losses, given or measured now, and the importance: with `weigh` that measured on the way.

        any_budget: measure all candidates, whatever the budget of the request.
        """
        losses, importance, largest = self.losses, self.importance, self._read_largest_types()
        if losses is None:
            weigh = weigh and self.measures_importance
            scored = self.score(self.types, weigh=weigh) if any_budget else self._score_candidates(weigh)
            losses = scored.losses
            importance = measured_importance(scored) or importance
        self.request.try_rules(losses)
        losses = self.add_cache_losses(losses)
        return losses if largest is None else largest(losses), importance

    def add_cache_losses(self, losses: Losses) -> Losses:
        """Return the losses; where cache types are to be chosen, with those of the KV cache, measured now."""
        if AUTO not in (self.request.cache_type_k, self.request.cache_type_v) or losses.caches:
            return losses
        return replace(losses, caches=self._measure_caches())

    def _read_largest_types(self) -> Callable[[Losses], Losses] | None:
        """Return, for --like, what limits losses to no larger types than the other model has."""
        if not isinstance(self.plan_from, FromBudget) or self.plan_from.like is None:
            return None
        from requant.planning.recipe import losses_like, types_like

        with open_source(self.plan_from.like) as other:
            types, notes = types_like(self.source, other)

        def limit(losses: Losses) -> Losses:
            limited = losses_like(losses, types)
            return replace(limited, notes=(*limited.notes, *notes))

        return limit

    def _measure_caches(self) -> dict[str, float]:
        """Return the loss of each pair of KV cache types."""
        from requant.scoring.kv_cache_loss import CACHES, cache_losses

        check_can_run(self.source, "name the cache types: --cache-type-k and --cache-type-v, q8_0 for one")
        with self.monitor.working("reading text"):
            text = run_interruptible(read_windows, self.calibration, self.source)
        prepare_kernels(self.monitor, {by_name(name) for pair in CACHES for name in pair})
        with self.monitor.progress("measuring caches", len(CACHES) + 1, " models") as advance:
            return run_interruptible(
                cache_losses, self.source, text.windows, threads=self.options.threads, progress=advance
            )

    def _measure_plans(self, losses: Losses, imatrix: Imatrix | None, n: int) -> Plan:
        """Return, of `n` plans near the best, the one of least divergence on text that was not scored with."""
        from requant.planning.rerank import measure_plans, perturbed_plans

        with self.monitor.working("reading text"):
            text = run_interruptible(read_windows, self.calibration, self.source, held_out=True)
        effort = losses.effort if self.options.effort is None else self.options.effort

        def solve(losses: Losses) -> Plan:
            return replace(Planner(self.source, losses, imatrix).best(self.request), effort=effort)

        with self.monitor.working("solving"):
            plans = run_interruptible(perturbed_plans, losses, solve, n)
        with self.monitor.progress("measuring", len(plans) + 1, " models") as advance:
            found = run_interruptible(
                measure_plans,
                self.source,
                plans,
                text.windows,
                imatrix=imatrix,
                threads=self.options.threads,
                progress=advance,
            )
        klds = [evaluation.mean_kld or 0.0 for evaluation in found]
        best = klds.index(min(klds))
        note = (
            f"the best of {len(plans)} plans by divergence on held-out text; that of the first was {klds[0]:.3g} nats"
        )
        return replace(plans[best], measured_kld=klds[best], notes=(*plans[best].notes, note))

    def _score_candidates(self, weigh: bool) -> ScoringResult:
        """Score, or return losses that keep every tensor if the model fits as it is. Raise first if no plan fits."""
        check_feasible(
            self.source,
            self.request,
            self.types,
            imatrix=self.imatrix,
            allow_requantize=self.options.allow_requantize,
            has_importance=weigh,
            method=self.method_to_come,
        )
        whole = self.losses_without_scoring()
        return self.score(self.types, weigh=weigh) if whole is None else ScoringResult(whole)

    def score(self, types: tuple[str, ...], *, weigh: bool) -> ScoringResult:
        """Measure the losses of `types`; weigh: measure importance on the way."""
        options = ScoringOptions(
            types=types,
            imatrix=self.imatrix,
            effort=Effort.DEFAULT if self.options.effort is None else self.options.effort,
            allow_requantize=self.options.allow_requantize,
            weigh=weigh,
            threads=self.options.threads,
            cluster=self.cluster,
        )
        scored = score(self.source, self.calibration, options, self.monitor)
        if not self.options.no_imatrix or scored.losses.method != GRADIENTS:
            return scored
        note = "no importance was measured: --no-imatrix was given, or no file (-o FILE) to keep it beside"
        return replace(scored, losses=replace(scored.losses, notes=(*scored.losses.notes, note)))


def measured_importance(scored: ScoringResult) -> Importance | None:
    """Return the importance that was measured while scoring, None without any."""
    imatrix, text = scored.losses.importance, scored.losses.calibration_text
    if scored.statistics is None or text is None or not isinstance(imatrix, Imatrix):
        return None
    return Importance(imatrix, statistics=(scored.statistics, text))


def open_session(
    source: Source,
    request: PlanRequest,
    calibration: CalibrationOptions,
    plan_from: PlanFrom | None = None,
    options: SessionOptions | None = None,
    *,
    cluster: Cluster | None = None,
    monitor: Monitor = SILENT,
) -> Session:
    """Open a session: read the small input files. Raises BadInput, InputOutputError.

    plan_from: by default the budget of the request.
    """
    plan_from, options = plan_from or FromBudget(), options or SessionOptions()
    imatrix = options.imatrix or calibration.statistics
    if options.no_imatrix and imatrix is not None:
        raise UsageError("--no-imatrix and --imatrix or --statistics cannot be given together")
    if options.no_compensate and options.compensate is not None:
        raise UsageError("--compensate and --no-compensate cannot be given together")
    source.add_to_inputs()
    groups = (request, calibration, options)
    add_model_inputs(*plan_from_option(plan_from).values(), *(getattr(g, f.name) for g in groups for f in fields(g)))
    losses = read_losses(options.losses) if isinstance(options.losses, Path) else options.losses
    plan = plan_from.plan if isinstance(plan_from, FromPlan) else None
    plan = read_any_plan(plan) if isinstance(plan, Path) else plan
    importance = find_importance(imatrix, plan, losses, source, off=options.no_imatrix)
    session = Session(
        source=source,
        request=request,
        calibration=calibration,
        plan_from=plan_from,
        options=options,
        importance=importance,
        losses=losses,
        plan=plan,
        cluster=cluster,
        monitor=monitor,
    )
    session.check_rounding()
    session.check_loss_unit()
    return session


def connect_cluster(address: str | None, tell: Callable[[str], None]) -> AbstractContextManager[Cluster | None]:
    """Connect to the Dask cluster at `address`, None without one; `tell` takes its lines. Raises as `Cluster` does."""
    if address is None:
        return nullcontext()
    from requant.common.cluster import Cluster
    from requant.formats.jit import fingerprint

    return Cluster(address, fingerprint, tell)


def apply_nonfinite_policy(source: Source, options: SessionOptions, monitor: Monitor) -> None:
    """Apply --nonfinite: with `keep-type`, read all of the model and preserve the tensors that hold NaN or infinity."""
    from requant.model.nonfinite import preserve_nonfinite

    if options.nonfinite != KEEP_TYPE:
        return
    prepare_kernels(monitor, {t.format for t in source.tensors}, Purpose.DECODE)
    with monitor.progress("scanning", sum(t.n_bytes for t in source.tensors)) as advance:
        found = run_interruptible(preserve_nonfinite, source, threads=options.threads, progress=advance)
    monitor.warn(*found)
