"""The one Numba decorator and the folder its compiled kernels are kept in.

Numba's cache is pickle, so the folder must be private to the user; and a cached kernel does not notice an
edit of a helper in another file, so the folder's name carries a hash of all kernel sources.
"""

import hashlib
import os
import pickle
import stat
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numba
from numba.core.caching import FunctionCache

_config: Any = numba.config
# what unpickling a damaged file may raise
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    AttributeError,
    ImportError,
    TypeError,
    ValueError,
    MemoryError,
)


class Kernel(Protocol):
    """A compiled function on arrays; `py_func` is the same without the JIT."""

    py_func: Any

    def __call__(self, *args: Any) -> None:
        """Run on `args`."""


def _source_state() -> str:
    """Hash over the sources of every kernel and the versions that compile them."""
    here = Path(__file__).parent
    digest = hashlib.sha256(f"{numba.__version__} {_config.CPU_NAME}".encode())
    for path in [Path(__file__), *sorted((here / "formats").glob("*.[pn][yp]*"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCE_STATE = _source_state()


def _is_private(folder: Path) -> bool:
    """Whether `folder` belongs to this user and nobody else may write to it."""
    status = folder.lstat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and owned and not status.st_mode & 0o022


def _cache_folder() -> Path | None:
    """A private folder that can be written, made if need be; None where there is none to be had."""
    named = os.environ.get("REQUANT_CACHE_DIR")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "requant"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    for parent in (base, Path(tempfile.gettempdir()) / f"requant-{user}"):
        folder = parent / f"kernels-{SOURCE_STATE}"
        try:
            parent.parent.mkdir(parents=True, exist_ok=True)
            for path in (parent, folder):  # who may rename the one can put their own in place of the other
                path.mkdir(mode=0o700, exist_ok=True)
            if _is_private(parent) and _is_private(folder) and os.access(folder, os.W_OK | os.X_OK):
                return folder
        except OSError:
            continue
    return None


CACHE_FOLDER = _cache_folder()
if CACHE_FOLDER is not None:
    _config.CACHE_DIR = str(CACHE_FOLDER)


class _MendingCache(FunctionCache):
    """Numba's cache, but a file that cannot be read is thrown away and the kernel compiled anew."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature, or None."""
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGED:
            self.flush()
            return None


def kernel(function: Any) -> Any:
    """`function` compiled on first call: no GIL, IEEE arithmetic in source order, kept in the cache folder."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if CACHE_FOLDER is not None and not _config.DISABLE_JIT:
        compiled._cache = _MendingCache(function)
    return compiled
