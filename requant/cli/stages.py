"""The stages that several commands run, with their progress on stderr.

What leaves nothing behind when it is stopped runs in a thread of its own (`messages.interruptible`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.cli import messages
from requant.cli.words import signed
from requant.container.files import Identity, identity
from requant.container.source import Source, open_source, require_model
from requant.conversion import read_any_plan
from requant.formats import Effort, by_name
from requant.model.roles import never_quantize
from requant.pipeline import check_feasible, make_plan, off_plan
from requant.plan import PLAN_SCHEMA, Losses, Plan, read_losses, read_plan
from requant.textfile import has_schema
from requant.wishes import AUTO, Wishes

if TYPE_CHECKING:
    from requant.cli.calibration import Calibration
    from requant.cluster import Cluster
    from requant.evaluate import Evaluation
    from requant.imatrix import Imatrix
    from requant.statistics import Statistics
    from requant.verify import Verification


@dataclass(frozen=True, slots=True)
class Scored:
    """Losses, and for encoders that are to weigh by it what was measured on the way: statistics, and of which text."""

    losses: Losses
    measured: tuple[Statistics, str] | None = None


def score(
    source: Source,
    types: tuple[str, ...],
    imatrix: Imatrix | None,
    calibration: Calibration,
    *,
    threads: int | None,
    allow_requantize: bool,
    effort: Effort | None,
    weigh: bool = False,
    cluster: Cluster | None = None,
) -> Scored:
    """The losses of `types`, by default sensitivity.DEFAULT_TYPES: from gradients wherever the model can be run.

    weigh: the encoders are to weigh columns by what is measured on the way, where no imatrix is given.
    """
    from requant import fisher, sensitivity

    types = types or sensitivity.DEFAULT_TYPES
    messages.prepare_kernels({t.format for t in source.tensors} | {by_name(name) for name in types})
    common: dict[str, Any] = {
        "types": types,
        "threads": threads,
        "cluster": cluster,
        "allow_requantize": allow_requantize,
        "effort": Effort.DEFAULT if effort is None else effort,
    }
    if calibration.statistics is not None:
        statistics = read_importance(calibration.statistics, source)
        assert statistics is not None
        with messages.progress("scoring", len(source.tensors), " tensors") as advance:
            losses = messages.interruptible(
                fisher.score_by_statistics, source, statistics, imatrix=imatrix, progress=advance, **common
            )
        return Scored(losses)
    reason = None if calibration.quick else fisher.cannot_run(source)
    if calibration.quick or reason is not None:
        if reason is not None:
            messages.warn(f"scoring without gradients, which makes worse plans: {reason}")
        with messages.progress("scoring", sum(t.n_bytes for t in source.tensors)) as advance:
            return Scored(
                messages.interruptible(sensitivity.score, source, imatrix=imatrix, progress=advance, **common)
            )
    with messages.working("reading text"):
        text = messages.interruptible(calibration.windows, source)
    messages.warn(*text.notes)
    with messages.progress("scoring", fisher.n_steps(source), " layers") as advance:
        found = messages.interruptible(
            fisher.score_by_gradients,
            source,
            text.windows,
            text=text.name,
            imatrix=imatrix,
            weigh=weigh,
            progress=advance,
            **common,
        )
    return Scored(found.losses, (found.statistics, text.name) if weigh and imatrix is None else None)


def calibrate(
    source: Source,
    calibration: Calibration,
    out: Path,
    *,
    force: bool,
    inputs: frozenset[Identity],
    no_gradients: bool,
    max_memory: int | None,
    threads: int | None,
) -> Statistics:
    """The statistics of the model on the text, written to `out`; what a stopped run has done is kept beside it."""
    from requant import calibrate as calibrate_
    from requant.container.part import Part
    from requant.statistics import write_statistics

    with Part(out, 0, force=force, inputs=inputs):
        pass
    with messages.working("reading text"):
        text = messages.interruptible(calibration.windows, source)
    messages.warn(*text.notes)
    how: dict[str, Any] = {"gradients": not no_gradients, "max_memory": max_memory, "threads": threads}
    messages.prepare_kernels({t.format for t in source.tensors}, encode=False)
    n_batches = calibrate_.n_batches(source, text.windows, **how)
    kept = out.with_name(f"{out.name}.part.npz")
    steps = calibrate_.n_steps(source, n_batches, gradients=not no_gradients)
    with messages.progress("calibrating", steps, " layers") as advance:
        found = messages.interruptible(calibrate_.calibrate, source, text.windows, kept=kept, progress=advance, **how)
    write_statistics(out, found, source, text.name, force=force, inputs=inputs)
    kept.unlink(missing_ok=True)
    return found


def evaluate(source: Source, base: Source | None, calibration: Calibration, threads: int | None) -> Evaluation:
    """The figures of the model on the text, and its divergence from `base`."""
    from requant import evaluate as evaluate_
    from requant.model.forward.passes import model_of
    from requant.model.forward.weights import Weights

    sources = [source] if base is None else [source, base]
    model, reference = model_of(Weights(source)), None if base is None else model_of(Weights(base))
    if reference is not None:
        evaluate_.check_base(model, reference)
    with messages.working("reading text"):
        text = messages.interruptible(calibration.windows, source)
    messages.prepare_kernels({t.format for s in sources for t in s.tensors}, encode=False)
    steps = sum(m.architecture.n_layers for m in (model, reference) if m is not None) + 1
    with messages.progress("evaluating", steps, " layers") as advance:
        found = messages.interruptible(
            evaluate_.evaluate, model, text.windows, base=reference, threads=threads, progress=advance
        )
    of, base_name = source.header_sha256, None if base is None else base.name
    return replace(found, model=source.name, header_sha256=of, base=base_name, text=text.name)


def check_can_run(source: Source) -> None:
    """Raise BadInput where the forward pass does not know the model."""
    from requant.fisher import cannot_run

    reason = cannot_run(source)
    if reason is not None:
        raise reason


def read_importance(path: Path | None, source: Source) -> Imatrix | None:
    """The importance matrix in the file at `path`, if one is given; raises BadInput where it is of another model."""
    if path is None:
        return None
    from requant.imatrix import coverage, read_imatrix

    arch, imatrix = require_model(source), read_imatrix(path)
    coverage(imatrix, [t for t in source.tensors if never_quantize(arch, t.name, t.shape, t.type_id) is None])
    return imatrix


@dataclass(frozen=True, slots=True)
class Job:
    """A model and all that was said of how to plan for it and to convert it."""

    source: Source
    wishes: Wishes
    calibration: Calibration
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
    statistics: tuple[Statistics, str] | None = None  # the importance matrix was measured, on that text
    cluster: Cluster | None = None

    @property
    def scores(self) -> bool:
        """Whether a plan takes scoring, which may take hours."""
        others = (self.plan_file, self.type_name, self.preset, self.losses)
        return self.wishes.has_budget and all(other is None for other in others)

    def planned(self, *, weigh: bool = False, measure: int | None = None) -> tuple[Plan, Job]:
        """The plan of the file, for the one type, or for the budget, then scored if no losses are given.

        --effort, where it is given, replaces that of the plan or the losses. weigh: the job that comes with it converts
        with importance measured by the scoring, where no imatrix was given. measure: of so many plans near the best,
        the one of least measured divergence.
        """
        plan, job = self._planned(weigh, measure)
        return signed(plan, self, measure), job

    def _planned(self, weigh: bool, measure: int | None) -> tuple[Plan, Job]:
        if self.plan_file is not None:
            return read_any_plan(self.plan_file), self
        if self.type_name is not None:
            from requant.recipe import uniform_plan

            request, again = self.wishes.request, self.allow_requantize
            plan = uniform_plan(
                self.source, self.type_name, imatrix=self.imatrix, request=request, allow_requantize=again
            )
            return plan, self
        if self.preset is not None:
            from requant.recipe import preset_plan

            again = self.allow_requantize
            return preset_plan(self.source, self.preset, imatrix=self.imatrix, allow_requantize=again), self
        if self.like is not None and not self.wishes.has_budget:
            from requant.recipe import clone_plan

            with open_source(self.like) as other:
                return clone_plan(self.source, other, allow_requantize=self.allow_requantize), self
        job, losses = self.scored(weigh=weigh)
        if measure is not None:
            return job._least(losses, measure), job
        with messages.working("solving"):
            return messages.interruptible(make_plan, self.source, losses, self.wishes, imatrix=job.imatrix), job

    def scored(self, *, weigh: bool = False) -> tuple[Job, Losses]:
        """The losses, given or measured now; the job to go on with, which has them and any importance measured."""
        losses, job = self.losses, self
        if losses is None:
            scored = self._scored(weigh)
            losses = scored.losses
            if scored.measured is not None:
                statistics, name = scored.measured
                job = replace(self, imatrix=statistics.imatrix(self.source, name), statistics=scored.measured)
        self.wishes.try_rules(losses)
        if AUTO in (self.wishes.cache_type_k, self.wishes.cache_type_v) and not losses.caches:
            losses = replace(losses, caches=self._cache_losses())
            job = replace(job, losses=losses if job.losses is not None else None)
        if self.like is not None:
            from requant.recipe import losses_like, types_like

            with open_source(self.like) as other:
                types, notes = types_like(self.source, other)
            limited = losses_like(losses, types)
            return job, replace(limited, notes=(*limited.notes, *notes))
        return job, losses

    def _cache_losses(self) -> dict[str, float]:
        """What rounding the KV cache costs the model, by type."""
        from requant import trial

        check_can_run(self.source)
        with messages.working("reading text"):
            text = messages.interruptible(self.calibration.windows, self.source)
        messages.prepare_kernels({by_name(name) for pair in trial.CACHES for name in pair})
        with messages.progress("measuring caches", len(trial.CACHES) + 1, " models") as advance:
            return messages.interruptible(
                trial.cache_losses, self.source, text.windows, threads=self.threads, progress=advance
            )

    def _least(self, losses: Losses, n: int) -> Plan:
        """Of `n` plans near the best, the one of least divergence on text that was not scored with."""
        from requant import trial

        with messages.working("reading text"):
            text = messages.interruptible(self.calibration.windows, self.source, held_out=True)
        effort = losses.effort if self.effort is None else self.effort

        def solve(losses: Losses) -> Plan:
            return replace(make_plan(self.source, losses, self.wishes, imatrix=self.imatrix), effort=effort)

        with messages.working("solving"):
            plans = messages.interruptible(trial.near_optimal, losses, solve, n)
        with messages.progress("measuring", len(plans) + 1, " models") as advance:
            found = messages.interruptible(
                trial.measured,
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

    def _scored(self, weigh: bool) -> Scored:
        from requant.fisher import cannot_run
        from requant.sensitivity import DEFAULT_TYPES

        types, again = self.wishes.types_to_score(DEFAULT_TYPES), self.allow_requantize
        measured = weigh and not self.calibration.quick and cannot_run(self.source) is None
        check_feasible(
            self.source, self.wishes, types, imatrix=self.imatrix, allow_requantize=again, has_importance=measured
        )
        return score(
            self.source,
            types,
            self.imatrix,
            self.calibration,
            threads=self.threads,
            allow_requantize=again,
            effort=self.effort,
            weigh=weigh,
            cluster=self.cluster,
        )


def prepared(
    source: Source,
    wishes: Wishes,
    calibration: Calibration,
    *,
    imatrix: Path | None = None,
    losses: Path | None = None,
    plan_file: Path | None = None,
    type_name: str | None = None,
    preset: str | None = None,
    like: Path | None = None,
    threads: int | None = None,
    allow_requantize: bool = False,
    effort: Effort | None = None,
) -> Job:
    """The job with its small files read."""
    imatrix = imatrix if calibration.statistics is None or imatrix is not None else calibration.statistics
    matrix = read_importance(imatrix, source)
    found = None if losses is None else read_losses(losses)
    paths = imatrix, losses, plan_file, like, calibration.text, calibration.tokens, calibration.statistics
    inputs = source.identities | identities(*paths)
    return Job(
        source=source,
        wishes=wishes,
        calibration=calibration,
        imatrix=matrix,
        losses=found,
        losses_file=losses,
        inputs=inputs,
        plan_file=plan_file,
        type_name=type_name,
        preset=preset,
        like=like,
        threads=threads,
        allow_requantize=allow_requantize,
        effort=effort,
    )


def connected(address: str | None) -> AbstractContextManager[Cluster | None]:
    """The cluster at `address`, None without one. Raises as `Cluster` does."""
    if address is None:
        return nullcontext()
    from requant.cluster import Cluster

    return Cluster(address, messages.tell)


def identities(*paths: Path | None) -> frozenset[Identity]:
    """Of the files that are there: no output may be one of them."""
    found = set()
    for path in paths:
        with suppress(OSError, ValueError):
            if path is not None:
                found.add(identity(path.stat()))
    return frozenset(found)


def verify(out: Path, source: Source | None, wanted: Path | None, threads: int | None) -> Verification:
    """What is wrong with `out`; `wanted` is a plan, or the record where it is not beside `out`."""
    from requant import verify as checks

    plan = read_plan(wanted) if wanted is not None and has_schema(wanted, PLAN_SCHEMA) else None
    with open_source(out) as target:
        messages.prepare_kernels(checks.formats_read(target, source), encode=False)
        total = sum(t.n_bytes for t in target.tensors)
        differences = () if plan is None else tuple(off_plan(target, plan))
    how: Any = {"source": source, "record": wanted if plan is None else None, "threads": threads}
    with messages.progress("verifying", total) as advance:
        found = messages.interruptible(checks.verify, out, **how, progress=advance)
    if plan is None:
        return found
    return replace(found, against=(*found.against, "plan"), findings=(*found.findings, *differences))
