"""A model and all that was said of how to plan for it and to convert it, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.invocation import record_options
from requant.api.kernels import prepare_kernels
from requant.api.measure import check_can_run, read_importance, score
from requant.common.files import Identity, identities
from requant.common.interrupt import run_interruptible
from requant.common.monitor import SILENT, Monitor
from requant.container.source import Source, open_source
from requant.conversion.record import read_any_plan
from requant.errors import UsageError
from requant.formats import Effort, by_name
from requant.planning.best_plan import check_feasible, fits_as_it_is, make_plan
from requant.planning.plan import Plan
from requant.planning.request import AUTO, PlanRequest
from requant.scoring.calibration_data import CalibrationOptions
from requant.scoring.losses import Losses, ScoringResult, read_losses
from requant.scoring.options import DEFAULT_TYPES, ScoringOptions

if TYPE_CHECKING:
    from requant.common.cluster import Cluster
    from requant.container.imatrix import Imatrix
    from requant.scoring.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Session:
    """A model and all that was said of how to plan for it and to convert it."""

    source: Source
    request: PlanRequest
    calibration: CalibrationOptions
    imatrix: Imatrix | None
    losses: Losses | None
    losses_file: Path | None
    inputs: frozenset[Identity]
    plan_file: Path | None
    type_name: str | None
    preset: str | None
    like: Path | None
    threads: int | None
    allow_requantize: bool
    effort: Effort | None
    given_plan: Plan | None = None
    statistics: tuple[Statistics, str] | None = None  # the importance matrix was measured, on that text
    cluster: Cluster | None = None
    monitor: Monitor = SILENT

    @property
    def scores(self) -> bool:
        """Whether a plan takes scoring, which may take hours."""
        others = (self.plan_file, self.given_plan, self.type_name, self.preset, self.losses)
        return self.request.has_budget and all(other is None for other in others)

    def check_measure(self, n: int | None) -> None:
        """Raise what is wrong with measuring `n` plans near the best, None where none is to be measured."""
        if n is None:
            return
        if not self.request.has_budget:
            raise UsageError("--measure chooses among plans for a budget; give --vram, --size or --bpw with it")
        check_can_run(self.source)

    def planned(self, *, weigh: bool = False, measure: int | None = None) -> tuple[Plan, Session]:
        """The plan of the file, for the one type, or for the budget, then scored if no losses are given.

        --effort, where it is given, replaces that of the plan or the losses. weigh: the job that comes with it converts
        with importance measured by the scoring, where no imatrix was given. measure: of so many plans near the best,
        the one of least measured divergence.
        """
        plan, job = self._planned(weigh, measure)
        return record_options(plan, self, measure), job

    def _planned(self, weigh: bool, measure: int | None) -> tuple[Plan, Session]:
        given = self.given_plan if self.plan_file is None else read_any_plan(self.plan_file)
        if given is not None:
            return given, self
        if self.type_name is not None:
            from requant.planning.recipe import uniform_plan

            constraints, again = self.request.constraints, self.allow_requantize
            plan = uniform_plan(
                self.source, self.type_name, imatrix=self.imatrix, constraints=constraints, allow_requantize=again
            )
            return plan, self
        if self.preset is not None:
            from requant.planning.recipe import preset_plan

            again = self.allow_requantize
            return preset_plan(self.source, self.preset, imatrix=self.imatrix, allow_requantize=again), self
        if self.like is not None and not self.request.has_budget:
            from requant.planning.recipe import clone_plan

            with open_source(self.like) as other:
                return clone_plan(self.source, other, allow_requantize=self.allow_requantize), self
        job, losses = self.scored(weigh=weigh)
        if measure is not None:
            return job._least(losses, measure), job
        with self.monitor.working("solving"):
            return run_interruptible(make_plan, self.source, losses, self.request, imatrix=job.imatrix), job

    def as_it_is(self) -> Losses | None:
        """Losses that leave every tensor as it is, where nothing that was asked for could ask for more."""
        return None if self.like is not None else fits_as_it_is(self.source, self.request)

    def least_bytes(self) -> int:
        """Bytes that no output of these types can be without: those of the smallest candidate of every tensor."""
        from requant.scoring.candidates import survey

        types = self.request.types_to_score(DEFAULT_TYPES)
        tensors = survey(self.source, types=types, imatrix=self.imatrix, has_importance=True)
        return sum(min(c.n_bytes for c in t.candidates) for t in tensors)

    def scored(self, *, weigh: bool = False) -> tuple[Session, Losses]:
        """The losses, given or measured now; the job to go on with, which has them and any importance measured."""
        losses, job = self.losses, self
        if losses is None:
            scored = self._scored(weigh)
            losses = scored.losses
            statistics, text = scored.statistics, losses.calibration_text
            if statistics is not None and text is not None:
                job = replace(self, imatrix=statistics.imatrix(self.source, text), statistics=(statistics, text))
        self.request.try_rules(losses)
        if AUTO in (self.request.cache_type_k, self.request.cache_type_v) and not losses.caches:
            losses = replace(losses, caches=self._cache_losses())
            job = replace(job, losses=losses if job.losses is not None else None)
        if self.like is not None:
            from requant.planning.recipe import losses_like, types_like

            with open_source(self.like) as other:
                types, notes = types_like(self.source, other)
            limited = losses_like(losses, types)
            return job, replace(limited, notes=(*limited.notes, *notes))
        return job, losses

    def _cache_losses(self) -> dict[str, float]:
        """What rounding the KV cache costs the model, by type."""
        from requant.scoring import kv_cache_loss as trial

        check_can_run(self.source)
        with self.monitor.working("reading text"):
            text = run_interruptible(self.calibration.windows, self.source)
        prepare_kernels(self.monitor, {by_name(name) for pair in trial.CACHES for name in pair})
        with self.monitor.progress("measuring caches", len(trial.CACHES) + 1, " models") as advance:
            return run_interruptible(
                trial.cache_losses, self.source, text.windows, threads=self.threads, progress=advance
            )

    def _least(self, losses: Losses, n: int) -> Plan:
        """Of `n` plans near the best, the one of least divergence on text that was not scored with."""
        from requant.planning import rerank as trial

        with self.monitor.working("reading text"):
            text = run_interruptible(self.calibration.windows, self.source, held_out=True)
        effort = losses.effort if self.effort is None else self.effort

        def solve(losses: Losses) -> Plan:
            return replace(make_plan(self.source, losses, self.request, imatrix=self.imatrix), effort=effort)

        with self.monitor.working("solving"):
            plans = run_interruptible(trial.perturbed_plans, losses, solve, n)
        with self.monitor.progress("measuring", len(plans) + 1, " models") as advance:
            found = run_interruptible(
                trial.measure_plans,
                self.source,
                plans,
                text.windows,
                imatrix=self.imatrix,
                threads=self.threads,
                progress=advance,
            )
        klds = [evaluation.mean_kld or 0.0 for evaluation in found]
        best = klds.index(min(klds))
        note = (
            f"the best of {len(plans)} plans by divergence on held-out text; that of the first was {klds[0]:.3g} nats"
        )
        return replace(plans[best], measured_kld=klds[best], notes=(*plans[best].notes, note))

    def _scored(self, weigh: bool) -> ScoringResult:
        from requant.scoring.fisher import cannot_run

        types, again = self.request.types_to_score(DEFAULT_TYPES), self.allow_requantize
        measured = weigh and not self.calibration.quick and cannot_run(self.source) is None
        check_feasible(
            self.source, self.request, types, imatrix=self.imatrix, allow_requantize=again, has_importance=measured
        )
        if (whole := self.as_it_is()) is not None:
            return ScoringResult(whole)
        return score(self.source, self.calibration, self.scoring_options(types, weigh=weigh), self.monitor)

    def scoring_options(self, types: tuple[str, ...], *, weigh: bool) -> ScoringOptions:
        """Return the options of scoring these types, by default the usual ones."""
        return ScoringOptions(
            types=types or DEFAULT_TYPES,
            imatrix=self.imatrix,
            effort=Effort.DEFAULT if self.effort is None else self.effort,
            allow_requantize=self.allow_requantize,
            weigh=weigh,
            threads=self.threads,
            cluster=self.cluster,
        )


def open_session(
    source: Source,
    request: PlanRequest,
    calibration: CalibrationOptions,
    *,
    imatrix: Path | None = None,
    losses: Path | Losses | None = None,
    plan: Path | Plan | None = None,
    type_name: str | None = None,
    preset: str | None = None,
    like: Path | None = None,
    threads: int | None = None,
    allow_requantize: bool = False,
    effort: Effort | None = None,
    cluster: Cluster | None = None,
    monitor: Monitor = SILENT,
) -> Session:
    """The job with its small files read."""
    imatrix = imatrix if calibration.statistics is None or imatrix is not None else calibration.statistics
    matrix = read_importance(imatrix, source)
    losses_file, plan_file = (path if isinstance(path, Path) else None for path in (losses, plan))
    found = read_losses(losses) if isinstance(losses, Path) else losses
    paths = imatrix, losses_file, plan_file, like, calibration.text, calibration.tokens, calibration.statistics
    inputs = source.identities | identities(*paths)
    return Session(
        source=source,
        request=request,
        calibration=calibration,
        imatrix=matrix,
        losses=found,
        losses_file=losses_file,
        inputs=inputs,
        plan_file=plan_file,
        type_name=type_name,
        preset=preset,
        like=like,
        threads=threads,
        allow_requantize=allow_requantize,
        effort=effort,
        given_plan=None if isinstance(plan, Path) else plan,
        cluster=cluster,
        monitor=monitor,
    )


def connect_cluster(address: str | None, tell: Callable[[str], None]) -> AbstractContextManager[Cluster | None]:
    """The cluster at `address`, None without one; `tell` takes its lines for the user. Raises as `Cluster` does."""
    if address is None:
        return nullcontext()
    from requant.common.cluster import Cluster
    from requant.formats.jit import fingerprint

    return Cluster(address, fingerprint, tell)
