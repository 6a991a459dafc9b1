"""The record of a conversion: its data, and the JSON file OUT.requant.json beside the output."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

from requant.common.atomic_write import has_schema, read_head
from requant.common.notebook import html
from requant.common.serialization import dump, parse, parse_value, read_text, to_plain
from requant.errors import BadInput, brief, quote
from requant.planning.plan import Plan, read_plan
from requant.scoring.losses import parse_file_name, parse_type_name

OUTPUT_SCHEMA = "requant.output/1"
_HEAD = 2048  # bytes of a record that contain the name of its output


@dataclass(frozen=True, slots=True)
class Anomalies:
    """Counts of the numeric anomalies that the run tolerated in a tensor or a part of it.

    nonfinite: weights of a copy that are NaN or infinite, the first at flat index first_nonfinite. unweighted: blocks
    without usable importance, whose columns were weighted alike. vanished: rows so small that they became zero.
    """

    nonfinite: int = 0
    first_nonfinite: int | None = None
    unweighted: int = 0
    vanished: int = 0

    def __add__(self, later: Anomalies) -> Anomalies:
        first = later.first_nonfinite if self.first_nonfinite is None else self.first_nonfinite
        unweighted, vanished = self.unweighted + later.unweighted, self.vanished + later.vanished
        return Anomalies(self.nonfinite + later.nonfinite, first, unweighted, vanished)

    def notes(self, name: str) -> list[str]:
        """Lines on the anomalies of the tensor called `name`, one for each kind."""
        tensor = f"tensor {quote(name)}"
        lines = []
        if self.nonfinite:
            at = f"the first at weight {self.first_nonfinite}"
            lines.append(f"{tensor} was copied with {self.nonfinite} weights that are not finite, {at}")
        if self.unweighted:
            lines.append(f"{self.unweighted} blocks of {tensor} had no usable importance; their columns count alike")
        if self.vanished:
            lines.append(f"{self.vanished} rows of {tensor} are so small that they became zero")
        return lines


@dataclass(frozen=True, slots=True)
class Compensation:
    """The errors of a tensor that was encoded with compensation, measured on held-out windows of the text.

    error: of what comes out of its matrices, relative, against the original model; plain_error: the same if all of it
    were rounded plainly, inherited_error: if it were not rounded at all, for it gets other inputs; all None where no
    held-out token reached it. n_plain: how many of its `n_matrices` (experts) are rounded plainly, `n_unseen` of them
    because too few tokens reach them, the others because they erred no less. ridge: of the target of a single matrix,
    None without one.
    """

    error: float | None
    plain_error: float | None
    inherited_error: float | None
    n_matrices: int
    n_plain: int
    n_unseen: int = 0
    ridge: float | None = None

    @property
    def share(self) -> float:
        """The error that the rounding itself adds over that of plain rounding, squared: from 0 to 1.

        A target that undoes what earlier matrices did counts as no error, not as less.
        """
        if self.error is None or self.plain_error is None or self.inherited_error is None:
            return 1.0
        inherited = self.inherited_error**2
        plain = self.plain_error**2 - inherited
        return min(1.0, max(0.0, (self.error**2 - inherited) / plain)) if plain > 0 else 1.0


@dataclass(frozen=True, slots=True)
class SourceDigest:
    """The digest, in hex, of `n_rows` rows of a tensor of the source, as they were read to make the output.

    It is the SHA-256 of the SHA-256 of each `leaf_rows` of them, one after the other.
    """

    n_rows: int
    leaf_rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Converted:
    """One tensor as it was written.

    rmse: relative error over the whole tensor, measured, weighted by importance if there was any; 0 for a copy.
    rmse_unweighted: the same with all columns alike. sha256: of its bytes in the output, in hex. odd: its numeric
    anomalies, None without any. source: the digests of all its rows in the source, in order; () in old records and for
    a scale that was added. weighted: importance was used; None in old records. compensation: None for a tensor that was
    rounded plainly from the start.
    """

    name: str
    source_type: str = field(metadata={"parse": parse_type_name})
    type: str = field(metadata={"parse": parse_type_name})
    n_bytes: int
    rmse: float
    rmse_unweighted: float
    sha256: str
    odd: Anomalies | None = None
    source: tuple[SourceDigest, ...] = ()
    weighted: bool | None = None
    compensation: Compensation | None = None

    @property
    def is_compensated(self) -> bool:
        """Return whether the rounding of any of its matrices was compensated."""
        return self.compensation is not None and self.compensation.n_plain < self.compensation.n_matrices


@dataclass(frozen=True, slots=True)
class Conversion:
    """An output of `size` bytes: its plan, and its tensors in file order. Its JSON holds names of files, no folders."""

    output: Path
    size: int
    header_sha256: str  # of the output's header
    version: str  # of requant
    imatrix: str | None  # file name; None where no tensor was weighted
    imatrix_sha256: str | None
    plan: Plan
    tensors: tuple[Converted, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    kernels: int | None = None  # version of the encoders; None in old records
    compensation_text: str | None = None  # name of the text by which the encoders compensated their errors
    compensation_tokens: str | None = None  # SHA-256 of its windows of token ids, as 32-bit integers

    def _repr_html_(self) -> str:
        return html(self)

    @property
    def predicted_kl(self) -> float | None:
        """The KL divergence that the plan predicts, with the loss of each compensated tensor scaled by its `share`."""
        if self.plan.predicted_kl is None:
            return None
        shares = {t.name: t.compensation.share for t in self.tensors if t.compensation is not None}
        return self.plan.predicted_kl - math.fsum(c.loss * (1 - shares.get(c.name, 1.0)) for c in self.plan.choices)

    def to_json(self) -> str:
        """Return the record's text: ASCII, one tensor a line, the same for the same source, plan and version."""
        figures = {name: to_plain(getattr(self, name)) for name in _plain_fields()}
        plan = json.loads(self.plan.to_json())
        head = {"schema": OUTPUT_SCHEMA, "output": self.output.name}
        return dump(head | figures | {"plan": plan})

    @classmethod
    def from_json(cls, text: str, path: object = "OUT.requant.json") -> Conversion:
        """Read the conversion in `text`, whose `output` is a name without a folder; BadInput names `path`."""
        raw = parse(text, OUTPUT_SCHEMA, path)
        plan = Plan.from_json(json.dumps(raw.pop("plan", None)), path)
        output = parse_value(str, raw.pop("output", None), "output", path)
        parse_file_name(output, "output", path)
        hints = _plain_fields()
        if unknown := sorted(raw.keys() - hints.keys()):
            raise BadInput(path, f"{brief(unknown[0])} is not a key of this file")
        values = {name: parse_value(hint, raw.get(name), name, path) for name, hint in hints.items()}
        return cls(output=Path(output), plan=plan, **values)


def _plain_fields() -> dict[str, object]:
    return {name: hint for name, hint in get_type_hints(Conversion).items() if name not in ("output", "plan")}


def record_path(out: Path) -> Path:
    """The path of the record of the output at `out`: OUT.requant.json beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.requant.json")


def is_record_of_output(path: Path) -> bool:
    """Return whether the file at `path` is the record of the output whose record has this name."""
    name = json.dumps(path.name.removesuffix(".requant.json"))
    return has_schema(path, OUTPUT_SCHEMA) and f'"output": {name}'.encode() in read_head(path, _HEAD)


def read_conversion(path: Path | str) -> Conversion:
    """Read the record in the file at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    return Conversion.from_json(read_text(path), path)


def read_any_plan(path: Path) -> Plan:
    """Read the plan or the plan of the record at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    if not has_schema(path, OUTPUT_SCHEMA):
        return read_plan(path)
    return replace(read_conversion(path).plan, importance=Path(path))
