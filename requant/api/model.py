"""The Python API for models: open one, and score, plan, convert, evaluate and calibrate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.api import convert as converting
from requant.api import measure as measuring
from requant.api import plan as planning
from requant.api import score as scoring
from requant.api import verify as verifying
from requant.api.keywords import (
    Planning,
    Report,
    Scoring,
    Size,
    Where,
    Words,
    check_keywords,
    document_keywords,
    parse_calibration,
    parse_frontier_from,
    parse_plan_from,
    parse_request,
    parse_session_options,
    parse_threads,
)
from requant.api.session import Session, apply_nonfinite_policy, connect_cluster, open_session
from requant.common.inputs import collect_inputs
from requant.common.monitor import SILENT, Progress, report_to
from requant.container.source import Source, open_source, require_model
from requant.container.splitting import Splitting
from requant.conversion.options import KEEP_TYPE, POLICIES, ConversionOptions
from requant.conversion.record import Conversion, read_conversion
from requant.conversion.verification import Verification
from requant.errors import UsageError
from requant.model.inspection import Inspection, inspect
from requant.model.tensor_shapes import describe_misfits
from requant.planning.frontier import Curve
from requant.planning.plan import Plan, read_plan
from requant.planning.request import FromBudget, PlanFrom, PlanRequest
from requant.planning.rules import parse_bytes, parse_count
from requant.scoring.losses import Losses, read_losses
from requant.scoring.options import StatisticsOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from requant.scoring.evaluate import Evaluation
    from requant.scoring.statistics import Statistics

__all__ = ["Model", "Progress", "open", "read_conversion", "read_losses", "read_plan", "verify"]


@dataclass(frozen=True, slots=True)
class Model:
    """An open GGUF model, from `requant.open`; a context manager, or close it.

    path: the file, of a split model any of its files. source: its header and tensors. Every method stands for a
    command, its keywords for the command's options, and does not change the model; several may run at the same time, in
    threads. Ctrl-C raises KeyboardInterrupt and leaves no unfinished result, only a state that the same call resumes.
    """

    path: Path
    source: Source = field(repr=False)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; more than once does no harm."""
        self.source.close()

    def _repr_html_(self) -> str:
        return self.inspect()._repr_html_()

    def inspect(
        self,
        ctx: int | None = None,
        *,
        cache_type_k: str | None = None,
        cache_type_v: str | None = None,
        parallel: int | None = None,
        ubatch: int | None = None,
        reserve: Size | None = None,
    ) -> Inspection:
        """Return types, sizes and VRAM needs at `ctx` tokens, 0 for the model's own; only the header is read.

        The keywords are those of `plan`. Raises BadInput for a file that is no model, UsageError.
        """
        caches = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
        request = parse_request({"ctx": ctx, "parallel": parallel, "ubatch": ubatch, "reserve": reserve, **caches})
        return inspect(self.source, request.settings, request.reserve or 0)

    @document_keywords(Scoring)
    @collect_inputs()
    def score(
        self,
        *,
        types: Words | None = None,
        emit_imatrix: Where | None = None,
        force: bool = False,
        **asked: Unpack[Scoring],
    ) -> Losses:
        """Return the predicted loss of every tensor in each of `types`: nats per token, if from gradients.

        types: ten usual ones by default. The losses hold the importance that was measured on the way, in memory;
        emit_imatrix: a file for it, found again beside losses that are read from a file; force replaces it. The other
        keywords are those of `keywords.Scoring`. Raises BadInput for files that do not fit, UsageError, OutputRefused,
        InputOutputError, NumericFault for weights that are not finite.
        """
        check_keywords(asked, Scoring, "score")
        emitted = None if emit_imatrix is None else Path(emit_imatrix)
        with self._open_session(asked, parse_request({"types": types}), FromBudget()) as session:
            return scoring.score_to_files(session, emitted=emitted, force=force)

    @document_keywords(Planning)
    def plan(self, **asked: Unpack[Planning]) -> Plan:
        """Return the best plan within a budget, that of a preset, or of another model (`like`); scores where needed.

        The keywords are those of `keywords.Planning`: vram="12GiB", ctx=16384, losses=losses. Raises InfeasibleBudget
        where even the smallest plan is over the budget, BadInput, UsageError, and what scoring does.
        """
        check_keywords(asked, Planning, "plan")
        request = parse_request(asked)
        with self._open_session(asked, request, parse_plan_from(request, asked)) as session:
            return session.make_plan().plan

    @document_keywords(Planning)
    def frontier(self, **asked: Unpack[Planning]) -> Curve:
        """Return the whole curve of loss against bytes, 40 plans from the smallest to the largest.

        The keywords are those of `plan`; budgets limit nothing here. Raises as `plan` does.
        """
        check_keywords(asked, Planning, "frontier")
        request = parse_request(asked)
        with self._open_session(asked, request, parse_frontier_from(request, asked)) as session:
            points, losses = planning.compute_curve(session)
        return Curve(losses.source, losses.method, tuple(points))

    @document_keywords(Planning)
    @collect_inputs()
    def convert(
        self,
        out: Where,
        plan: Plan | Where | None = None,
        *,
        type: str | None = None,
        measure: int | None = None,
        compensate: str | bool | None = None,
        no_compensate: bool = False,
        max_memory: Size | None = None,
        nonfinite: str = POLICIES[0],
        no_verify: bool = False,
        keep_split: bool = False,
        max_shard_size: Size | None = None,
        force: bool = False,
        restart: bool = False,
        **asked: Unpack[Planning],
    ) -> Conversion:
        """Convert the model to the file `out`, by a plan, one type for all, a preset or a budget; return its record.

        The output is there only if all went well, its record OUT.requant.json beside it. A run that was stopped goes on
        when it is called in the same way again; restart begins anew. force: replace files that exist. no_verify: read
        neither output nor source again. measure: of so many plans near the best, that of least measured divergence.
        compensate: "fast" (or True) or "best", to run the model and round every weight to make up for the errors of
        those before it; False, or no_compensate: round every weight by itself, whatever the plan says. max_memory:
        bytes that a compensated conversion stays below.
        nonfinite: "keep-type" copies tensors that hold NaN or infinity. keep_split, max_shard_size: how the output is
        split. The other keywords are those of `plan`. Raises what `plan` does, and OutputRefused where the output is
        there or in use, InputOutputError, SourceChanged, NumericFault for weights that do not survive in their type.
        """
        check_keywords(asked, Planning, "convert")
        options = ConversionOptions(_parse_splitting(keep_split, max_shard_size), force=force, verify=not no_verify)
        n = None if measure is None else parse_count(measure, "--measure", 1, 64)
        rounding = {"compensate": compensate, "no_compensate": no_compensate, "max_memory": max_memory}
        with self._open_conversion({**asked, "plan": plan, "type": type, **rounding}, nonfinite) as session:
            return converting.convert_to_file(session, Path(out), options=options, measure=n, restart=restart)

    @document_keywords(Planning)
    @collect_inputs()
    def try_convert(
        self,
        out: Where,
        plan: Plan | Where | None = None,
        *,
        type: str | None = None,
        measure: int | None = None,
        compensate: str | bool | None = None,
        no_compensate: bool = False,
        max_memory: Size | None = None,
        nonfinite: str = POLICIES[0],
        keep_split: bool = False,
        max_shard_size: Size | None = None,
        force: bool = False,
        restart: bool = False,
        **asked: Unpack[Planning],
    ) -> Plan:
        """Return the plan by which `convert` with the same keywords would write, and leave no file.

        Everything is checked that `convert` checks before the first byte; it raises what `convert` raises until then,
        and its notes are RequantWarnings.
        """
        check_keywords(asked, Planning, "try_convert")
        options = ConversionOptions(_parse_splitting(keep_split, max_shard_size), force=force)
        n = None if measure is None else parse_count(measure, "--measure", 1, 64)
        rounding = {"compensate": compensate, "no_compensate": no_compensate, "max_memory": max_memory}
        with self._open_conversion({**asked, "plan": plan, "type": type, **rounding}, nonfinite) as session:
            found = converting.try_conversion(session, Path(out), options=options, measure=n, restart=restart)
            session.monitor.warn(*found.prepared.notes)
            return found.planned.plan

    def evaluate(
        self,
        *,
        text: Where | None = None,
        tokens: Where | None = None,
        base: Model | Where | None = None,
        windows: int | None = None,
        window: int = 512,
        engine: bool = False,
        threads: int | None = None,
        progress: Report | None = None,
    ) -> Evaluation:
        """Return the perplexity on a text or on tokens, and the divergence from `base` in nats per token.

        windows: how many of the text's are run, all by default; window: tokens of each, of which the second half is
        scored. engine: measure in llama.cpp, as for an architecture that requant does not know, with a warning. Raises
        BadInput for a model that cannot be run, a base of another vocabulary or a text that is too short, UsageError
        also without the extra `engine`, NumericFault.
        """
        if (text is None) == (tokens is None):
            raise UsageError("say what to evaluate on: --text FILE or --tokens FILE")
        given = {"text": text, "tokens": tokens, "windows": windows, "window": window}
        asked, n = parse_calibration(given), parse_threads(threads)
        with _open_other(base) as other:
            return measuring.evaluate(self.opened(), other, asked, report_to(progress), threads=n, engine=engine)

    @collect_inputs()
    def calibrate(
        self,
        out: Where,
        *,
        text: Where | None = None,
        tokens: Where | None = None,
        windows: int = 32,
        window: int = 512,
        no_gradients: bool = False,
        max_memory: Size | None = None,
        engine: bool = False,
        threads: int | None = None,
        force: bool = False,
        progress: Report | None = None,
    ) -> Statistics:
        """Return statistics of the model on a text, and write them to `out`, an imatrix that llama-quantize reads too.

        no_gradients: only inputs, in a third of the time. max_memory: bytes that the run stays below. engine: only
        inputs, by llama.cpp, as for an architecture that requant does not know, with a warning. A run that was
        stopped goes on when it is called in the same way again. Raises BadInput for a model that cannot be run or a
        text that is too short, UsageError also without the extra `engine`, NumericFault, OutputRefused,
        InputOutputError.
        """
        asked = parse_calibration({"text": text, "tokens": tokens, "windows": windows, "window": window})
        options = StatisticsOptions(
            gradients=not no_gradients,
            max_memory=None if max_memory is None else parse_bytes(max_memory, "--max-memory"),
            threads=parse_threads(threads),
            engine=engine,
        )
        return measuring.calibrate(self.opened(), asked, options, Path(out), report_to(progress), force=force)

    @contextmanager
    def _open_conversion(self, asked: Mapping[str, Any], nonfinite: str) -> Iterator[Session]:
        """Open a session to convert with; `asked` may have a plan or a type too."""
        if nonfinite not in POLICIES:
            raise UsageError(f"--nonfinite must be {' or '.join(POLICIES)}")
        request = parse_request(asked)
        plan_from = parse_plan_from(request, asked)
        with self._open_session(asked, request, plan_from, nonfinite) as session:
            yield session

    @contextmanager
    def _open_session(
        self, asked: Mapping[str, Any], request: PlanRequest, plan_from: PlanFrom, nonfinite: str = POLICIES[0]
    ) -> Iterator[Session]:
        """Open a session with the other keywords, of a source of its own where the policy may change that."""
        calibration = parse_calibration(asked)
        options = replace(parse_session_options(asked), nonfinite=nonfinite)
        monitor = report_to(asked.get("progress"))
        with ExitStack() as stack:
            source = stack.enter_context(open_source(self.path)) if nonfinite == KEEP_TYPE else self.opened()
            apply_nonfinite_policy(source, options, monitor)
            workers = stack.enter_context(connect_cluster(asked.get("cluster"), monitor.info))
            yield open_session(source, request, calibration, plan_from, options, cluster=workers, monitor=monitor)

    def opened(self) -> Source:
        """Return the source. Raises UsageError where the model is closed."""
        if self.source.is_closed:
            raise UsageError("the model is closed; open it again")
        return self.source


