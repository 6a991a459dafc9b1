"""Conversion: what a run made, as data and as the JSON record OUT.requant.json that stays beside the output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from requant.errors import BadInput, brief
from requant.plan import Plan
from requant.records import dump, parse, plain, read_text, value_of

OUTPUT_SCHEMA = "requant.output/1"


@dataclass(frozen=True, slots=True)
class Converted:
    """One tensor as it was written.

    rmse: relative error over the whole tensor, measured, weighted by importance if there was any; 0 for a copy.
    rmse_unweighted: the same with all columns alike. sha256: of its bytes in the output, in hex.
    """

    name: str
    source_type: str
    type: str
    n_bytes: int
    rmse: float
    rmse_unweighted: float
    sha256: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """An output of `size` bytes: its plan, and in file order what became of each tensor. Names, no folders, in JSON."""

    output: Path
    size: int
    header_sha256: str  # of the output's header
    version: str  # of requant
    imatrix: str | None  # file name; None where no tensor was weighted
    imatrix_sha256: str | None
    plan: Plan
    tensors: tuple[Converted, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The record's text: ASCII, one tensor a line, the same for the same source, plan and version."""
        figures = {name: plain(getattr(self, name)) for name in _hints() if name not in ("output", "plan")}
        plan = json.loads(self.plan.to_json())
        head = {"schema": OUTPUT_SCHEMA, "output": self.output.name}
        return dump(head | figures | {"plan": plan})

    @classmethod
    def from_json(cls, text: str, path: object = "OUT.requant.json") -> Conversion:
        """The conversion in `text`, its `output` a name without a folder; `path` is what BadInput names."""
        raw = parse(text, OUTPUT_SCHEMA, path)
        plan = Plan.from_json(json.dumps(raw.pop("plan", None)), path)
        output = value_of(str, raw.pop("output", None), "output", path)
        hints = {name: hint for name, hint in _hints().items() if name not in ("output", "plan")}
        if unknown := sorted(raw.keys() - hints.keys()):
            raise BadInput(path, f"{brief(unknown[0])} is not a key of this file")
        values = {name: value_of(hint, raw.get(name), name, path) for name, hint in hints.items()}
        return cls(output=Path(output), plan=plan, **values)


def _hints() -> dict[str, object]:
    return get_type_hints(Conversion)


def record_path(out: Path) -> Path:
    """Where the record of the output at `out` is kept: OUT.requant.json beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.requant.json")


def read_conversion(path: Path) -> Conversion:
    """The record in the file at `path`. Raises BadInput, InputOutputError, InfeasibleBudget."""
    return Conversion.from_json(read_text(path), path)
