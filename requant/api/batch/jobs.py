"""The job file of a batch (JOBS.toml) as data; every key and value is checked before any work begins."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from requant.common.serialization import read_text
from requant.errors import REMARK, BadInput, brief, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_OUTPUT = "{basename}-{sizelabel}-{finetune}-{version}-{encoding}.gguf"
LABEL = re.compile(r"[A-Z0-9_]{1,40}")  # of an encoding: the characters that llama.cpp accepts in the tag of a file
REPORTS = ("html", "png", "svg")  # kinds of report on a single output
_MAX_FILE = 1 << 22  # bytes
_MAX_TABLES = 10_000
_MAX_PARTS, _MAX_WORD = 8, 200  # parts of a dotted key; characters of a key or number without quotes
# strings of several lines and of one, closed or not, and comments
_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*(?:"{3,5}|\Z)|\'{3}(?:[^']|\'(?!''))*(?:\'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]|\\[^\n])*"?|'[^'\n]*'?|#[^\n]*""",
    re.DOTALL,
)
_ENDS = re.compile(r"[\r\n=,\[\]{}]")  # characters that end a key or number


@dataclass(frozen=True, slots=True)
class KeyOption:
    """The option of a command that a key stands for, the command's parameter, and how the key's value is written."""

    option: str
    parameter: str
    kind: Literal["flag", "one", "several", "commas"]  # commas: one value that may be a list of parts
    is_path: bool = False  # relative to the folder of the job file


@dataclass(frozen=True, slots=True)
class JobBudget:
    """All options of one conversion.

    words: key -> the option's words on a command line; own: the keys in the budget's own entry.
    """

    where: str
    words: Mapping[str, tuple[str, ...]]
    own: frozenset[str]
    label: str | None

    def value(self, key: str) -> str | None:
        """Return the value given to the key, None without one."""
        words = self.words.get(key)
        return words[0].partition("=")[2] if words else None


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One `[[job]]`: its sources as written, the template of the outputs' names, and its budgets."""

    where: str
    sources: tuple[str, ...]
    output: str
    budgets: tuple[JobBudget, ...]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """The `[report]` table: a model card of all outputs, and kinds of report beside each; `words` are options."""

    card: Path | None
    beside: tuple[str, ...]  # of REPORTS
    words: tuple[str, ...]


def read_jobs(path: Path, keys: Mapping[str, KeyOption]) -> tuple[BatchJob, ...]:
    """Read the jobs in the file at `path`, which may use `keys`. Raises BadInput naming the table and key."""
    return tuple(_JobFile(path, keys).jobs(_read_toml(path)))


def read_report_table(path: Path, keys: Mapping[str, KeyOption]) -> ReportTable | None:
    """Read the file's [report], which may use `keys`; None without one. Raises BadInput naming the key."""
    raw = _read_toml(path).get("report")
    return None if raw is None else _JobFile(path, keys).report(raw)


def _read_toml(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_FILE)
    _check_words(path, text)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(path, f"is not valid TOML: {brief(str(error), REMARK)}") from error


def _check_words(path: Path, text: str) -> None:
    """Raise BadInput for a key of many parts, whose parsing would take quadratic time, and for a huge number."""
    if text.count("\n[") > _MAX_TABLES:
        raise BadInput(path, "has too many tables", got=text.count("\n["), limit=_MAX_TABLES)
    bare = _QUOTED.sub("s", text).translate({ord(" "): None, ord("\t"): None})
    for word in _ENDS.split(bare):
        if word.count(".") >= _MAX_PARTS:
            what, got = "has a key of too many parts", f"{word.count('.') + 1}: {word[:20]}..."
            raise BadInput(path, what, got=got, limit=_MAX_PARTS)
        if len(word) > _MAX_WORD:
            what, got = "has a key or number that is too long", f"{len(word)} characters: {word[:20]}..."
            raise BadInput(path, what, got=got, limit=_MAX_WORD)


def _inside(table: str, what: str) -> str:
    """Return `what` with the name of the table that it is about; "" is the top of the file."""
    return f"{table}: {what}" if table else what