def _parse_splitting(keep_split: bool, max_shard_size: Size | None) -> Splitting:
    most = None if max_shard_size is None else parse_bytes(max_shard_size, "--max-shard-size")
    return Splitting(keep_split, most)


def open(path: Where) -> Model:
    """Open the model in the GGUF file at `path`; of a split one, any of its files. Only the header is read.

    Anomalies of the file are RequantWarnings. Raises BadInput for a file that is no valid model, InputOutputError.
    """
    source = open_source(Path(path))
    try:
        require_model(source)
    except BaseException:
        source.close()
        raise
    SILENT.warn(*source.warnings, *describe_misfits(source))
    return Model(source.path, source)


def verify(
    out: Where,
    *,
    source: Model | Where | None = None,
    plan: Plan | Where | None = None,
    full: bool = False,
    imatrix: Where | None = None,
    threads: int | None = None,
    progress: Report | None = None,
) -> Verification:
    """Read every byte of the file `out`, and compare it with its record or its digests, a plan and its source.

    plan: a plan, or the file of one, or a record that is not beside `out`. full: encode the source again by the plan,
        the record or the types in `out`, and compare every byte; imatrix: the file of the importance that `out` was
        made with. The result's `verdict` and `compared` say what that shows; `findings` are no exception. Raises
        BadInput for a file that is no GGUF or an imatrix that is not the same, UsageError, InputOutputError.
    """
    wanted = plan if plan is None or isinstance(plan, Plan) else Path(plan)
    n = parse_threads(threads)
    with _open_other(source) as origin:
        return verifying.verify(
            *(Path(out), origin, wanted, report_to(progress)),
            full=full,
            imatrix=None if imatrix is None else Path(imatrix),
            threads=n,
        )


def _open_other(model: Model | Where | None) -> AbstractContextManager[Source | None]:
    """Open the source of a model that is given beside another one; an open model stays open."""
    if isinstance(model, Model):
        return nullcontext(model.opened())
    return nullcontext() if model is None else open_source(Path(model))
