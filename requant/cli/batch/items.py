"""The cells of a batch, a source and a budget each: read by the very options of `requant convert`, before all work."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from requant._version import __version__
from requant.cli import convert, options
from requant.cli.batch.jobs import BatchJob, Budget, Key, read_jobs
from requant.cli.batch.names import UNKNOWN, budget_label, check_template, encoding, output_path
from requant.cli.batch.sources import Model, examine, find_sources
from requant.cli.batch.state import content_of, digest
from requant.cli.batch.summary import Row
from requant.container.splitting import Splitting
from requant.errors import BadInput, OutputRefused, UsageError, printable
from requant.planning.plan import Plan
from requant.planning.request import PlanRequest, check_type_source
from requant.scoring.calibration_data import Calibration

COMMON = {"debug", "quiet", "verbose", "progress"}  # options that every command has
# options of convert that are the batch's own business
_OWN = COMMON | {"dry_run", "force", "restart", "as_json", "reports"}
_CALIBRATION = {f.name for f in fields(Calibration)}
_SCORING = _CALIBRATION | {"imatrix", "effort", "allow_requantize"}
_PLANNING = {"pins_file", "plan", "type_name", "preset", "like", "measure"} | {f.name for f in fields(PlanRequest)}
_NO_MATTER = {"threads", "no_verify", "losses"}  # to the bytes of the output


def _options() -> dict[str, click.Option]:
    """Key -> option of convert."""
    return options_of(convert.command, _OWN)


def options_of(command: click.Command, left_out: Container[str]) -> dict[str, click.Option]:
    """Key in a file of jobs -> option of the command that it stands for."""
    found = {}
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden and param.name not in left_out:
            found[next(o for o in param.opts if o.startswith("--")).removeprefix("--")] = param
    return found


def key_of(option: str, param: click.Option) -> Key:
    """How the key's value is written."""
    kind = "flag" if param.is_flag else "several" if param.multiple else "one"
    if kind == "one" and (param.metavar or "").endswith(",..") and param.name != "vram":  # one output, one VRAM
        kind = "commas"
    return Key(f"--{option}", kind, isinstance(param.type, click.Path))  # type: ignore[arg-type]


@options.budget
@options.calibration
@options.splitting
def _asked(**how: Any) -> dict[str, Any]:
    return how


@dataclass(slots=True)
class BatchItem:
    """A source, a budget and what becomes of them; `asked` are convert's arguments, parsed."""

    model: Model
    budget: Budget
    template: str
    asked: Mapping[str, Any]
    row: Row
    plan: Plan | None = None
    out: Path | None = None

    @property
    def request(self) -> PlanRequest:
        """What was asked of the plan."""
        found: PlanRequest = self.asked["request"]
        return found

    @property
    def calibration(self) -> Calibration:
        """What the model is to be run on."""
        found: Calibration = self.asked["calibration"]
        return found

    @property
    def splitting(self) -> Splitting:
        """How the output is split."""
        found: Splitting = self.asked["splitting"]
        return found

    @property
    def is_scored(self) -> bool:
        """Whether the plan needs losses that are not given."""
        given = any(self.asked[name] is not None for name in ("losses", "plan", "type_name", "preset"))
        return not given and self.request.has_budget

    def score_words(self) -> list[str]:
        """The options for `requant score`, without the types."""
        return self._words(_SCORING)

    def convert_words(self, *, bytes_only: bool = False) -> list[str]:
        """The options that remain for `requant convert --plan`; `bytes_only`: of those that matter to the output."""
        left = {str(p.name) for p in _options().values()} - _PLANNING - _CALIBRATION - {"imatrix", "effort"}
        return self._words(left - _NO_MATTER if bytes_only else left)

    def score_request(self, types: Sequence[str]) -> str:
        """What the losses depend on, as a hash."""
        return digest([__version__, self.model.identity, self._said(_SCORING), list(types)])

    def plan_request(self) -> str:
        """What the plan depends on, as a hash."""
        said = self._said(_SCORING | _PLANNING | {"losses"})
        return digest([__version__, self.model.identity, said])

    def output_request(self) -> str:
        """What the output's bytes depend on, as a hash."""
        assert self.plan is not None
        words = self.convert_words(bytes_only=True)
        return digest([self.plan_request(), digest(self.plan.to_json()), words])

    def place(self, jobs: Path) -> None:
        """Settle the output's path as far as it is known."""
        kind = encoding(self.budget, self.plan)
        out = output_path(jobs, self.template, self.budget, kind, self.model.fields)
        self.row.output = str(out)
        self.out = None if kind == UNKNOWN and UNKNOWN in out.name else out

    def _words(self, names: Iterable[str]) -> list[str]:
        names = set(names)
        return [w for key, words in self.budget.words.items() if _options()[key].name in names for w in words]

    def _said(self, names: Iterable[str]) -> list[Any]:
        """The words of the options called `names`, with what is in a file for the file's path."""
        found: list[Any] = []
        for key, option in _options().items():
            if option.name in names and key in self.budget.words:
                is_path = isinstance(option.type, click.Path)
                value = self.budget.value(key)
                found.append([key, content_of(Path(value or "")) if is_path else self.budget.words[key]])
        return found


