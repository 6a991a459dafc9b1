"""The Python API for models: open one, and score, plan, convert, evaluate and calibrate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.api import convert as converting
from requant.api import measure as measuring
from requant.api import plan as planning
from requant.api import score as scoring
from requant.api import verify as verifying
from requant.api.convert import KEEP_TYPE, POLICIES, apply_nonfinite_policy
from requant.api.keywords import (
    Planning,
    Report,
    Scoring,
    Size,
    Where,
    Words,
    check_known,
    count_of,
    keywords,
    parse_calibration,
    parse_options,
    parse_request,
    size_of,
    types_of,
)
from requant.api.session import Session, connect_cluster, open_session
from requant.common.files import identities
from requant.common.monitor import SILENT, Progress, report_to
from requant.container.source import Source, open_source, require_model
from requant.container.splitting import Splitting
from requant.conversion.options import ConversionOptions
from requant.conversion.record import read_conversion
from requant.conversion.verify import Verification
from requant.errors import UsageError
from requant.model.inspection import Inspection, inspect
from requant.planning.frontier import Curve
from requant.planning.plan import Plan, read_plan
from requant.planning.request import MAX_CONTEXT, PlanRequest, check_type_source
from requant.scoring.losses import Losses, read_losses
from requant.scoring.options import StatisticsOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from requant.conversion.record import Conversion
    from requant.scoring.evaluate import Evaluation
    from requant.scoring.statistics import Statistics

__all__ = ["Model", "Progress", "open", "read_conversion", "read_losses", "read_plan", "verify"]


@dataclass(frozen=True, slots=True)
class Model:
    """An open GGUF model, from `requant.open`; a context manager, or close it.

    path: the file, of a split model any of its files. source: its header and tensors, as the library's rooms take
    them. Every method stands for a command, its keywords for the command's options, and leaves the model as it was;
    several may run at the same time, in threads. Ctrl-C raises KeyboardInterrupt and leaves no unfinished result, only
    what the same call goes on with.
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
        """What the model is made of and what it needs in VRAM at `ctx` tokens, 0 for its own; only the header is read.

        The keywords are those of `plan`. Raises BadInput for what is no model, UsageError.
        """
        caches = {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v}
        asked = {"ctx": ctx, "parallel": parallel, "ubatch": ubatch, "reserve": reserve, **caches}
        request = parse_request(asked)
        return inspect(self.source, request.settings, request.reserve or 0)

    @keywords(Scoring)
    def score(
        self,
        *,
        types: Words | None = None,
        emit_imatrix: Where | None = None,
        force: bool = False,
        **asked: Unpack[Scoring],
    ) -> Losses:
        """The predicted loss of every tensor at every one of `types`: nats per token, if from gradients.

        types: ten usual ones by default. emit_imatrix: a file for the importance that was measured on the way; force
        replaces it. The other keywords are those of `keywords.Scoring`. Raises BadInput for files that do not fit,
        UsageError, NumericFault for weights that are not finite, OutputRefused, InputOutputError.
        """
        check_known(asked, Scoring, "score")
        request = PlanRequest(types=() if types is None else types_of("--types", types))
        with self._job(asked, request) as job:
            emitted = None if emit_imatrix is None else Path(emit_imatrix)
            return scoring.score_to_files(job, emitted=emitted, force=force)

    @keywords(Planning)
    def plan(self, **asked: Unpack[Planning]) -> Plan:
        """The best plan within a budget, a preset's, or another model's (`like`); scored first if no losses are given.

        The keywords are those of `keywords.Planning`: vram="12GiB", ctx=16384, losses=losses. Raises InfeasibleBudget
        where even the smallest plan is over the budget, BadInput, UsageError, and what scoring does.
        """
        check_known(asked, Planning, "plan")
        with self._job(asked, parse_request(asked)) as job:
            check_type_source(job.request, None, None, job.preset, job.like)
            return job.planned()[0]

    @keywords(Planning)
    def frontier(self, **asked: Unpack[Planning]) -> Curve:
        """The whole curve of loss against bytes, 40 plans from the smallest to the largest.

        The keywords are those of `plan`; what limits bytes has no say but in the context. Raises as `plan` does.
        """
        check_known(asked, Planning, "frontier")
        with self._job(asked, parse_request(asked)) as job:
            if job.request.n_ctx == MAX_CONTEXT:
                raise UsageError("--frontier is of one context; give --ctx a number")
            points, losses = planning.compute_curve(job)
        return Curve(losses.source, losses.method, tuple(points))

    @keywords(Planning)
    def convert(
        self,
        out: Where,
        plan: Plan | Where | None = None,
        *,
        type: str | None = None,
        measure: int | None = None,
        nonfinite: str = POLICIES[0],
        no_verify: bool = False,
        keep_split: bool = False,
        max_shard_size: Size | None = None,
        force: bool = False,
        restart: bool = False,
        **asked: Unpack[Planning],
    ) -> Conversion:
        """What became of the model in the file `out`, by a plan, one type for all, a preset or a budget.

        The output is there only if all went well, its record OUT.requant.json beside it. A run that was stopped goes on
        when it is called in the same way again; restart begins anew. force: replace files that exist. no_verify: do not
        read the output again. measure: of so many plans near the best, that of least measured divergence. nonfinite:
        "keep-type" copies tensors that hold NaN or infinity. keep_split, max_shard_size: how the output is split. The
        other keywords are those of `plan`. Raises what `plan` does, and OutputRefused where the output is there or in
        use, InputOutputError, SourceChanged, NumericFault for weights that do not survive in their type.
        """
        check_known(asked, Planning, "convert")
        if nonfinite not in POLICIES:
            raise UsageError(f"--nonfinite must be {' or '.join(POLICIES)}")
        parts = Splitting(keep_split, None if max_shard_size is None else size_of("--max-shard-size", max_shard_size))
        with self._job(
            {**asked, "plan": plan, "type": type}, parse_request(asked), fresh=nonfinite == KEEP_TYPE
        ) as job:
            decided = plan, job.type_name, job.preset, job.like
            check_type_source(job.request, *decided)
            apply_nonfinite_policy(job.source, nonfinite, job.monitor, threads=job.threads)
            options = ConversionOptions(parts, force=force, verify=not no_verify)
            n = None if measure is None else count_of("--measure", measure, 1, 64)
            return converting.convert_to_file(job, Path(out), options=options, measure=n, restart=restart)

    def evaluate(
        self,
        *,
        text: Where | None = None,
        tokens: Where | None = None,
        base: Model | Where | None = None,
        windows: int | None = None,
        window: int = 512,
        threads: int | None = None,
        progress: Report | None = None,
    ) -> Evaluation:
        """Perplexity on a text, or on tokens, and the divergence from `base`, in nats per token.

        windows: how many of the text's are run, all by default; window: tokens of each, of which the second half is
        scored. Raises BadInput for a model that cannot be run, a base of another vocabulary or a text that is too
        short, UsageError, NumericFault.
        """
        if (text is None) == (tokens is None):
            raise UsageError("say what to evaluate on: --text FILE or --tokens FILE")
        given = {"text": text, "tokens": tokens, "windows": windows, "window": window}
        asked, n = parse_calibration(given), None if threads is None else count_of("--threads", threads, 1, 1024)
        with ExitStack() as stack:
            other = base.opened() if isinstance(base, Model) else None
            if base is not None and not isinstance(base, Model):
                other = stack.enter_context(open_source(Path(base)))
            return measuring.evaluate(self.opened(), other, asked, report_to(progress), threads=n)

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
        threads: int | None = None,
        force: bool = False,
        progress: Report | None = None,
    ) -> Statistics:
        """Statistics of the model on a text, written to `out`: an imatrix that llama-quantize reads too.

        no_gradients: only inputs, in a third of the time. max_memory: bytes that the run stays below. A run that was
        stopped goes on when it is called in the same way again. Raises BadInput for a model that cannot be run or a
        text that is too short, UsageError, NumericFault, OutputRefused, InputOutputError.
        """
        asked = parse_calibration({"text": text, "tokens": tokens, "windows": windows, "window": window})
        options = StatisticsOptions(
            gradients=not no_gradients,
            max_memory=None if max_memory is None else size_of("--max-memory", max_memory),
            threads=None if threads is None else count_of("--threads", threads, 1, 1024),
        )
        source = self.opened()
        inputs = source.identities | identities(asked.text, asked.tokens)
        return measuring.calibrate(source, asked, options, Path(out), report_to(progress), force=force, inputs=inputs)

    @contextmanager
    def _job(self, asked: Mapping[str, Any], request: PlanRequest, *, fresh: bool = False) -> Iterator[Session]:
        """What the keywords say, with their small files read; fresh: of a source that the job may change."""
        calibration, how, monitor = parse_calibration(asked), parse_options(asked), report_to(asked.get("progress"))
        with ExitStack() as stack:
            source = stack.enter_context(open_source(self.path)) if fresh else self.opened()
            workers = stack.enter_context(connect_cluster(asked.get("cluster"), monitor.info))
            yield open_session(source, request, calibration, **how, cluster=workers, monitor=monitor)

    def opened(self) -> Source:
        """The source. Raises UsageError where the model is closed."""
        if self.source.is_closed:
            raise UsageError("the model is closed; open it again")
        return self.source


