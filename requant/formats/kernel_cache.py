"""The folder of compiled kernels: its place, its contents and its removal.

Numba's cache is pickle, so the folder must be private to the user. A cached kernel does not notice an edit of a helper
in another file, so the folder's name has a hash of all kernel sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Contents:
    """Numbers of cached kernels: of this version in `folder` (None before the first kernel), and of other versions."""

    folder: Path | None
    n_kernels: int
    n_bytes: int
    others: int
    other_bytes: int


def source_state(numba_version: str) -> str:
    """Return a hash over the sources of all kernels and Numba's version; Numba itself tells processors apart."""
    here = Path(__file__).parent
    digest = hashlib.sha256(numba_version.encode())
    for path in sorted(here.rglob("*.[pn][yp]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def parents() -> list[Path]:
    """Return the places that folders of kernels may have, the best first."""
    named = os.environ.get("REQUANT_CACHE_DIR")
    home = os.path.expanduser("~")  # noqa: PTH111, as Path.home raises where there is none
    cache = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home != "~" else "")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    usual = Path(named) if named else Path(cache) / "requant" if cache else None
    return [path for path in (usual, Path(tempfile.gettempdir()) / f"requant-{user}") if path is not None]


def folder_name(state: str) -> str:
    """Return the name, within a parent, of the folder for kernels of that state."""
    return f"kernels-{state}"


def is_private(folder: Path) -> bool:
    """Return whether `folder` belongs to this user and nobody else may write to it."""
    status = folder.lstat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and owned and not status.st_mode & 0o022


def contents(state: str) -> Contents:
    """Measure the folders of kernels in all parents."""
    found = {folder: _measure(folder) for folder in _folders()}
    own = [folder for folder in found if folder.name == folder_name(state)]
    others = [size for folder, size in found.items() if folder not in own]
    return Contents(
        own[0] if own else None,
        sum(found[folder][0] for folder in own),
        sum(found[folder][1] for folder in own),
        len(others),
        sum(n_bytes for _, n_bytes in others),
    )


def clear() -> list[Path]:
    """Delete the folders of compiled kernels, of this and of other versions, and return them. Raises OSError."""
    found = _folders()
    for folder in found:
        shutil.rmtree(folder)
    return found


def _folders() -> list[Path]:
    """Return every private folder of kernels in a private parent; no folder that others may change is touched."""
    found: list[Path] = []
    for parent in parents():
        if parent.is_dir() and is_private(parent):
            found += (path for path in sorted(parent.glob(folder_name("*"))) if is_private(path))
    return found


def _measure(folder: Path) -> tuple[int, int]:
    """Return the number of compiled kernels in `folder`, and the bytes of all its files."""
    n_kernels = n_bytes = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process writes or clears them
                n_bytes += os.lstat(f"{base}/{name}").st_size
                n_kernels += name.endswith(".nbi")
    return n_kernels, n_bytes