@dataclass(frozen=True, slots=True)
class _JobFile:
    path: Path
    keys: Mapping[str, KeyOption]

    def jobs(self, raw: Mapping[str, Any]) -> Iterator[BatchJob]:
        self._check_keys("", raw, ("defaults", "job", "report"))
        defaults = self._table("[defaults]", raw.get("defaults", {}))
        self._check_keys("[defaults]", defaults, ("output", "budgets", *self.keys))
        tables = raw.get("job")
        if not isinstance(tables, list) or not tables:
            raise self._wrong("", "needs a [[job]]")
        for i, table in enumerate(tables, start=1):
            yield self._job(f"[[job]] {i}", self._table(f"[[job]] {i}", table), defaults)

    def report(self, raw: Any) -> ReportTable:
        where = "[report]"
        table = self._table(where, raw)
        self._check_keys(where, table, ("card", "beside", *self.keys), "those of requant report")
        card = table.get("card")
        if card is not None and not (isinstance(card, str) and card.endswith(".md") and "\0" not in card):
            raise self._wrong(where, "key 'card' must be a file's name that ends in .md", card)
        beside = self._strings(where, "beside", table["beside"]) if "beside" in table else ()
        if unknown := [kind for kind in beside if kind not in REPORTS]:
            raise self._wrong(where, f"key 'beside' is a list of {', '.join(REPORTS)}", unknown[0])
        if not card and not beside:
            raise self._wrong(where, "says no card, and nothing beside the outputs")
        given = {key: self._words(where, key, value) for key, value in table.items() if key in self.keys}
        if given and not card:
            raise self._wrong(where, f"key '{next(iter(given))}' is for a card; say card = \"README.md\"")
        words = tuple(word for found in given.values() for word in found)
        return ReportTable(None if card is None else self.path.parent / card, tuple(dict.fromkeys(beside)), words)

    def _job(self, where: str, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> BatchJob:
        self._check_keys(where, table, ("source", "output", "budgets", "label", *self.keys))
        if "source" not in table:
            raise self._wrong(where, "says no source")
        output = table.get("output", defaults.get("output", DEFAULT_OUTPUT))
        if not isinstance(output, str):
            raise self._wrong(where, "key 'output' must be a string", output)
        common = {key: value for key, value in {**defaults, **table}.items() if key in self.keys}
        entries = table.get("budgets", defaults.get("budgets"))
        if entries is None:
            budgets = [self._budget(where, common, {}, table.get("label"))]
        else:
            if "label" in table:
                raise self._wrong(where, "key 'label' is of one budget; put it into the entries of budgets")
            budgets = list(self._budgets(where, common, entries))
        return BatchJob(where, self._strings(where, "source", table["source"]), output, tuple(budgets))

    def _budgets(self, where: str, common: Mapping[str, Any], entries: Any) -> Iterator[JobBudget]:
        if not isinstance(entries, list) or not entries:
            raise self._wrong(where, "key 'budgets' must be a list of tables", entries)
        for i, entry in enumerate(entries, start=1):
            place = f"{where}, budget {i}"
            own = self._table(place, entry)
            self._check_keys(place, own, ("label", *self.keys))
            yield self._budget(place, common, {k: v for k, v in own.items() if k != "label"}, own.get("label"))

    def _budget(self, where: str, common: Mapping[str, Any], own: Mapping[str, Any], label: Any) -> JobBudget:
        if label is not None and not (isinstance(label, str) and LABEL.fullmatch(label)):
            raise self._wrong(where, "key 'label' must be capital letters, digits and _", label)
        words = {key: self._words(where, key, value) for key, value in sorted({**common, **own}.items())}
        return JobBudget(where, {key: given for key, given in words.items() if given}, frozenset(own), label)

    def _words(self, where: str, key: str, value: Any) -> tuple[str, ...]:
        """Return the option's words: none for a flag that is false."""
        rule = self.keys[key]
        if rule.kind == "flag":
            if not isinstance(value, bool):
                raise self._wrong(where, f"key '{key}' must be true or false", value)
            return (rule.option,) if value else ()
        if rule.kind == "commas" and isinstance(value, list):
            value = ",".join(self._strings(where, key, value))
        values = value if rule.kind == "several" and isinstance(value, list) else [value]
        return tuple(f"{rule.option}={self._text(where, key, item, rule)}" for item in values)

    def _text(self, where: str, key: str, value: Any, rule: KeyOption) -> str:
        if isinstance(value, str) and value and "\0" not in value:
            return str(self.path.parent / value) if rule.is_path else value
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and not rule.is_path and rule.kind != "several":
            return str(value)
        wanted = "the path of a file" if rule.is_path else "a string or a number" if rule.kind == "one" else "strings"
        raise self._wrong(where, f"key '{key}' must be {wanted}", value)

    def _strings(self, where: str, key: str, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str) and v and "\0" not in v for v in values):
            raise self._wrong(where, f"key '{key}' must be a string or a list of strings", value)
        return tuple(values)

    def _table(self, where: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(where, "must be a table", value)
        return value

    def _check_keys(
        self, where: str, table: Mapping[str, Any], known: Sequence[str], what: str = "the options of requant convert"
    ) -> None:
        for key in table:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"keys are {what}, without --"
                raise BadInput(self.path, _inside(where, f"key '{printable(key)}' is not known"), hint=hint)

    def _wrong(self, where: str, what: str, got: Any = None) -> BadInput:
        return BadInput(self.path, _inside(where, what), got=None if got is None else printable(repr(got))[:60])