def open(path: Where) -> Model:
    """The model in the GGUF file at `path`; of a split one, any of its files. Only the header is read.

    What is odd about the file is a RequantWarning. Raises BadInput for what is no sound model, InputOutputError.
    """
    source = open_source(Path(path))
    try:
        require_model(source)
    except BaseException:
        source.close()
        raise
    SILENT.warn(*source.warnings)
    return Model(source.path, source)


def verify(
    out: Where,
    *,
    source: Model | Where | None = None,
    plan: Plan | Where | None = None,
    threads: int | None = None,
    progress: Report | None = None,
) -> Verification:
    """What is wrong with the file `out`, every byte of it read and compared with its record, a plan and its source.

    plan: a plan, or the file of one, or a record that is not beside `out`. The `findings` are empty where it is sound;
    that is no exception. Raises BadInput for what is no GGUF file at all, InputOutputError.
    """
    wanted = plan if plan is None or isinstance(plan, Plan) else Path(plan)
    n = None if threads is None else count_of("--threads", threads, 1, 1024)
    with ExitStack() as stack:
        origin = source.opened() if isinstance(source, Model) else None
        if source is not None and not isinstance(source, Model):
            origin = stack.enter_context(open_source(Path(source)))
        return verifying.verify(Path(out), origin, wanted, report_to(progress), threads=n)
