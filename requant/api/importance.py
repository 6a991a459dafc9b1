"""Importance of a session: from --imatrix, from where its plan or its losses point to, or measured while scoring."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from requant.api.measure import read_importance
from requant.common.atomic_write import read_head
from requant.common.files import hash_file, open_regular
from requant.container.imatrix import Imatrix
from requant.errors import FILE_NAME, BadInput, RequantError, brief
from requant.planning.output_metadata import imatrix_used
from requant.planning.plan import Plan

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.scoring.losses import Losses
    from requant.scoring.statistics import Statistics

_HEAD = 512  # bytes, in which a file of ours has named its type
_LARGEST = 1 << 32  # bytes of a file that is read because a plan or losses point to it
_HINT = "pass it with --imatrix FILE, or go without it: --no-imatrix"


@dataclass(frozen=True, slots=True)
class Importance:
    """The importance matrix that encoders use.

    file: the name of its file, None where it is in no file. path: the file that it was read from, or that the losses
    or the plan point to where it is missing. statistics: those that scoring measured it from, and the text's name.
    missing: the error to raise before anything is encoded, where they point to an imatrix that is not there.
    """

    imatrix: Imatrix | None = None
    file: str | None = None
    path: Path | None = None
    statistics: tuple[Statistics, str] | None = None
    missing: BadInput | None = None

    def save(self, out: Path, source: Source, *, force: bool, sidecar_of: str | None = None) -> str | None:
        """Write what was measured to the file `out`, and return its name; None where nothing was measured.

        sidecar_of: the name of the unfinished output whose sidecar the file is.
        """
        if self.statistics is None:
            return None
        from requant.scoring.statistics import write_statistics

        statistics, text = self.statistics
        write_statistics(out, statistics, source, text, force=force, sidecar_of=sidecar_of)
        return out.name

    def path_from(self, folder: Path) -> str | None:
        """Return the path of its file relative to `folder`, as JSON files in that folder have it; None without one."""
        return self.file if self.path is None else relative_path(self.path, folder)


def relative_path(file: Path, folder: Path) -> str:
    """Return the path of `file` relative to `folder`: the name where both are in one folder, through no link."""
    where = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(folder))
    return (Path(where) / file.name).as_posix()


def is_importance_file(path: Path) -> bool:
    """Return whether the file at `path` begins like an importance matrix in GGUF."""
    head = read_head(path, _HEAD)
    return head.startswith(b"GGUF") and b"imatrix" in head


def importance_file(out: Path) -> Path:
    """Return the file of the importance that belongs to the losses or the plan in the file `out`, beside it."""
    return out.with_name(f"{out.stem}.imatrix.gguf")


def find_importance(
    given: Path | None, plan: Plan | None, losses: Losses | None, source: Source, *, off: bool
) -> Importance:
    """Return the importance of --imatrix, else that of the plan, else that of the losses; `off`: --no-imatrix.

    An imatrix that the plan or the losses point to is in memory with them, or in the file of that path, or in one of
    that name beside the plan, the losses or the model: the first whose SHA-256 is right. Raises BadInput for an imatrix
    of another model, or where all files there are others.
    """
    made = losses if plan is None else plan
    if given is not None:
        imatrix = read_importance(given, source)
        assert imatrix is not None
        same = made is not None and made.imatrix_sha256 == imatrix.sha256
        imatrix = replace(imatrix, known_as=made.imatrix) if made is not None and same else imatrix
        return Importance(imatrix, given.name, given)
    if off or made is None or made.imatrix_sha256 is None:
        return Importance()
    if isinstance(made.importance, Imatrix):
        return Importance(made.importance, made.imatrix_file)
    what = "the plan points to" if isinstance(made, Plan) else "the losses point to"
    if made.imatrix_file is None:
        measured = isinstance(made, Plan) or made.imatrix == made.calibration_text  # else from before files were named
        fault = f"the importance that {what} was not kept in a file"
        return Importance(missing=_missing(made, source, fault) if measured else None)
    others = []
    for path in (places := _possible_places(made, plan, losses, source)):
        if (sha256 := _hash(path)) == made.imatrix_sha256:
            imatrix = read_importance(path, source)
            assert imatrix is not None
            return Importance(replace(imatrix, known_as=made.imatrix), path.name, path)
        others += [] if sha256 is None else [(path, sha256)]
    for path, sha256 in others:
        fault = f"is another file than the importance that {what}"
        raise BadInput(path, fault, got=f"SHA-256 {sha256}", expected=made.imatrix_sha256, hint=_HINT)
    missing = _missing(made, source, f"the importance that {what} is not there: {brief(made.imatrix_file, FILE_NAME)}")
    return Importance(file=places[0].name, path=places[0], missing=missing)


def _possible_places(made: Plan | Losses, plan: Plan | None, losses: Losses | None, source: Source) -> list[Path]:
    """Return the paths at which the imatrix that `made` points to may be, the likeliest first."""
    read = [one for one in (plan, losses) if one is not None and isinstance(one.importance, Path)]
    places = [
        one.importance.parent / one.imatrix_file
        for one in read
        if one.imatrix_file is not None and one.imatrix_sha256 == made.imatrix_sha256
    ]
    folders = (*(one.importance.parent for one in read), source.path.parent)
    places += [folder / Path(made.imatrix_file or "").name for folder in folders]
    return list(dict.fromkeys(places))


def _missing(made: Plan | Losses, source: Source, fault: str) -> BadInput:
    return BadInput(made.importance or source.path, fault, hint=_HINT)


def _hash(path: Path) -> str | None:
    """Return the SHA-256 of the file at `path`, None where there is none that can be read, or a very large one."""
    try:
        os.close(open_regular(path))
        return None if path.stat().st_size > _LARGEST else hash_file(path)
    except (RequantError, OSError, ValueError):  # also a name that the file system does not take
        return None


def point_to_importance(plan: Plan, importance: Importance, losses: Losses | None) -> Plan:
    """Return the plan with the names, file and hash of the importance to convert it with, if that is used."""
    file = importance.file
    if importance.missing is not None and losses is not None:
        name, sha256 = losses.imatrix, losses.imatrix_sha256
        return replace(plan, imatrix=name, imatrix_sha256=sha256, imatrix_file=file, importance=losses.importance)
    used = imatrix_used(plan, importance.imatrix)
    if used is None:
        return plan
    return replace(plan, imatrix=used.name, imatrix_sha256=used.sha256, imatrix_file=file, importance=used)
