"""Options of a conversion, policies for tensors with NaN or infinity, and the claim of one run on its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from requant.common.sidecars import Sidecar
from requant.container.journal import Journal
from requant.container.splitting import WHOLE, Splitting

if TYPE_CHECKING:
    from requant.common.cluster import Cluster
    from requant.conversion.compensation.walk import CompensationText
    from requant.conversion.record import Conversion

KEEP_TYPE = "keep-type"
POLICIES = ("error", KEEP_TYPE)  # for tensors that hold NaN or infinity


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """Options of writing an output; none of them changes the bytes of the tensors, but `compensation`.

    splitting: into which files. force: replace files that exist. verify: read output and source again and compare them
    before the output gets its name. threads: None for one per processor. cluster: its workers do all that takes long;
    they must share the storage of source and output. compensation: the text of a plan whose encoders compensate.
    """

    splitting: Splitting = WHOLE
    force: bool = False
    verify: bool = True
    threads: int | None = None
    cluster: Cluster | None = None
    compensation: CompensationText | None = None


DEFAULTS = ConversionOptions()


@dataclass(frozen=True, slots=True)
class Claim:
    """An output that only this run writes, and what belongs to it.

    journal: of the output, open and locked. request: all options that decide what the output becomes, as JSON; a run
    that resumes must have the same. extras: sidecars that are removed with the journal. keep: keep the journal even
    where nothing is written yet, for a plan that took long to make. record: called with the conversion once the output
    has its name, before the journal is removed.
    """

    journal: Journal
    request: Mapping[str, Any] = field(default_factory=dict)
    extras: Sequence[Sidecar] = ()
    keep: bool = False
    record: Callable[[Conversion], None] = lambda _: None
