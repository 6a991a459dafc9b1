"""Items of a batch: a source and a budget each, with the options of `requant convert`, read before any work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from requant._version import __version__
from requant.api.batch.jobs import BatchJob, JobBudget, KeyOption, read_jobs
from requant.api.batch.names import UNKNOWN, budget_label, check_template, encoding_label, output_path
from requant.api.batch.sources import BatchSource, find_sources, read_source
from requant.api.batch.state import content_key
from requant.api.batch.summary import Row, Summary
from requant.api.session_options import SessionOptions
from requant.common.inputs import find_input
from requant.common.serialization import hash_json
from requant.container.source import add_model_inputs
from requant.container.splitting import Splitting
from requant.conversion.record import record_path
from requant.errors import BadInput, OutputRefused, UsageError, printable
from requant.planning.options import PLAN_OPTIONS
from requant.planning.plan import Plan
from requant.planning.request import FromBudget, PlanFrom, PlanRequest
from requant.scoring.options import CalibrationOptions

_CALIBRATION = {f.name for f in fields(CalibrationOptions)}
_SCORING = _CALIBRATION | {"imatrix", "no_imatrix", "effort", "allow_requantize"}
_SCORES = 2  # layout of kept scores; part of a request, so that those of another layout are made again
_WINDOWS = {"text", "tokens", "n_windows", "window"}
_PLANNING = {"plan", "type_name", "preset", "like", "measure", "compensate", "no_compensate"} | {
    option.keyword for option in PLAN_OPTIONS
}
_IRRELEVANT = {"threads", "no_verify", "losses"}  # to the bytes of the output


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of one conversion, parsed."""

    request: PlanRequest
    calibration: CalibrationOptions
    splitting: Splitting
    plan_from: PlanFrom
    session_options: SessionOptions
    measure: int | None


ParseOptions = Callable[[Sequence[str]], ConvertOptions]  # of a command line; raises UsageError


@dataclass(slots=True)
class BatchItem:
    """A source and a budget, with their options, row, plan, output path and its files as far as they are known."""

    source: BatchSource
    budget: JobBudget
    template: str
    options: ConvertOptions
    keys: Mapping[str, KeyOption]
    row: Row
    plan: Plan | None = None
    out: Path | None = None
    files: tuple[Path, ...] = ()  # of an output that is split

    @property
    def is_scored(self) -> bool:
        """Return whether the plan needs losses that are not given."""
        return isinstance(self.options.plan_from, FromBudget) and self.options.session_options.losses is None

    @property
    def types(self) -> tuple[str, ...]:
        """Return the types to score."""
        return self.options.request.types_to_score

    def score_arguments(self) -> list[str]:
        """Return the options for `requant score`, without the types."""
        return self._select_words(_SCORING)

    def convert_words(self, *, bytes_only: bool = False) -> list[str]:
        """Return the options for `requant convert --plan`; `bytes_only`: of these that decide the output's bytes."""
        left = {rule.parameter for rule in self.keys.values()} - _PLANNING - _CALIBRATION
        left -= {"imatrix", "effort", "max_memory"}
        if self.plan is not None and self.plan.compensation is not None:
            left |= _WINDOWS | {"max_memory"}
        return self._select_words(left - _IRRELEVANT if bytes_only else left)

    def score_request(self) -> str:
        """Return the hash of all that decides the losses."""
        values = self._select_values(_SCORING)
        return hash_json([__version__, _SCORES, self.source.identity, values, list(self.types)])

    def plan_request(self) -> str:
        """Return the hash of all that decides the plan."""
        values = self._select_values(_SCORING | _PLANNING | {"losses"})
        return hash_json([__version__, self.source.identity, values])

    def output_request(self) -> str:
        """Return the hash of all that decides the output's bytes."""
        assert self.plan is not None
        words = self.convert_words(bytes_only=True)
        return hash_json([self.plan_request(), hash_json(self.plan.to_json()), words])

    def place_output(self, jobs: Path) -> None:
        """Set the output's path, which is preliminary while its encoding is not known."""
        encoding = encoding_label(self.budget, self.plan)
        out = output_path(jobs, self.template, self.budget, encoding, self.source.fields)
        self.row.output = str(out)
        self.out = None if encoding == UNKNOWN and UNKNOWN in out.name else out

    def _select_words(self, parameters: set[str]) -> list[str]:
        return [w for key, words in self.budget.words.items() if self.keys[key].parameter in parameters for w in words]

    def _select_values(self, parameters: set[str]) -> list[Any]:
        """Return the words of these options, with a file's content in place of its path."""
        found: list[Any] = []
        for key, rule in self.keys.items():
            if rule.parameter in parameters and key in self.budget.words:
                path = Path(self.budget.value(key) or "")
                found.append([key, content_key(path) if rule.is_path else self.budget.words[key]])
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """The items of the job file at `path`, and the summary, which also has the sources that cannot be opened."""

    path: Path
    items: tuple[BatchItem, ...]
    summary: Summary


