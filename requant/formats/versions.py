"""The versions of requant, its encoders, its table of formats and its packages, read without importing these."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from requant._version import __version__
from requant.common.threads import n_threads
from requant.formats import FORMATS, GGML, KERNELS, kernel_cache, table_digest

# the required packages, and those of extras
PACKAGES = ("click", "gguf", "highspy", "llvmlite", "numba", "numpy", "threadpoolctl", "tqdm")
OPTIONAL = ("distributed", "matplotlib", "tokenizers", "xllamacpp")


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions that decide the result of a run.

    kernels: version of the encoders, raised when the same weights become other bytes. ggml: version whose types are
    known. n_types, formats: number of types, and the hash of their table. packages: versions of the installed packages
    that requant uses. cache: None where Numba, and so every kernel, is missing.
    """

    requant: str
    kernels: int
    ggml: str
    n_types: int
    formats: str
    python: str
    platform: str
    threads: int
    packages: dict[str, str]
    cache: kernel_cache.Contents | None


def versions() -> Versions:
    """Collect the versions of this process."""
    packages = {name: found for name in (*PACKAGES, *OPTIONAL) if (found := _installed_version(name))}
    numba = packages.get("numba")
    return Versions(
        requant=__version__,
        kernels=KERNELS,
        ggml=GGML,
        n_types=len(FORMATS),
        formats=table_digest(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{platform.system()} {platform.machine()}",
        threads=n_threads(None),
        packages=packages,
        cache=kernel_cache.contents(kernel_cache.source_state(numba)) if numba else None,
    )


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
