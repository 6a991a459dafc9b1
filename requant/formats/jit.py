"""The one Numba decorator, which caches compiled kernels in the folder that `kernel_cache` names."""

import contextlib
import errno
import hashlib
import os
import pickle
import warnings
from pathlib import Path
from typing import Any, Protocol

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from requant._version import __version__
from requant.errors import printable
from requant.formats.kernel_cache import folder_name, is_private, parents, source_state

_config: Any = numba.config
_DIGEST_BYTES = 32
_warned: set[str] = set()
# errors of a damaged file, or of one that other versions of the pickled classes wrote
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


SOURCE_STATE = source_state(numba.__version__)


def fingerprint() -> tuple[str, str]:
    """Return the facts that must agree on all machines that work on one output: the version and the kernels' state."""
    return __version__, SOURCE_STATE


def _cache_folder() -> Path | None:
    """Return a private, writable folder, created if missing; None where no place allows one."""
    for parent in parents():
        folder, reason = parent / folder_name(SOURCE_STATE), "others may change it"
        try:
            parent.parent.mkdir(parents=True, exist_ok=True)
            for path in (parent, folder):  # whoever may rename one of them can replace the other
                path.mkdir(mode=0o700, exist_ok=True)
            if is_private(parent) and is_private(folder):
                if os.access(folder, os.W_OK | os.X_OK):
                    return folder
                reason = os.strerror(errno.EACCES)
        except OSError as error:
            reason = error.strerror or str(error)
        _warn(f"compiled kernels are not kept in {printable(str(folder))}: {reason}")
    return None


def _warn(what: str) -> None:
    """Warn once: while Numba compiles, it makes Python forget which warnings were given."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(what, RuntimeWarning, stacklevel=1)


CACHE_FOLDER = _cache_folder()
if CACHE_FOLDER is not None:
    _config.CACHE_DIR = str(CACHE_FOLDER)


class _CheckedFile(IndexDataCacheFile):
    """Numba's cache files, each preceded by its digest: machine code with a flipped bit would load and run."""

    def _dump(self, obj: Any) -> bytes:
        data: bytes = super()._dump(obj)
        return hashlib.sha256(data).digest() + data

    def _load_data(self, name: str) -> Any:
        return _read_checked(self._data_path(name))

    def _save_index(self, overloads: Any) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(self._dump((self._version, self._source_stamp, overloads)))

    def _load_index(self) -> Any:
        if not Path(self._index_path).exists():
            return {}
        version, stamp, overloads = _read_checked(self._index_path)
        return overloads if (version, stamp) == (self._version, self._source_stamp) else {}


def _read_checked(path: str) -> Any:
    """Read the object in the file. Raises UnpicklingError where the digest does not match."""
    content = Path(path).read_bytes()
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise pickle.UnpicklingError(path)
    return pickle.loads(data)


class _MendingCache(FunctionCache):
    """Numba's cache, except that a file that cannot be read is deleted and its kernel compiled anew."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        file = self._cache_file
        self._cache_file = _CheckedFile(file._cache_path, self._impl.filename_base, file._source_stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel for a signature, or None."""
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGED:
            _warn(f"the kernel cache {printable(str(CACHE_FOLDER))} is damaged; kernels are compiled anew")
        except OSError as error:
            _warn(f"the kernel cache {printable(str(CACHE_FOLDER))} cannot be read: {error.strerror}")
        with contextlib.suppress(OSError):
            self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the compiled kernel; where that fails, the next process compiles it again."""
        try:
            super().save_overload(sig, data)
        except (OSError, *_DAMAGED) as error:
            _warn(f"compiled kernels cannot be kept in {printable(str(CACHE_FOLDER))}: {error}")


def kernel(function: Any) -> Any:
    """Compile `function` on its first call: no GIL, IEEE arithmetic in source order, cached in the folder."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if CACHE_FOLDER is not None and not _config.DISABLE_JIT:
        try:
            compiled._cache = _MendingCache(function)
        except RuntimeError:  # Numba found no folder that it could write to
            _warn(f"compiled kernels cannot be kept in {printable(str(CACHE_FOLDER))}")
    return compiled