def read_batch(path: Path, keys: Mapping[str, KeyOption], parse_options: ParseOptions) -> Batch:
    """Read the jobs in the file at `path`, which may use `keys`, and their sources.

    Raises BadInput, naming table and key, and OutputRefused.
    """
    jobs = read_jobs(path, keys)
    parsed = [[_parse_budget(path, budget, keys, parse_options) for budget in job.budgets] for job in jobs]
    summary, items = Summary(path), list[BatchItem]()
    for job, options in zip(jobs, parsed, strict=True):
        check_template(path, job.where, job.output)
        for source in _read_sources(job, summary):
            for budget, how in zip(job.budgets, options, strict=True):
                row = summary.add_row(job.where, source.path, budget_label(budget))
                items.append(BatchItem(source, budget, job.output, how, keys, row))
    for item in items:
        item.place_output(path)
    check_outputs(path, items)
    return Batch(path, tuple(items), summary)


def _read_sources(job: BatchJob, summary: Summary) -> Iterator[BatchSource]:
    """Read the models of a job, each once; files that cannot be opened and files left out go into the summary."""
    seen, n = set(), 0
    for path, named in find_sources(summary.path, job.where, job.sources).items():
        try:
            found = read_source(path, named=named)
        except BadInput as error:
            summary.record_failure(summary.add_row(job.where, path, ""), error.exit_code, str(error))
            n += 1
            continue
        if isinstance(found, str):
            summary.excluded[str(path)] = found
        elif found.path not in seen:
            seen.add(found.path)
            n += 1
            yield found
    if not n:
        others = f"{len(summary.excluded)} other files"
        raise BadInput(summary.path, f"{job.where}: source has no model in it", got=others)


def _parse_budget(
    path: Path, budget: JobBudget, keys: Mapping[str, KeyOption], parse_options: ParseOptions
) -> ConvertOptions:
    for key in budget.words:
        file = Path(budget.value(key) or "")
        if keys[key].is_path and not file.is_file():
            raise BadInput(path, f"{budget.where}: key '{key}': no file {printable(str(file))}")
        if keys[key].is_path:
            add_model_inputs(file)
    try:
        return parse_options([word for words in budget.words.values() for word in words])
    except UsageError as error:
        raise BadInput(path, f"{budget.where}: {error}") from error


def check_outputs(path: Path, items: Iterable[BatchItem]) -> None:
    """Raise BadInput where two items would write the same file, OutputRefused where one would write an input."""
    items = list(items)
    taken: dict[str, BatchItem] = {}
    for item in items:
        if item.out is None:
            continue
        other = taken.setdefault(os.path.realpath(item.out), item)
        if other is not item:
            hint = "put {budget} or {stem} into the output's name, or give the budgets a label"
            both = " and ".join(f"{i.budget.where} for {printable(i.source.path.name)}" for i in (other, item))
            raise BadInput(path, f"{both} would both be {printable(str(item.out))}", hint=hint)
        files = item.files or (item.out,)
        for file in (item.out, *files, record_path(files[0])):
            with suppress(OSError, ValueError):
                found = find_input(file.stat())
                if found is not None:
                    what = f"would replace an input of this batch ({printable(str(found))})"
                    raise OutputRefused(file, what, hint="give the output another name")
