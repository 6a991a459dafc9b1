"""Address space of the process, which `ulimit -v` limits: native libraries abort where they get none."""

from __future__ import annotations

import resource

from requant.common.units import format_size

_LEAST = 600 * 2**20  # bytes; twice what loading compiled kernels takes


def check_address_space() -> None:
    """Raise MemoryError where the limit is less than kernels and native libraries take."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _LEAST:
        raise MemoryError(f"less than the {format_size(_LEAST)} that kernels need")