@dataclass(frozen=True, slots=True)
class Matrix:
    """All cells, all rows (those of sources that cannot be opened among them), and what was no source, and why."""

    cells: tuple[BatchItem, ...]
    rows: tuple[Row, ...]
    no_sources: Mapping[str, str]


def read_matrix(path: Path) -> Matrix:
    """The matrix of the jobs in the file at `path`. Raises BadInput, naming table and key, and OutputRefused."""
    keys = {key: key_of(key, option) for key, option in _options().items()}
    jobs = read_jobs(path, keys)
    parsed = [[_parsed(path, budget) for budget in job.budgets] for job in jobs]
    no_sources: dict[str, str] = {}
    cells: list[BatchItem] = []
    rows: list[Row] = []
    for job, asked in zip(jobs, parsed, strict=True):
        check_template(path, job.where, job.output)
        for found in _models(path, job, no_sources):
            if isinstance(found, Row):
                rows.append(found)
                continue
            for budget, how in zip(job.budgets, asked, strict=True):
                row = Row(job.where, str(found.path), budget_label(budget))
                cells.append(BatchItem(found, budget, job.output, how, row))
                rows.append(row)
    for cell in cells:
        cell.place(path)
    check_outputs(path, cells)
    return Matrix(tuple(cells), tuple(rows), no_sources)


def _models(path: Path, job: BatchJob, no_sources: dict[str, str]) -> Iterator[Model | Row]:
    """The models of a job; a row for each file that cannot be opened, what is no source into `no_sources`."""
    seen, n = set(), 0
    for source, named in find_sources(path, job.where, job.sources).items():
        try:
            found = examine(source, named=named)
        except BadInput as error:
            row = Row(job.where, str(source), "")
            row.fail(error.exit_code, str(error))
            n += 1
            yield row
            continue
        if isinstance(found, str):
            no_sources[str(source)] = found
        elif found.path not in seen:
            seen.add(found.path)
            n += 1
            yield found
    if not n:
        raise BadInput(path, f"{job.where}: source has no model in it", got=f"{len(no_sources)} other files")


def _parsed(path: Path, budget: Budget) -> dict[str, Any]:
    for key in budget.words:
        file = Path(budget.value(key) or "")
        if isinstance(_options()[key].type, click.Path) and not file.is_file():
            raise BadInput(path, f"{budget.where}: key '{key}': no file {printable(str(file))}")
    words = [word for words in budget.words.values() for word in words]
    try:
        with convert.command.make_context("convert", ["MODEL", "OUT", *words]) as context:
            asked: dict[str, Any] = _asked(**context.params)
        check_type_source(asked["request"], asked["plan"], asked["type_name"], asked["preset"], asked["like"])
        if len(asked["vrams"]) > 1:
            raise UsageError("vram is one size; write an entry of budgets for each")
        if asked["measure"] is not None and not asked["request"].has_budget:
            raise UsageError("measure chooses among plans for a budget; give vram, size or bpw with it")
    except click.ClickException as error:
        what = " ".join(error.format_message().split()).removesuffix(".")
        raise BadInput(path, f"{budget.where}: {what[:1].lower()}{what[1:]}") from error
    except UsageError as error:
        raise BadInput(path, f"{budget.where}: {error}") from error
    return asked


def check_outputs(path: Path, cells: Sequence[BatchItem]) -> None:
    """Raise BadInput where two cells would write one file, OutputRefused where one would write a source."""
    sources = {identity: cell.model.path for cell in cells for identity in cell.model.files}
    taken: dict[str, BatchItem] = {}
    for cell in cells:
        if cell.out is None:
            continue
        other = taken.setdefault(os.path.realpath(cell.out), cell)
        if other is not cell:
            hint = "put {budget} or {stem} into the output's name, or give the budgets a label"
            both = " and ".join(f"{c.budget.where} for {printable(c.model.path.name)}" for c in (other, cell))
            raise BadInput(path, f"{both} would both be {printable(str(cell.out))}", hint=hint)
        try:
            status = cell.out.stat()
        except (OSError, ValueError):
            continue
        source = sources.get((status.st_dev, status.st_ino))
        if source is not None:
            raise OutputRefused(cell.out, f"is a source of this batch ({printable(str(source))})", hint="rename it")
