"""The result of a verification: its verdict, its findings, and exactly what was compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from requant.common.notebook import html

SCHEMA = "requant.verify/1"
RECORD, DIGESTS, SOURCE, ENCODINGS, PLAN = "record", "digests", "source", "encodings", "plan"
SAME, PLAUSIBLE, READABLE, WRONG = "same", "plausible", "readable", "wrong"


@dataclass(frozen=True, slots=True)
class Verification:
    """The findings on an output, a line each, none where nothing is wrong; `n_bytes` of `n_tensors` tensors were read.

    against: what it was compared with: its `record`, the `digests` in its metadata, the `source`, the `encodings` of
    the source, made again, a `plan`. compared: a line for each of these that says what was compared, and what was not.
    wrong_tensors: the tensors of the findings. misread_tensors: those that were made from other bytes than the source
    has.
    """

    output: Path
    n_tensors: int
    n_bytes: int
    against: tuple[str, ...]
    findings: tuple[str, ...]
    compared: tuple[str, ...] = ()
    wrong_tensors: tuple[str, ...] = ()
    misread_tensors: tuple[str, ...] = ()
    other_source: bool = False  # the given source is not the one that the output was made from: a finding

    @property
    def ok(self) -> bool:
        """Return whether there are no findings."""
        return not self.findings

    @property
    def has_only_other_source(self) -> bool:
        """Return whether there are no findings, except perhaps that the given source is another one."""
        return len(self.findings) == self.other_source

    @property
    def verdict(self) -> str:
        """Return what the comparisons show.

        same: the bytes that were written, by the record or the digests in the metadata, or by encoding again.
        plausible: nothing tells what was written, but it agrees with the source as far as it was compared. readable:
        compared with nothing. wrong: there are findings.
        """
        if not self.has_only_other_source:
            return WRONG
        if not {RECORD, DIGESTS, ENCODINGS}.isdisjoint(self.against):
            return SAME
        return PLAUSIBLE if SOURCE in self.against else READABLE

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """Return a JSON object of schema requant.verify/1."""
        figures = {
            "tensors": self.n_tensors,
            "bytes": self.n_bytes,
            "against": self.against,
            "compared": self.compared,
            "findings": self.findings,
        }
        head = {"schema": SCHEMA, "output": self.output.name, "verdict": self.verdict, "ok": self.ok}
        return json.dumps(head | {"other_source": self.other_source} | figures, indent=2) + "\n"
